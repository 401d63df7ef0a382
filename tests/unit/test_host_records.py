"""What a bundle has of the host itself: DIMMs, EDAC, the kernel's log and settings."""

from __future__ import annotations

import ctypes
import json
import struct
import subprocess
import sys
from pathlib import Path

import pytest

from kvmtrace import sources
from kvmtrace.events import Host
from kvmtrace.linux import edac, kernel_log, memory_failure, page_flags, smbios
from kvmtrace.linux.edac import EdacCount
from kvmtrace.linux.smbios import MemoryDevice
from kvmtrace.views.host_files import HostRecords, host_files
from kvmtrace.views.redaction import Redaction
from tests.unit.command_line import invoke
from tests.unit.fake import STORY, FakeSource
from tests.unit.test_explain import unpacked


def device(handle: int, *strings: str, size: int = 0x7FFF, extended: int = 32 << 10) -> bytes:
    """A Memory Device of SMBIOS with device, bank, manufacturer, serial, asset and part."""
    # From 0x04: handles, widths; 0x0C size, form, set, 0x10 names, type, detail, 0x15 speed,
    # 0x17 strings, 0x1B attributes, 0x1C extended size.
    fields = struct.pack("<4HHBB2BBHH", 0, 0, 64, 64, size, 9, 0, 1, 2, 0x1A, 0, 3200)
    fields += struct.pack("<4BBI", 3, 4, 5, 6, 0, extended)
    head = struct.pack("<BBH", 17, 4 + len(fields), handle)
    return head + fields + b"".join(one.encode() + b"\0" for one in strings) + b"\0"


def test_installed_dimms_have_their_numbers(tmp_path: Path) -> None:
    table = tmp_path / "DMI"
    table.write_bytes(
        device(0x1100, "A1", "BANK 0", "Samsung", "S4E5R6I7AL", "-", "M393A4K40DB3-CWE ")
        + device(0x1101, "A2", "BANK 0", "Unknown", "00000000", "-", "Not Specified", size=0xC000)
        + device(0x1102, "A3", "BANK 0", "NO DIMM", "NO DIMM", "-", "NO DIMM", size=0)
        + device(0x1103, "A4", "BANK 1", "Micron", "x\x1b[31m7", "-", "p", size=0xFFFF)
    )
    part = "M393A4K40DB3-CWE"
    assert smbios.memory_devices(str(table)) == (
        MemoryDevice(0x1100, "BANK 0 A1", "Samsung", part, "S4E5R6I7AL", 32 << 30, 3200),
        MemoryDevice(0x1101, "BANK 0 A2", None, None, None, 16 << 20, 3200),
        MemoryDevice(0x1103, "BANK 1 A4", "Micron", None, "x?[31m7", None, 3200),
    )
    assert smbios.memory_devices(str(tmp_path / "none")) is None


def test_edac_counts(tmp_path: Path) -> None:
    root = tmp_path / "devices/system/edac/mc"
    for path, text in {
        "mc0/mc_name": "Skylake Socket#0\n",
        "mc0/ce_count": "37\n",
        "mc0/ue_count": "1\n",
        "mc0/dimm10/dimm_label": "A10\n",
        "mc0/dimm10/dimm_ce_count": "0\n",
        "mc0/dimm2/dimm_label": "A2\n",
        "mc0/dimm2/dimm_ce_count": "37\n",
        "mc0/dimm2/dimm_ue_count": "many\n",
        "mc0/dimm2/dimm_location": "channel 0 slot 1\n",
        "mc0/power/x": "",
    }.items():
        (root / path).parent.mkdir(parents=True, exist_ok=True)
        (root / path).write_text(text)
    assert edac.counts(str(tmp_path)) == (
        EdacCount("mc0", "Skylake Socket#0", 37, 1),
        EdacCount("mc0/dimm2", "A2", 37, None, "channel 0 slot 1"),
        EdacCount("mc0/dimm10", "A10", 0, None),
    )
    assert edac.counts(str(tmp_path / "none")) == ()


KMSG = [
    b"4,339,5140900,-;Memory failure: 0x103275: recovery action for dirty LRU page: Recovered\n",
    b"6,340,5140901,-;EXT4-fs (sda1): mounted\n SUBSYSTEM=x\n",
    b"3,341,65140902,-;mce: [Hardware Error]: Machine check events logged\n DEVICE=+x\n",
    b"30,342,65140903,-;mcelog[1]: hardware error, by a program\n",
    b"nonsense about poison\n",
    b"4,343,x,-;poison\n",
    b"4,344,75140904,-;EDAC MC0: 1 CE \x1b[2Jon A1\n",
]


def test_the_kernels_own_lines_about_memory(tmp_path: Path) -> None:
    assert kernel_log._about_memory(kernel_log.of_kmsg(KMSG)) == [
        "[    5.140900] Memory failure: 0x103275: recovery action for dirty LRU page: Recovered",
        "[   65.140902] mce: [Hardware Error]: Machine check events logged",
        "[   75.140904] EDAC MC0: 1 CE ?[2Jon A1",
    ]
    syslog = (
        b"<4>[    5.140900] Memory failure: x\n<30>[ 6.0] mce: a program\n<6>[    7.5] ok\njunk"
    )
    assert kernel_log._about_memory(kernel_log.of_syslog(syslog)) == [
        "[    5.140900] Memory failure: x"
    ]


def test_the_last_lines_are_kept() -> None:
    lines = (b"4,1,%d000000,-;mce: %d\n" % (n, n) for n in range(3 * kernel_log.MAX_LINES))
    kept = kernel_log._about_memory(kernel_log.of_kmsg(lines))
    assert len(kept) == kernel_log.MAX_LINES
    assert kept[-1].endswith(f"mce: {3 * kernel_log.MAX_LINES - 1}")


def test_settings_and_counts_of_the_kernel(tmp_path: Path) -> None:
    vm = tmp_path / "vm"
    vm.mkdir()
    for name, text in {
        "memory_failure_early_kill": "0\n",
        "memory_failure_recovery": "1\n",
        "enable_soft_offline": "1\n",
        "panic_on_unrecoverable_memory_failure": "no\n",
        "swappiness": "60\n",
    }.items():
        (vm / name).write_text(text)
    assert memory_failure.settings(str(vm)) == {
        "memory_failure_early_kill": 0,
        "memory_failure_recovery": 1,
        "enable_soft_offline": 1,
    }
    node = tmp_path / "devices/system/node/node1/memory_failure"
    node.mkdir(parents=True)
    (node / "total").write_text("3\n")
    assert page_flags.failures_by_node(str(tmp_path)) == {"node1": {"total": 3}}


ASKS = """
import ctypes, sys
ctypes.CDLL(None).prctl(33, 1, int(sys.argv[1]), 0, 0)
print("asked", flush=True)
sys.stdin.read()
"""


@pytest.mark.parametrize(("policy", "wish"), [(0, "late"), (1, "early"), (2, None)])
def test_what_a_process_asked_for(policy: int, wish: str | None) -> None:
    """prctl(2), PR_MCE_KILL_SET: LATE, EARLY, DEFAULT, as the kernel shows it."""
    process = subprocess.Popen(
        [sys.executable, "-c", ASKS, str(policy)], stdin=subprocess.PIPE, stdout=subprocess.PIPE
    )
    assert process.stdout is not None
    assert process.stdin is not None
    process.stdout.readline()
    got = ctypes.CDLL(None).prctl(34, 0, 0, 0, 0)
    if got < 0:
        pytest.skip("no PR_MCE_KILL here")
    assert memory_failure.wishes(process.pid) == {wish}
    process.stdin.close()
    process.stdout.close()
    process.wait()
    assert memory_failure.wishes(process.pid) == frozenset()


@pytest.mark.parametrize(
    ("wished", "by_default", "early"),
    [
        ({"early"}, 0, True),
        ({"early", None}, 0, True),
        ({"late", "early"}, None, True),
        ({None}, 1, True),
        ({None}, 0, False),
        ({None}, None, None),
        ({"late", None}, 1, True),
        ({"late"}, 1, False),
        (set(), 1, None),
    ],
)
def test_who_is_notified_early(
    wished: set[str | None], by_default: int | None, early: bool | None
) -> None:
    settings = {} if by_default is None else {"memory_failure_early_kill": by_default}
    assert memory_failure.is_notified_early(wished, settings) is early


def test_names_with_brackets_do_not_shift_the_flags() -> None:
    assert memory_failure.flags_of("1 (a) b) 9 (c) S 1 2 3 4 5 134217856 7 8") == 0x08000080
    assert memory_failure.flags_of("1 (a") is None
    assert memory_failure.flags_of("") is None


SERIAL = "S4E5R6I7AL"
RECORDS = HostRecords(
    "BOOT_IMAGE=/vmlinuz root=UUID=1234 ip=10.0.0.1::acme hugepages=64 mce=dont_log_ce kvm.x=1",
    {"memory_failure_recovery": 1},
    {"node0": {"total": 3}},
    (MemoryDevice(0x1100, "A1", "Samsung", "M393", SERIAL, 32 << 30, 3200),),
    (EdacCount("mc0/dimm0", f"A1 {SERIAL.lower()}", 3, None),),
    (
        "[1.0] Memory failure: 0x103275: Sending SIGBUS to web-1:4001 due to hardware memory",
        "[2.0] Memory failure: 0x103275: Sending SIGBUS to acme:1 b:77 due to hardware memory",
        "[3.0] MCE: Killing qemu-system-x86:4001 due to hardware memory corruption fault at 7f",
        "[4.0] mce: [Hardware Error]: CPU 3 of sick.acme.example, web-1",
        "[5.0] CPU: 3 PID: 7 Comm: billing Not tainted 6.18 hwpoison",
    ),
)


def test_host_files() -> None:
    files = host_files(RECORDS, None)
    (dimm,) = json.loads(files["hardware.json"])["dimms"]
    assert (dimm["part_number"], dimm["serial_number"]) == ("M393", SERIAL)
    kernel = json.loads(files["kernel.json"])
    assert kernel["command_line"] == RECORDS.command_line
    assert kernel["sysctls"] == {"vm.memory_failure_recovery": 1}
    assert files["dmesg.txt"].splitlines() == list(RECORDS.kernel_log or ())


def test_redacted_host_files_name_nobody() -> None:
    names = Redaction(STORY, Host("sick.acme.example", "6.18.15", "bpf"), [SERIAL])
    files = host_files(RECORDS, names)
    text = "".join(files.values())
    for name in ("web-1", "acme", "sick", "billing", SERIAL, SERIAL.lower(), "1234", "10.0.0.1"):
        assert name not in text
    assert '"serial_number": "serial-1"' in text
    assert '"name": "A1 serial-1"' in text
    assert '"part_number": "M393"' in text
    kernel = json.loads(files["kernel.json"])
    assert kernel["command_line"] == "hugepages=64 mce=dont_log_ce kvm.x=1"
    assert kernel["left_out"] == 3
    assert "Sending SIGBUS to vm-1:4001 due" in text
    assert "Killing qemu-system-x86:4001 due" in text


def test_a_log_that_cannot_be_read_is_no_empty_log() -> None:
    refused = HostRecords(None, {}, {}, (), (), None, "Operation not permitted")
    assert "could not be read: Operation not permitted" in host_files(refused, None)["dmesg.txt"]
    empty = HostRecords(None, {}, {}, None, (), ())
    assert "dimms" not in json.loads(host_files(empty, None)["hardware.json"])
    assert "nothing about memory errors" in host_files(empty, None)["dmesg.txt"]


@pytest.mark.parametrize("redact", [(), ("--redact",)])
def test_a_bundle_of_this_host_has_them(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, redact: tuple[str, ...]
) -> None:
    monkeypatch.setattr(sources, "open_source", lambda kind: FakeSource(STORY))
    # The package has the command by that name.
    monkeypatch.setattr(sys.modules["kvmtrace.cli.bundle"], "_host_records", lambda: RECORDS)
    path = tmp_path / "case.tar.gz"
    result = invoke("bundle", "-o", str(path), *redact, "--duration", "0.2")
    assert result.exit_code == 0, result.stderr
    files = unpacked(path)
    assert set(files) >= {"hardware.json", "kernel.json", "dmesg.txt", "doctor.txt"}
    named = [name for name in ("web-1", SERIAL) if any(name in one for one in files.values())]
    assert named == ([] if redact else ["web-1", SERIAL])
