"""What a host offers, read from made-up files in the kernel's own formats."""

from __future__ import annotations

import gzip
import json
import sys
from pathlib import Path

import pytest

from kvmtrace.linux import host, kallsyms
from kvmtrace.linux.tracefs import mount
from tests.unit.test_btf import blob, member, struct

# As the kernels print it (Debian 6.18), shortened to three types.
FORMAT = """\
name: memory_failure_event
ID: 158
format:
\tfield:unsigned short common_type;\toffset:0;\tsize:2;\tsigned:0;

\tfield:unsigned long pfn;\toffset:8;\tsize:8;\tsigned:0;
\tfield:int type;\toffset:16;\tsize:4;\tsigned:1;
\tfield:int result;\toffset:20;\tsize:4;\tsigned:1;

print fmt: "pfn %#lx: recovery action for %s: %s", REC->pfn, __print_symbolic(REC->type, \
{ 0, "reserved kernel page" }, { 1, "high-order kernel page" }, { 0x0b, "dirty LRU page" }, \
{ MF_MSG_NEW, "left by name" }, { 12, "odd \\"quoted\\" (page), {x}" }), \
__print_symbolic(REC->result, { 0, "Ignored" }, { 1, "Failed" }, { 2, "Delayed" }, \
{ 3, "Recovered" })
"""
README = """\
tracing mini-HOWTO:
  kprobe_events\t\t- Create/append/remove/show the kernel dynamic events
\t  Format: p[:[<group>/][<event>]] <place> [<args>]
{fprobe}
"""
FPROBE = "\t          f[:[<group>/][<event>]] <func-name>[%return] [<args>]"


@pytest.fixture
def tracefs(tmp_path: Path) -> Path:
    event = tmp_path / "events" / "ras" / "memory_failure_event"
    event.mkdir(parents=True)
    (event / "format").write_text(FORMAT)
    (tmp_path / "README").write_text(README.format(fprobe=FPROBE))
    (tmp_path / "dynamic_events").write_text("")
    return tmp_path


def test_memory_failure_names(tracefs: Path) -> None:
    types, results = mount.memory_failure_names(str(tracefs))
    assert types[0] == "reserved kernel page"
    assert types[11] == "dirty LRU page"
    assert types[12].endswith("(page), {x}")
    assert "left by name" not in types.values()
    assert results == {0: "Ignored", 1: "Failed", 2: "Delayed", 3: "Recovered"}


def test_memory_failure_names_where_the_event_has_a_system_of_its_own(tracefs: Path) -> None:
    """Linux 6.19 to 7.1."""
    (tracefs / "events" / "ras").rename(tracefs / "events" / "memory_failure")
    types, results = mount.memory_failure_names(str(tracefs))
    assert types[11] == "dirty LRU page"
    assert results[3] == "Recovered"


@pytest.mark.parametrize("text", ["", "print fmt:", 'print fmt: "%d", REC->type', "\0" * 100])
def test_format_without_tables(text: str) -> None:
    assert mount.symbolic_tables(text) == {}


def test_no_tracefs(tmp_path: Path) -> None:
    assert mount.memory_failure_names(str(tmp_path)) == ({}, {})
    assert mount.tracing((str(tmp_path),)) is None


def test_tracing(tracefs: Path, tmp_path_factory: pytest.TempPathFactory) -> None:
    found = mount.tracing(("/nonexistent", str(tracefs)))
    assert found == mount.Tracefs(str(tracefs), True, True, True)
    (tracefs / "README").write_text(README.format(fprobe=""))
    (tracefs / "dynamic_events").unlink()
    assert mount.tracing((str(tracefs),)) == mount.Tracefs(str(tracefs), True, False, False)
    (tracefs / "README").write_text("")
    lockdown = mount.tracing((str(tracefs),))
    assert lockdown is not None
    assert not lockdown.readable


@pytest.mark.parametrize(
    ("capabilities", "may"),
    [
        (0, False),
        (1 << host.CAP_SYS_ADMIN, True),
        (1 << host.CAP_BPF, False),
        (1 << host.CAP_BPF | 1 << host.CAP_PERFMON, True),
    ],
)
def test_privilege(tmp_path: Path, capabilities: int, may: bool) -> None:
    status = tmp_path / "status"
    status.write_text(f"Name:\tx\nCapPrm:\tffff\nCapEff:\t{capabilities:016x}\nCapBnd:\tffff\n")
    assert host.privilege(str(status)).may_trace is may
    assert not host.privilege(str(tmp_path / "none")).may_trace


@pytest.mark.parametrize(
    ("text", "mode"),
    [
        ("[none] integrity confidentiality\n", "none"),
        ("none integrity [confidentiality]\n", "confidentiality"),
        ("", None),
    ],
)
def test_lockdown(tmp_path: Path, text: str, mode: str | None) -> None:
    (tmp_path / "lockdown").write_text(text)
    assert host.lockdown(str(tmp_path / "lockdown")) == mode
    assert host.lockdown(str(tmp_path / "none")) is None


KVM_RUN = [struct("kvm_run", member("exit_reason", 64), member("memory_fault", 256))]

KALLSYMS = """\
ffffffff81000000 T _stext
ffffffff81234560 T send_sig_mceerr
ffffffff81234570 t __pfx_send_sig_mceerr
ffffffffc0a00010 T kvm_destroy_vm\t[kvm]
ffffffffc0a00020 t kvm_mmu_faultin_pfn\t[kvm]
ffffffffc0a00030 d kvm_gmem_get_pfn\t[kvm]
ffffffffc0a00040 t kvm_faultin_pfn.isra.0\t[kvm]
"""


def test_symbols(tmp_path: Path) -> None:
    path = tmp_path / "kallsyms"
    path.write_text(KALLSYMS)
    names = kallsyms.functions("x86_64")
    found = kallsyms.symbols(names, str(path))
    expected = {"send_sig_mceerr": "", "kvm_destroy_vm": "kvm", "kvm_mmu_faultin_pfn": "kvm"}
    assert found == kallsyms.Symbols(expected, hidden=False)
    path.write_text("\n".join("0" * 16 + line[16:] for line in KALLSYMS.splitlines()))
    assert kallsyms.symbols(names, str(path)) == kallsyms.Symbols(expected, hidden=True)
    assert kallsyms.symbols(names, str(tmp_path / "none")) is None


def test_kvm(tmp_path: Path) -> None:
    modules, device = tmp_path / "module", tmp_path / "kvm"
    assert host.kvm(str(modules), str(device)) == host.Kvm(False, None, False)
    (modules / "kvm").mkdir(parents=True)
    (modules / "kvm_amd").mkdir()
    assert host.kvm(str(modules), str(device)) == host.Kvm(True, "kvm_amd", False)
    device.write_text("no device at all")
    assert host.kvm(str(modules), str(device)) == host.Kvm(True, "kvm_amd", True, None)


@pytest.mark.parametrize(
    ("vmlinux", "kvm", "has_exit"),
    [
        ([], None, None),
        ([], KVM_RUN, True),
        ([], [struct("kvm_run", member("hwpoison", 0))], False),
        (KVM_RUN, None, True),  # built in
        (KVM_RUN, [], True),
        ([struct("task_struct", member("memory_fault", 0))], None, None),
    ],
)
def test_memory_fault_exit(
    tmp_path: Path, vmlinux: list[bytes], kvm: list[bytes] | None, has_exit: bool | None
) -> None:
    (tmp_path / "vmlinux").write_bytes(blob(*vmlinux))
    if kvm is not None:
        (tmp_path / "kvm").write_bytes(blob(*kvm, strings=b""))
    assert host.types(str(tmp_path)) == host.Types(True, kvm is not None, has_exit)


def test_memory_fault_exit_is_unknown_without_types(tmp_path: Path) -> None:
    (tmp_path / "vmlinux").write_bytes(b"")
    assert host.types(str(tmp_path)) == host.Types(True, False, None)


def test_no_btf(tmp_path: Path) -> None:
    assert host.types(str(tmp_path)) == host.Types(False, False, None)


def ask(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, module: str | None) -> host.Bcc:
    if module is not None:
        (tmp_path / "bcc.py").write_text(module)
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    return host.bcc(sys.executable, distribution=(str(tmp_path / "dist-packages"),))


def test_bcc_that_works(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert ask(tmp_path, monkeypatch, "BPF = 1\n__version__ = '0.31.0'") == host.Bcc("0.31.0")


def test_bcc_that_is_another_project(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    found = ask(tmp_path, monkeypatch, "class Lattice: ...")
    assert found.version is None
    assert "another project" in found.why
    assert "python3-bpfcc" in found.fix


def test_bcc_without_its_library(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    found = ask(tmp_path, monkeypatch, "raise OSError('libbcc.so.0: no such file')")
    assert found.why == "does not load"
    assert found.detail == "OSError: libbcc.so.0: no such file"


def test_bcc_that_prints(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert ask(tmp_path, monkeypatch, "print('hello')\nBPF = 1").why.startswith("asking for it")


@pytest.mark.parametrize(
    ("where", "why", "fix"),
    [
        ("lib/python3/dist-packages", "out of this Python's sight", "--system-site-packages"),
        ("lib/python3.13/site-packages", "out of this Python's sight", "--system-site-packages"),
        ("lib64/python3.14/site-packages", "out of this Python's sight", "--system-site-packages"),
        ("lib/python3.9/site-packages", "too old for kvmtrace", "--source ftrace"),
        ("lib/python2.7/site-packages", "not installed", "python3-bpfcc"),
        ("share/bcc", "not installed", "python3-bpfcc"),
    ],
)
def test_bcc_of_every_distribution(tmp_path: Path, where: str, why: str, fix: str) -> None:
    (tmp_path / where / "bcc").mkdir(parents=True)
    (usual,) = host._DISTRIBUTION
    assert usual.startswith("/usr/")
    found = host.bcc_not_found((f"{tmp_path}/{usual.removeprefix('/usr/')}",))
    assert found.version is None
    assert why in found.why
    assert fix in found.fix


def test_bcc_out_of_sight(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "dist-packages").mkdir()
    # A module of this name that cannot be found, whatever this machine has.
    hidden = "raise ModuleNotFoundError(\"No module named 'bcc'\")"
    assert "--system-site-packages" in ask(tmp_path, monkeypatch, hidden).fix


def test_the_running_collector_of_corrected_errors_counts(tmp_path: Path) -> None:
    """Not the configuration: it may be compiled in and disabled."""
    (tmp_path / "ras").mkdir()
    assert host.corrected_errors_collector(str(tmp_path)) is False
    (tmp_path / "ras/cec").mkdir()
    assert host.corrected_errors_collector(str(tmp_path)) is True


def test_kernel_option(tmp_path: Path) -> None:
    (tmp_path / "config-6.18").write_text("CONFIG_RAS_CEC=y\n# CONFIG_X is not set\nCONFIG_KVM=m\n")
    options = [
        host.kernel_option(f"CONFIG_{name}", "6.18", str(tmp_path))
        for name in ("RAS_CEC", "X", "KVM")
    ]
    assert options == ["y", "n", "m"]
    config = tmp_path / "config.gz"
    config.write_bytes(gzip.compress(b"CONFIG_RAS_CEC=y\n"))
    assert host.kernel_option("CONFIG_RAS_CEC", "x", "/nowhere", str(config)) == "y"
    assert host.kernel_option("CONFIG_RAS_CEC", "x", "/nowhere", "/nowhere") is None


def test_this_host_can_be_examined() -> None:
    assert host.examine().kernel


def test_number_and_fields_of_a_recorded_event() -> None:
    recorded = Path(__file__).parent.parent / "recordings" / "ftrace" / "7.3.4-amd64.json"
    text = json.loads(recorded.read_text())["formats"]["poison"]
    assert f"ID: {mount.event_id(text)}\n" in text
    places = mount.field_places(text)
    assert (places["common_pid"], places["pfn"], places["result"]) == ((4, 4), (8, 8), (20, 4))
    assert (mount.event_id(""), mount.field_places("")) == (None, {})
    assert mount.event_id("ID: many\n") is None
    assert mount.field_places("\tfield:int errno;\toffset:x;\tsize:4;\n") == {}
