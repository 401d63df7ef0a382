"""Names of VMs, from made-up processes (directories in the form of /proc)."""

from __future__ import annotations

import errno
import os
import unicodedata
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from kvmtrace.sanitize import NAME_LIMIT, clean
from kvmtrace.vmm import identity
from kvmtrace.vmm.command_line import Options, options, program
from kvmtrace.vmm.identity import Identity, holds_vm, identify, vm_processes
from kvmtrace.vmm.paths import name_of_disk, name_of_path

LIBVIRT = r"0::/machine.slice/machine-qemu\x2d1\x2dfoo.scope/libvirt/emulator"


class Proc:
    """A /proc of made-up processes."""

    def __init__(self, root: Path) -> None:
        self.root = root

    def add(
        self,
        pid: int,
        *argv: str,
        exe: str | None = None,
        comm: str = "",
        cgroup: str = "0::/",
        fds: tuple[str, ...] = (),
    ) -> None:
        directory = self.root / str(pid)
        (directory / "fd").mkdir(parents=True)
        (directory / "cmdline").write_text("\0".join(argv) + "\0" if argv else "")
        (directory / "comm").write_text(comm + "\n")
        (directory / "cgroup").write_text(cgroup + "\n")
        if exe:
            (directory / "exe").symlink_to(exe)
        for number, target in enumerate(fds):
            (directory / "fd" / str(number)).symlink_to(target)

    def identify(self, pid: int = 1) -> Identity:
        """Its names; ``run_by`` has the rest."""
        return replace(identify(pid, str(self.root)), unit=None, api_socket=None)

    def run_by(self, pid: int = 1) -> tuple[str | None, str | None]:
        """The unit and the API's socket."""
        found = identify(pid, str(self.root))
        return found.unit, found.api_socket


@pytest.fixture
def proc(tmp_path: Path) -> Proc:
    return Proc(tmp_path)


UUID = "c7a5fdbd-edaf-9455-926a-d65c16db1809"


@pytest.mark.parametrize(
    ("argv", "name"),
    [
        (("-name", "foo"), "foo"),
        (("-name", "guest=foo,debug-threads=on"), "foo"),
        (("-name", "foo,debug-threads=on"), "foo"),
        (("-name", "debug-threads=on,guest=foo"), "foo"),
        (("-name", "guest=a,,b,debug-threads=on"), "a,b"),
        (("-name", "guest=a,,,,b"), "a,,b"),
        (("-name", "guest=a=b"), "a=b"),
        (("-name", "guest=default_my-vm,process=qemu:x"), "default_my-vm"),
        (("--name", "foo"), "foo"),
        (("-m", "1G"), "comm"),
        (("-name",), "comm"),
        (("-name", ""), "comm"),
        (("-name", "guest="), "comm"),
    ],
)
def test_qemu_name(proc: Proc, argv: tuple[str, ...], name: str) -> None:
    proc.add(1, "qemu-system-x86_64", *argv, exe="/usr/bin/qemu-system-x86_64", comm="comm")
    assert proc.identify() == Identity(name, None, "qemu")


@pytest.mark.parametrize(
    "exe",
    ["/usr/bin/qemu-system-aarch64", "/usr/libexec/qemu-kvm", "/usr/bin/kvm (deleted)"],
)
def test_qemu_binaries(proc: Proc, exe: str) -> None:
    proc.add(1, "x", "-uuid", UUID.upper(), "-name", "n", exe=exe)
    assert proc.identify() == Identity("n", UUID, "qemu")


def test_wrapper_is_known_by_its_first_argument(proc: Proc) -> None:
    proc.add(1, "/usr/bin/kvm", "-name", "n", exe="/opt/vendor/emulator")
    assert proc.identify() == Identity("n", None, "qemu")


def test_process_title(proc: Proc) -> None:
    proc.add(1, f"/usr/bin/qemu-system-x86_64 -name guest=foo,debug-threads=on -uuid {UUID}")
    assert proc.identify() == Identity("foo", UUID, "qemu")


def test_last_option_counts(proc: Proc) -> None:
    proc.add(1, "qemu-kvm", "-name", "first", "-name", "second")
    assert proc.identify().name == "second"


@pytest.mark.parametrize(
    ("argv", "expected"),
    [
        (
            ("--api-socket", "/run/vm/web.sock", "--platform", f"num_pci_segments=1,uuid={UUID}"),
            Identity("web", UUID, "cloud-hypervisor"),
        ),
        (("--api-socket=path=/run/web.socket",), Identity("web", None, "cloud-hypervisor")),
        (
            ("--api-socket", "/run/vc/vm/3f2a/clh-api.sock"),
            Identity("3f2a", None, "cloud-hypervisor"),
        ),
        (("--api-socket", "fd=3"), Identity("comm", None, "cloud-hypervisor")),
        (("--api-socket", "/tmp/ch.sock"), Identity("comm", None, "cloud-hypervisor")),
    ],
)
def test_cloud_hypervisor(proc: Proc, argv: tuple[str, ...], expected: Identity) -> None:
    proc.add(1, "cloud-hypervisor", *argv, exe="/usr/bin/cloud-hypervisor", comm="comm")
    assert proc.identify() == expected


@pytest.mark.parametrize("argv", [("--id", "vm-7"), ("--id=vm-7",)])
@pytest.mark.parametrize("exe", ["/firecracker", "/opt/firecracker-v1.7.0-x86_64"])
def test_firecracker(proc: Proc, argv: tuple[str, ...], exe: str) -> None:
    proc.add(1, exe, "--api-sock", "/run/api.sock", *argv, exe=exe)
    assert proc.identify() == Identity("vm-7", None, "firecracker")


def test_crosvm(proc: Proc) -> None:
    proc.add(1, "crosvm", "run", "--socket", "/run/crosvm/arcvm.sock", exe="/usr/bin/crosvm")
    assert proc.identify() == Identity("arcvm", None, "crosvm")


SANDBOX = "7c1e0f5b9a3d4e62b8f0d1a2c3e4f5067c1e0f5b9a3d4e62b8f0d1a2c3e4f506"
QEMU = "/usr/bin/qemu-system-x86_64"
# As they are started in the field (documentation, issue reports), with other names:
# program, what follows it, and the name, UUID and VMM.
FIELD: dict[str, tuple[str, str, tuple[str | None, str | None, str]]] = {
    "libvirt": (
        QEMU,
        "-name guest=db-2,debug-threads=on -S -object"
        ' {"qom-type":"secret","id":"masterKey0","format":"raw","file":"/x/master-key.aes"}'
        f" -machine pc-q35-9.2,usb=off -accel kvm -uuid {UUID} -no-user-config -nodefaults",
        ("db-2", UUID, "qemu"),
    ),
    "OpenStack": (
        QEMU,
        "-name guest=instance-0000002a,debug-threads=on -S -machine pc,accel=kvm"
        f" -uuid {UUID} -smbios type=1,manufacturer=OpenStack-Foundation,product=OpenStack-Nova,"
        f"version=29.2.0,serial={UUID},uuid={UUID},family=Virtual-Machine",
        ("instance-0000002a", UUID, "qemu"),
    ),
    "KubeVirt": (
        "/usr/libexec/qemu-kvm",
        f"-name guest=shop_web-1,debug-threads=on -S -uuid {UUID}"
        f" -smbios type=1,manufacturer=KubeVirt,product=None,uuid={UUID},family=KubeVirt",
        ("shop_web-1", UUID, "qemu"),
    ),
    "Incus": (
        "/opt/incus/bin/qemu-system-x86_64",
        f"-S -name web-3 -uuid {UUID} -daemonize -cpu host,hv_passthrough -nographic"
        " -serial chardev:console -nodefaults -no-user-config -sandbox"
        " on,obsolete=deny,spawn=deny -readconfig /run/incus/web-3/qemu.conf"
        " -pidfile /run/incus/web-3/qemu.pid",
        ("web-3", UUID, "qemu"),
    ),
    "SMBIOS: the last that has it": (
        QEMU,
        f"-name x -smbios type=0,uuid=no -smbios type=1,uuid=none -smbios type=1,uuid={UUID}"
        " -smbios type=1,serial=7 -smbios type=11,value=a",
        ("x", UUID, "qemu"),
    ),
    "NixOS's wrapper": (
        "/nix/store/0abc-qemu/bin/.qemu-system-x86_64-wrapped",
        "-name web -m 512",
        ("web", None, "qemu"),
    ),
    "names in two options": (QEMU, "-name web -name debug-threads=on", ("web", None, "qemu")),
    "QEMU without a name, by its socket": (
        QEMU,
        "-m 1G -qmp unix:/run/vmm/web-7/qmp.sock,server=on,wait=off -sandbox on",
        ("web-7", None, "qemu"),
    ),
    "QEMU without a name": (
        QEMU,
        "-sandbox on -monitor stdio -qmp tcp:localhost:4444,server -pidfile /run/qemu.pid",
        ("comm", None, "qemu"),
    ),
    "emulator": (
        "/sdk/emulator/qemu/linux-x86_64/qemu-system-x86_64-headless",
        "-avd Pixel_5 -no-window",
        ("Pixel_5", None, "qemu"),
    ),
    "emulator, by @": (
        "/sdk/emulator/qemu/linux-x86_64/qemu-system-x86_64",
        "@Pixel_3a_API_30 -netdelay none -netspeed full -no-audio",
        ("Pixel_3a_API_30", None, "qemu"),
    ),
    "Multipass": (
        "/snap/multipass/14000/usr/bin/qemu-system-x86_64",
        "-bios OVMF.fd --enable-kvm -cpu host -nic tap,ifname=tap-0,script=no -device"
        " virtio-scsi-pci,id=scsi0 -drive file=/var/snap/multipass/common/data/multipassd/vault/"
        "instances/magical-sablefish/ubuntu-22.04-server-cloudimg-amd64.img,if=none,format=qcow2,"
        "discard=unmap,id=hda -device scsi-hd,drive=hda,bus=scsi0.0 -smp 1 -m 1024M -qmp stdio"
        " -chardev null,id=char0 -serial chardev:char0 -nographic -cdrom /var/snap/multipass/"
        "common/data/multipassd/vault/instances/magical-sablefish/cloud-init-config.iso",
        ("magical-sablefish", None, "qemu"),
    ),
    "Multipass, as it was": (
        QEMU,
        "-hda /var/snap/multipass/common/data/multipassd/vault/instances/primary/"
        "ubuntu-18.04-server-cloudimg-amd64.img -nographic",
        ("primary", None, "qemu"),
    ),
    "Podman's machine": (
        QEMU,
        "-m 2048 -fw_cfg name=opt/com.coreos/config,file=/home/u/.config/containers/podman/machine/"
        "qemu/dev.ign -qmp unix:/run/user/1000/podman/qmp_dev.sock,server=on,wait=off",
        ("dev", None, "qemu"),
    ),
    "Lima": (
        QEMU,
        "-m 4096 -name lima-build -pidfile /home/u/.lima/build/qemu.pid",
        ("lima-build", None, "qemu"),
    ),
    "QEMU, by its disk": (
        QEMU,
        "-enable-kvm -drive if=pflash,format=raw,readonly=on,file=/usr/share/OVMF/OVMF_CODE_4M.fd"
        " -drive if=pflash,format=raw,file=/srv/OVMF_VARS_4M.fd -drive file=/srv/seed.img,"
        "media=cdrom -drive file=/srv/isos/tools.iso -drive file=/srv/images/web-9.qcow2,if=virtio",
        ("web-9", None, "qemu"),
    ),
    "QEMU, by which of its disks": (
        QEMU,
        "-blockdev driver=raw,node-name=a,file.driver=host_device,file.filename=/dev/pve/vm-100-"
        "disk-0",
        ("vm-100", None, "qemu"),
    ),
    "QEMU, by JSON": (
        QEMU,
        '-blockdev {"driver":"qcow2","read-only":true,"file":{"driver":"file",'
        '"filename":"/srv/base.qcow2"}} -blockdev {"driver":"qcow2","file":'
        '{"driver":"file","filename":"/srv/web-10/disk.qcow2"}}',
        ("web-10", None, "qemu"),
    ),
    "QEMU, by a node of another name": (
        QEMU,
        "-blockdev driver=qcow2,node-name=disk0,file=proto0"
        " -blockdev driver=file,node-name=proto0,filename=/srv/web-19.qcow2",
        ("web-19", None, "qemu"),
    ),
    "QEMU, its disk elsewhere": (
        QEMU,
        "-drive file=rbd:pool/web -drive file=nbd://h/web -drive file=/dev/sdb"
        " -drive file=/dev/fdset/2 -drive file=/srv/vms/rootfs.ext4,snapshot=on",
        ("comm", None, "qemu"),
    ),
    "QEMU, its disk called by its system": (
        QEMU,
        "-drive file=/var/lib/images/debian-12-genericcloud-amd64.qcow2",
        ("debian-12-genericcloud-amd64", None, "qemu"),
    ),
    "QEMU's log": (QEMU, "-d guest_errors -D /var/log/vm-3.log -b x", ("comm", None, "qemu")),
    "another VMM's configuration": (
        "/opt/acme/hv",
        "--config-file /etc/acme/acme.json",
        ("comm", None, "hv"),
    ),
    "QEMU's other names": (
        QEMU,
        "-name debug-threads=on -drive file=/srv/vms/web-11.img",
        ("web-11", None, "qemu"),
    ),
    "cloud-hypervisor, by its disk": (
        "/usr/bin/cloud-hypervisor",
        "--api-socket /tmp/cloud-hypervisor.sock --disk path=/srv/web-12/focal-server-cloudimg-"
        "amd64.raw path=/tmp/cloudinit.img,readonly=on",
        ("web-12", None, "cloud-hypervisor"),
    ),
    "firecracker, by its configuration": (
        "/usr/bin/firecracker",
        "--no-api --config-file /etc/firecracker/web-13.json",
        ("web-13", None, "firecracker"),
    ),
    "firecracker, by where its configuration is": (
        "/usr/bin/firecracker",
        "--api-sock /tmp/firecracker.socket --config-file /srv/web-14/vm_config.json",
        ("web-14", None, "firecracker"),
    ),
    "firecracker, by its id": (
        "/usr/bin/firecracker",
        "--id web-15 --config-file /srv/other/vm_config.json",
        ("web-15", None, "firecracker"),
    ),
    "crosvm, by its disk": (
        "/usr/bin/crosvm",
        "run --disable-sandbox --block /srv/base/root.img,ro --rwdisk /srv/web-16.qcow2 bzImage",
        ("web-16", None, "crosvm"),
    ),
    "kvmtool, by its disk": (
        "/usr/bin/lkvm",
        "run -k bzImage -d /srv/base.img,ro --disk /srv/web-17/rootfs.ext4 -m 256",
        ("web-17", None, "kvmtool"),
    ),
    "stratovirt, by its disk": (
        "/usr/bin/stratovirt",
        "-machine microvm -drive file=/srv/web-18/rootfs.img,id=rootfs,readonly=off"
        " -qmp unix:/tmp/stratovirt.socket,server,nowait",
        ("web-18", None, "stratovirt"),
    ),
    "kata, qemu": (
        "/usr/bin/qemu-lite-system-x86_64",
        f"-name sandbox-{SANDBOX} -uuid {UUID} -machine q35,accel=kvm,kernel_irqchip=on"
        f" -qmp unix:/run/vc/vm/{SANDBOX}/qmp.sock,server=on,wait=off",
        (f"sandbox-{SANDBOX}", UUID, "qemu"),
    ),
    "kata, qemu of a vendor": (
        "/opt/kata/bin/qemu-system-x86_64-snp-experimental",
        "-name sandbox-hello -qmp unix:fd=16,server=on,wait=off",
        ("sandbox-hello", None, "qemu"),
    ),
    "kata, cloud-hypervisor": (
        "/opt/kata/bin/cloud-hypervisor",
        f"--api-socket /run/vc/vm/{SANDBOX}/clh-api.sock -v",
        (SANDBOX, None, "cloud-hypervisor"),
    ),
    "kata in Rust, cloud-hypervisor": (
        "/opt/kata/bin/cloud-hypervisor",
        f"--api-socket path=/run/kata/{SANDBOX}/root/ch-api.sock --event-monitor fd=11",
        (SANDBOX, None, "cloud-hypervisor"),
    ),
    "kata, firecracker": (
        "/opt/kata/bin/firecracker",
        f"--api-sock /run/vc/firecracker/{SANDBOX[:32]}/root/run/firecracker.socket"
        f" --config-file /run/vc/firecracker/{SANDBOX[:32]}/root/fcConfig.json",
        (SANDBOX[:32], None, "firecracker"),
    ),
    "kata, stratovirt": (
        "/usr/bin/stratovirt",
        f"-name sandbox-{SANDBOX} -uuid {UUID} -machine microvm"
        f" -qmp unix:/run/vc/vm/{SANDBOX}/qmp.socket,server,nowait",
        (f"sandbox-{SANDBOX}", UUID, "stratovirt"),
    ),
    "kata, dragonball": (
        "/opt/kata/runtime-rs/bin/containerd-shim-kata-v2",
        "-namespace k8s.io -address /run/containerd/containerd.sock -publish-binary"
        f" /usr/bin/containerd -id {SANDBOX} -debug",
        (SANDBOX, None, "dragonball"),
    ),
    "kata, acrn": (
        "/usr/bin/acrn-dm",
        f"-A -m 2048M -s 0:0,hostbridge sandbox-{SANDBOX}",
        (f"sandbox-{SANDBOX}", None, "acrn"),
    ),
    "jailer": (
        "/firecracker",
        "--id 551e7604 --start-time-us 1790000 --start-time-cpu-us 0 --parent-cpu-time-us 9"
        " --api-sock /run/firecracker.socket",
        ("551e7604", None, "firecracker"),
    ),
    "ignite": (
        "/usr/local/bin/firecracker",
        "--api-sock /var/lib/firecracker/vm/cae0ac187ff8/firecracker.sock",
        ("cae0ac187ff8", None, "firecracker"),
    ),
    "flintlock": (
        "/usr/local/bin/firecracker",
        "--id 01h8 --boot-timer --no-api --config-file /var/lib/flintlock/vm/ns1/mvm0/01h8/x.cfg",
        ("01h8", None, "firecracker"),
    ),
    "one place for any VM": (
        "/usr/bin/firecracker",
        "--api-sock /tmp/firecracker.socket",
        ("comm", None, "firecracker"),
    ),
    "somebody's": (
        "/usr/bin/cloud-hypervisor-static",
        "--api-socket /run/user/1000/cloud-hypervisor.sock",
        ("comm", None, "cloud-hypervisor"),
    ),
    "somebody's home": (
        "/usr/bin/cloud-hypervisor",
        "--api-socket /home/alice/vm/api.sock",
        ("comm", None, "cloud-hypervisor"),
    ),
    "libvirt's ch": (
        "/usr/bin/cloud-hypervisor",
        "--api-socket /run/libvirt/ch/web-2-socket",
        ("web-2", None, "cloud-hypervisor"),
    ),
    "numbers": (
        "/usr/bin/cloud-hypervisor-v41.0",
        "--api-socket /srv/fc/instances/0007/vmm/api.socket",
        ("0007", None, "cloud-hypervisor"),
    ),
    "a VM called like an address": (
        "/usr/bin/firecracker",
        "--api-sock /srv/vms/vm-10.0.0.5/firecracker-v1.12.0-x86_64/api.sock",
        ("vm-10.0.0.5", None, "firecracker"),
    ),
    "Cuttlefish": (
        "/home/u/cf/bin/x86_64-linux-gnu/crosvm",
        "--extended-status run --core-scheduling=false --cpus=4"
        " --socket=/tmp/cf_avd_1000/cvd-2/internal/crosvm_control.sock",
        ("cvd-2", None, "crosvm"),
    ),
    "crosvm": ("/usr/bin/crosvm", "run -s /run/vm/arcvm.sock", ("arcvm", None, "crosvm")),
    "crosvm's own name": (
        "/apex/com.android.virt/bin/crosvm",
        "--log-level=info run --name=payload-3 --cid=2050 --socket /proc/self/fd/9"
        f" --smbios bios-vendor=x,uuid={UUID}",
        ("payload-3", UUID, "crosvm"),
    ),
    "kvmtool": (
        "/usr/bin/lkvm-static",
        "run --name=guest-77 -d disk.img -k bzImage -p name=x",
        ("guest-77", None, "kvmtool"),
    ),
    "gVisor": (
        "/memfd:runsc (deleted)",
        "--root=/run/containerd/runsc/k8s.io --log-fd=3 --platform=kvm boot"
        " --product-name VMware Virtual Platform --bundle=/run/containerd/io.containerd.runtime"
        f".v2.task/k8s.io/{SANDBOX} --io-fds=6 --stdio-fds=15 {SANDBOX}",
        (SANDBOX, None, "runsc"),
    ),
    "crun with libkrun": (
        "/usr/bin/krun",
        f"--pid-file /run/containers/storage/overlay-containers/{SANDBOX}/userdata/pidfile create",
        (SANDBOX, None, "krun"),
    ),
    "krunvm": ("/usr/bin/krunvm", "start build-7 /bin/sh", ("build-7", None, "krunvm")),
    "what is run in the guest": (
        "/usr/bin/muvm",
        "--mem=4096 -- server --name not-the-vm",
        ("comm", None, "muvm"),
    ),
    "VirtualBox": (
        "/usr/lib/virtualbox/VBoxHeadless",
        f"--comment web-5 --startvm {UUID} --vrde config",
        ("web-5", UUID, "virtualbox"),
    ),
    "VMware": (
        "/usr/lib/vmware/bin/vmware-vmx",
        "-s vmx.stdio.keep=TRUE -# product=1;name=Workstation /vms/web-6/web-6.vmx",
        ("web-6", None, "vmware"),
    ),
    "another VMM": (
        "/opt/acme/hv",
        f"--vcpus 4 --vm_name=web-8 --uuid {UUID.upper()} --id 3",
        ("web-8", UUID, "hv"),
    ),
    "another VMM's id": ("/opt/acme/hv", "run --id=f00 --id=f01", ("f01", None, "hv")),
    "another VMM with QEMU's syntax": (
        "/opt/acme/hv",
        "-name guest=a,,b,debug-threads=on",
        ("a,b", None, "hv"),
    ),
    "another VMM's socket": (
        "/opt/acme/hv",
        "--api-sock=/run/acme/vms/f02/api.sock",
        ("f02", None, "hv"),
    ),
    "an option without its value": ("/opt/acme/hv", "--name --id", ("comm", None, "hv")),
    "by the loader": (
        "/lib64/ld-linux-x86-64.so.2",
        "--inhibit-cache /snap/lxd/1/bin/qemu-system-x86_64 -name v1",
        ("v1", None, "qemu"),
    ),
}


@pytest.mark.parametrize("case", FIELD)
def test_as_vmms_are_started(proc: Proc, case: str) -> None:
    exe, arguments, expected = FIELD[case]
    proc.add(1, exe, *arguments.split(), exe=exe, comm="comm")
    assert proc.identify() == Identity(*expected)


PROXMOX = (
    "-id 8006 -name simple,debug-threads=on -no-shutdown -chardev"
    " socket,id=qmp,path=/var/run/qemu-server/8006.qmp,server=on,wait=off -mon"
    " chardev=qmp,mode=control -pidfile /var/run/qemu-server/8006.pid -daemonize"
    f" -smbios type=1,uuid={UUID} -smp 1,sockets=1 -nodefaults"
)


def test_proxmox(proc: Proc) -> None:
    """Proxmox allows equal names; the VM's number distinguishes them."""
    proc.add(1, "/usr/bin/kvm", *PROXMOX.split(), exe=QEMU, comm="kvm")
    proc.add(2, "kvm", "-name", "simple", cgroup="0::/qemu.slice/8007.scope")
    proc.add(3, "kvm", "-id", "8008", exe=QEMU, comm="kvm", cgroup="0::/qemu.slice/8008.scope")
    assert [proc.identify(pid) for pid in (1, 2, 3)] == [
        Identity("simple", UUID, "qemu", "8006"),
        Identity("simple", None, "qemu", "8007"),
        Identity("kvm", None, "qemu", "8008"),
    ]


@pytest.mark.parametrize(
    ("cgroup", "name"),
    [
        ("0::/system.slice/system-microvm.slice/microvm@web.service", "web"),
        (r"0::/system.slice/microvm@a\x2db.service", "a-b"),
        (f"0::/machine.slice/libpod-{SANDBOX}.scope/container", SANDBOX[:12]),
        (f"0::/system.slice/docker-{SANDBOX}.scope", SANDBOX[:12]),
        (f"12:pids:/docker/{SANDBOX}\n0::/x", SANDBOX[:12]),
        ("0::/user.slice/user-1000.slice/user@1000.service/app.slice", "comm"),
        ("0::/system.slice/system-getty.slice/getty@tty1.service", "comm"),
        (r"0::/machine.slice/machine-ch\x2d1\x2dweb.scope", "web"),
    ],
)
def test_cgroup_names_a_vmm_that_its_socket_does_not(proc: Proc, cgroup: str, name: str) -> None:
    proc.add(
        1, "ch", "--api-socket", "/run/ch/api.sock", exe="/bin/own", comm="comm", cgroup=cgroup
    )
    assert proc.identify() == Identity(name, None, "own")


@pytest.mark.parametrize(
    ("cgroup", "unit"),
    [
        ("0::/system.slice/system-microvm.slice/microvm@web.service", "microvm@web.service"),
        (r"0::/system.slice/microvm@a\x2db.service", r"microvm@a\x2db.service"),
        ("0::/system.slice/vm@web.service/vcpu0", "vm@web.service"),
        # These run other VMs, too, or are not the system's.
        ("0::/system.slice/libvirtd.service", None),
        ("0::/user.slice/user-1000.slice/user@1000.service/app.slice/vm@web.service", None),
        ("0::/system.slice/system-getty.slice/getty@tty1.service", None),
        ("0::/system.slice/vm@\x1b[2J.service", None),
    ],
)
def test_the_unit_that_is_one_vm(proc: Proc, cgroup: str, unit: str | None) -> None:
    proc.add(1, "ch", exe="/bin/own", comm="comm", cgroup=cgroup)
    assert proc.run_by() == (unit, None)


@pytest.mark.parametrize(
    ("argv", "api"),
    [
        (("firecracker", "--api-sock", "/run/fc/web.sock"), "/run/fc/web.sock"),
        (("firecracker", "--api-sock=fc.sock"), "/srv/vms/fc.sock"),
        (("cloud-hypervisor", "--api-socket", "path=/run/ch.sock"), "/run/ch.sock"),
        (("cloud-hypervisor", "--api-socket", "fd=3"), None),
        (("cloud-hypervisor", "--api-socket", "/run/\x1b[2J.sock"), None),
        (("cloud-hypervisor", "--api-socket", f"/run/{'x' * NAME_LIMIT}"), None),
        (("firecracker", "--no-api"), None),
        (("qemu-system-x86_64", "--api-sock", "/run/fc/web.sock"), None),
    ],
)
def test_the_socket_of_the_api(proc: Proc, argv: tuple[str, ...], api: str | None) -> None:
    proc.add(1, *argv, exe=f"/bin/{argv[0]}", comm="comm")
    (proc.root / "1/cwd").symlink_to("/srv/vms")
    (proc.root / "1/root").symlink_to("/")
    assert proc.run_by() == (None, api)


def test_the_socket_of_a_jail(proc: Proc) -> None:
    proc.add(1, "firecracker", "--api-sock", "/run/fc.sock", exe="/firecracker", comm="comm")
    (proc.root / "1/root").symlink_to("/srv/jailer/firecracker/web/root")
    assert proc.run_by() == (None, "/srv/jailer/firecracker/web/root/run/fc.sock")


def test_what_a_jail_or_a_directory_hides(proc: Proc, tmp_path: Path) -> None:
    """The path of the socket, as the process sees it, is equal for all of them."""
    for pid, (link, socket) in enumerate(
        [
            ("root", "/run/firecracker.socket"),
            ("root", "/api.socket"),
            ("cwd", "api.sock"),
            ("cwd", "./run/firecracker.socket"),
        ],
        1,
    ):
        proc.add(pid, "firecracker", "--api-sock", socket, comm="comm")
        (tmp_path / str(pid) / link).symlink_to(f"/srv/jailer/firecracker/vm-{pid}/root")
    assert [proc.identify(pid).name for pid in (1, 2, 3, 4)] == ["vm-1", "vm-2", "vm-3", "vm-4"]


@pytest.mark.parametrize("comm", ["exe", "3", "memfd:hv", "ld-linux-x86-64."])
def test_a_process_name_that_says_nothing(proc: Proc, comm: str) -> None:
    proc.add(1, "hv", exe="/memfd:hv (deleted)", comm=comm)
    assert proc.identify() == Identity("hv", None, "hv")


WORDS = st.sampled_from(
    "run root tmp var lib internal vm vms sandbox firecracker jailer api".split()
)
IDS = st.text("0123456789abcdef", min_size=8, max_size=8)


@given(
    st.lists(WORDS, max_size=4),
    st.lists(WORDS, max_size=4),
    st.sampled_from(["api.sock", "firecracker.socket", "ch-api.sock", "control.sock"]),
    st.sets(IDS, min_size=2, max_size=2),
)
def test_no_layout_gives_two_vms_one_name(
    above: list[str], below: list[str], socket: str, ids: set[str]
) -> None:
    names = {name_of_path("/".join(["", *above, one, *below, socket])) for one in ids}
    assert names == ids
    assert name_of_path("/".join(["", *above, *below, socket])) is None


@given(
    st.lists(WORDS, max_size=4),
    st.lists(WORDS, max_size=4),
    st.sampled_from(["disk.qcow2", "rootfs.ext4", "noble-server-cloudimg-amd64.img", "hda"]),
    st.sets(IDS, min_size=2, max_size=2),
)
def test_no_layout_gives_two_disks_one_name(
    above: list[str], below: list[str], image: str, ids: set[str]
) -> None:
    names = {name_of_disk("/".join(["", *above, one, *below, image])) for one in ids}
    assert names == ids


@given(st.lists(st.text(st.characters(exclude_characters="\0"), max_size=40), max_size=12))
def test_any_command_line_can_be_read(argv: list[str]) -> None:
    exe, kind, words = program(argv[0] if argv else "", argv)
    assert isinstance(options(kind, words), Options)
    for one in ("qemu", "cloud-hypervisor", "crosvm", "runsc", "krunvm", "virtualbox", "vmware"):
        assert isinstance(options(one, argv), Options)
    assert isinstance(exe, str)


@pytest.mark.parametrize(
    ("cgroup", "name"),
    [
        (LIBVIRT, "foo"),
        (r"0::/machine.slice/machine-qemu\x2d12\x2da\x2db.scope", "a-b"),
        (r"0::/machine.slice/machine-caf\xc3\xa9.scope", "café"),
        (r"0::/machine.slice/machine-bad\xff.scope", "bad\N{REPLACEMENT CHARACTER}"),
        (
            "0::/kubepods.slice/kubepods-pod3c9ff2b1_1d56_4b0c_8d5a_0123456789ab.slice/x",
            "pod-3c9ff2b1-1d56-4b0c-8d5a-0123456789ab",
        ),
        ("0::/user.slice", "comm"),
    ],
)
def test_cgroup_names_what_the_command_line_does_not(proc: Proc, cgroup: str, name: str) -> None:
    proc.add(1, "/opt/own-vmm", exe="/opt/own-vmm", comm="comm", cgroup=cgroup)
    assert proc.identify() == Identity(name, None, "own-vmm")


def test_command_line_goes_before_cgroup(proc: Proc) -> None:
    proc.add(1, "qemu-kvm", "-name", "bar", cgroup=LIBVIRT)
    assert proc.identify().name == "bar"


def test_vanished_process_is_nobody(proc: Proc) -> None:
    assert proc.identify(4711) == Identity(None, None, None)


def test_escape_sequences_do_not_get_through(proc: Proc) -> None:
    proc.add(1, "qemu-kvm", "-name", "guest=a\x1b[2Jb\u202ec\u200b", comm="x")
    assert proc.identify().name == "a?[2Jbc"


def test_bytes_that_are_no_text(proc: Proc, tmp_path: Path) -> None:
    proc.add(1)
    (tmp_path / "1" / "cmdline").write_bytes(b"qemu-kvm\0-name\0\xff\xfe\0")
    assert proc.identify().name == "\N{REPLACEMENT CHARACTER}" * 2


def test_vm_processes(proc: Proc, tmp_path: Path) -> None:
    vm, vcpu = "anon_inode:kvm-vm", "anon_inode:kvm-vcpu:0"
    proc.add(1, fds=("/dev/null", "socket:[1]", "anon_inode:[eventfd]"))
    proc.add(2, fds=(vm, vm, "/dev/kvm"))
    proc.add(3, fds=(vcpu,))
    proc.add(4, fds=("anon_inode:[kvm-vm]",))
    (tmp_path / "5").mkdir()  # going: no fd directory any more
    (tmp_path / "self").mkdir()
    assert vm_processes(str(tmp_path)) == {2: 2, 3: 0, 4: 1}
    assert [holds_vm(pid, str(tmp_path)) for pid in (1, 2, 3, 5, 6)] == [
        False,
        True,
        True,
        False,
        False,
    ]


def descriptors(tmp_path: Path, held: dict[int, str]) -> None:
    """A /proc of our namespace, in which this process holds these KVM descriptors."""
    (tmp_path / "self").symlink_to(str(os.getpid()))
    directory = tmp_path / str(os.getpid()) / "fd"
    directory.mkdir(parents=True)
    for number, what in held.items():
        (directory / str(number)).symlink_to(f"anon_inode:{what}")


@pytest.fixture
def pipes() -> Iterator[list[int]]:
    """Two open files with three and two descriptors; skips if the kernel cannot compare them."""
    one, other = os.pipe()
    held = [one, os.dup(one), other, os.dup(one), os.dup(other)]
    try:
        identity._compare(os.getpid(), one, other)
    except OSError as error:
        if error.errno not in (errno.EPERM, errno.ENOSYS):
            raise
        pytest.skip("kcmp is not allowed here")
    else:
        yield held
    finally:
        for descriptor in held:
            os.close(descriptor)


def test_descriptors_of_one_vm_are_one(pipes: list[int], tmp_path: Path) -> None:
    """crosvm duplicates a VM's descriptor for each interrupt controller."""
    one, again, other, third, more = pipes
    descriptors(tmp_path, dict.fromkeys((one, again, third), "kvm-vm"))
    assert vm_processes(str(tmp_path)) == {os.getpid(): 1}
    (tmp_path / str(os.getpid()) / "fd" / str(other)).symlink_to("anon_inode:kvm-vm")
    (tmp_path / str(os.getpid()) / "fd" / str(more)).symlink_to("anon_inode:kvm-vm")
    assert vm_processes(str(tmp_path)) == {os.getpid(): 2}


def test_descriptors_of_one_vcpu_are_one(pipes: list[int], tmp_path: Path) -> None:
    one, again, other, _, _ = pipes
    descriptors(tmp_path, {one: "kvm-vcpu:0", again: "kvm-vcpu:0"})
    assert vm_processes(str(tmp_path)) == {os.getpid(): 0}
    (tmp_path / str(os.getpid()) / "fd" / str(other)).symlink_to("anon_inode:kvm-vcpu:0")
    assert vm_processes(str(tmp_path)) == {os.getpid(): 2}


def test_two_vms_without_a_second_vcpu_of_a_number_are_two(
    pipes: list[int], tmp_path: Path
) -> None:
    """The kernel compares descriptors, so vCPUs are not used to tell VMs apart."""
    one, again, other, _, _ = pipes
    descriptors(tmp_path, {one: "kvm-vm", again: "kvm-vm", other: "kvm-vm", 4000: "kvm-vcpu:0"})
    assert vm_processes(str(tmp_path)) == {os.getpid(): 2}


def test_descriptors_that_are_not_compared(proc: Proc, tmp_path: Path) -> None:
    """In another namespace a process of ours may have the same pid, but other descriptors."""
    vm = "anon_inode:kvm-vm"
    proc.add(1, fds=(vm, vm, vm, "anon_inode:kvm-vcpu:0", "anon_inode:kvm-vcpu:1"))
    proc.add(2, fds=(vm, vm, vm, "anon_inode:kvm-vcpu:0", "anon_inode:kvm-vcpu:0"))
    proc.add(os.getpid(), fds=(vm, vm, vm))
    (tmp_path / "self").symlink_to("1")
    assert vm_processes(str(tmp_path)) == {1: 1, 2: 2, os.getpid(): 3}


def test_descriptors_without_number_make_no_vms_without_number(
    pipes: list[int], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    one, again, other, third, more = pipes
    monkeypatch.setattr(identity, "_COMPARED", 3)
    descriptors(tmp_path, dict.fromkeys((one, again, other, third, more), "kvm-vm"))
    assert vm_processes(str(tmp_path))[os.getpid()] <= 2
    (tmp_path / "self").unlink()
    assert vm_processes(str(tmp_path)) == {os.getpid(): 3}


def test_no_proc_at_all(tmp_path: Path) -> None:
    assert vm_processes(str(tmp_path / "nothing")) == {}


def test_real_proc() -> None:
    me = identify(os.getpid())
    assert me.name
    assert me.vmm
    assert isinstance(vm_processes(), dict)


# -- clean


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("web-1", "web-1"),
        ("Ünïcode 名前 🐧", "Ünïcode 名前 🐧"),
        ("a\x1b[31mb", "a?[31mb"),
        ("a\x9bb\x7f", "a?b?"),
        ("two\nlines\r\n", "two?lines??"),
        ("\u202edesrever\u2066", "desrever"),
        ("zero\u200bwidth\ufeff\u00ad", "zerowidth"),
        ("blank\u3164\u115f", "blank"),
        ("  much   space\u00a0here ", "much space here"),
        ("\u0301mark first", "mark first"),
        ("z" + "\u0301" * 40, "z" + "\u0301" * 4),
        ("lone \ud800 surrogate", "lone ? surrogate"),
        ("line\u2028separator", "line?separator"),
        ("", ""),
    ],
)
def test_clean(text: str, expected: str) -> None:
    assert clean(text) == expected


def test_clean_bounds_the_length() -> None:
    assert clean("x" * NAME_LIMIT) == "x" * NAME_LIMIT
    assert clean("x" * 10_000_000) == "x" * (NAME_LIMIT - 1) + "…"
    assert clean("abcdef", limit=4) == "abc…"


HOSTILE = st.text(
    st.one_of(
        st.characters(),
        st.sampled_from("\x00\x1b\x9b\x7f\n\r\u202e\u2066\u200b\u200d\ufeff\u0301\ud800 \u3000"),
    ),
    max_size=400,
)


@given(HOSTILE, st.integers(1, 200))
def test_cleaned_text_cannot_move_or_hide(text: str, limit: int) -> None:
    cleaned = clean(text, limit)
    assert len(cleaned) <= limit
    for character in cleaned:
        assert unicodedata.category(character) not in {"Cc", "Cf", "Cs", "Co", "Cn", "Zl", "Zp"}
    assert cleaned == cleaned.strip()
    assert not cleaned or unicodedata.category(cleaned[0]) not in {"Mn", "Me"}
    cleaned.encode()  # surrogates would raise


@given(HOSTILE, st.integers(1, 200))
def test_cleaning_twice_changes_nothing(text: str, limit: int) -> None:
    assert clean(clean(text, limit), limit) == clean(text, limit)


@given(st.text(st.characters(min_codepoint=33, max_codepoint=126), max_size=NAME_LIMIT))
def test_plain_names_are_left_alone(text: str) -> None:
    assert clean(text) == text
