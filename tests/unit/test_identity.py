"""Names of VMs, from processes that are made up here as directories."""

from __future__ import annotations

import os
import unicodedata
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from kvmtrace.identity import NAME_LIMIT, Identity, clean, holds_vm, identify, vm_processes

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
        return identify(pid, str(self.root))


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
    proc.add(2, fds=(vm, vcpu, vm, "/dev/kvm"))
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
