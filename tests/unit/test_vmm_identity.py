"""Names of VMs, from made-up processes."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from kvmtrace.sanitize import NAME_LIMIT
from kvmtrace.vmm.command_line import Options, options, program
from kvmtrace.vmm.identity import Identity, identify, vm_processes
from kvmtrace.vmm.paths import name_of_disk, name_of_path
from tests.unit.fake_proc import LIBVIRT, SANDBOX, UUID, Proc


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


def test_real_proc() -> None:
    me = identify(os.getpid())
    assert me.name
    assert me.vmm
    assert isinstance(vm_processes(), dict)
