"""Names of VMs whose VMM was started by libvirt, Proxmox, OpenStack, Kubernetes and the like."""

from __future__ import annotations

import pytest

from kvmtrace.vmm.identity import Identity
from tests.unit.fake_proc import QEMU, SANDBOX, UUID, Proc

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
