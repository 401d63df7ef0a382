"""Reports of hardware and firmware, as their tracepoints give them."""

from __future__ import annotations

import struct
from pathlib import Path
from typing import Any

import pytest

from kvmtrace.events import HwError
from kvmtrace.linux import cper, smbios
from kvmtrace.linux.smbios import Firmware
from kvmtrace.sources.ftrace import hardware
from kvmtrace.sources.ftrace.records import Record

NONE = (1 << 64) - 1
FIRMWARE = Firmware({0x1100: "BANK 0 DIMM 3"}, cper.GHES)


def error(probe: str, **fields: Any) -> HwError:
    return hardware.error(Record(7, probe, {"common_pid": 1} | fields), FIRMWARE)


def test_edac_names_the_dimm() -> None:
    told = error(
        "mc_event",
        error_type=0,
        msg="memory read error",
        label="CPU_SrcID#0_DIMM#1\x1b[2J",
        error_count=3,
        address=0x12345678,
        grain_bits=6,
    )
    assert told.label is not None
    assert told.label.startswith("CPU_SrcID#0_DIMM#1")
    assert "\x1b" not in told.label
    assert (told.via, told.severity, told.count) == ("ras:mc_event", "corrected", 3)
    assert (told.addr, told.pfn, told.grain) == (0x12345678, 0x12345, 64)
    assert told.message == "memory read error"


def test_edac_knows_no_address_but_0() -> None:
    told = error(
        "mc_event", error_type=1, msg="", label="any", error_count=1, address=0, grain_bits=0
    )
    assert (told.addr, told.pfn, told.grain, told.label) == (None, None, None, "any")


@pytest.mark.parametrize(
    ("pa", "lsb", "addr", "grain"), [(0x5000, 12, 0x5000, 4096), (NONE, 255, None, None)]
)
def test_extlog(pa: int, lsb: int, addr: int | None, grain: int | None) -> None:
    told = error("extlog", sev=1, pa=pa, pa_mask_lsb=lsb)
    assert (told.severity, told.addr, told.grain) == ("fatal", addr, grain)
    assert told.pfn == (None if addr is None else addr >> 12)


def test_only_fields_that_firmware_declares_valid_are_used() -> None:
    # Node 1, card 2, module 3, bank 4; multi-bit ECC, rank 5, handle 0x1100
    place, kind = 0x0004_0003_0002_0001, 0x1100_0000_0005_0003
    said = {"sev": 2, "addr": 0x7000, "mask": 0xFFFFFFFFFFFFF000, "place": place, "kind": kind}
    told = error("apei", valid=(1 << 18) - 1, **said)
    assert (told.severity, told.addr, told.grain, told.node) == ("recoverable", 0x7000, 4096, 1)
    assert told.via == "GHES"
    assert told.label == "BANK 0 DIMM 3"
    assert told.message == "multi-bit ECC, card 2, module 3, bank 4, rank 5"
    assert error("apei", valid=0, **said) == HwError(7, "GHES", severity="recoverable")
    stranger = error("apei", valid=1 << 17, **(said | {"kind": 0x1234 << 48}))
    assert (stranger.label, stranger.message) == (
        None,
        "SMBIOS handle 0x1234, which names no DIMM",
    )


def info(valid: int, addr: int, kind: int = 1 << 1) -> bytes:
    """struct cper_arm_err_info: a cache error."""
    return struct.pack("<BBHBHBQQQ", 0, 32, valid, kind, 0, 0, 0, 0, addr)


def test_of_an_arm_processor_error_the_first_physical_address_is_taken() -> None:
    told = error("arm_event", sev=2, pei_buf=info(0, 0x1000) + info(1 << 4, 0x5040))
    assert (told.severity, told.addr, told.pfn) == ("recoverable", 0x5040, 5)
    assert error("arm_event", mpidr=1) == HwError(7, "ras:arm_event")  # before 7.0: no more fields
    tlb, bus = info(1 << 4, 0x1000, 1 << 2), info(1 << 4, 0x2000, 1 << 3)
    assert error("arm_event", sev=2, pei_buf=tlb + bus + info(1 << 4, 0x5040)).addr == 0x5040
    assert error("arm_event", sev=2, pei_buf=tlb + bus).addr == 0x1000
    cut = error("arm_event", sev=3, pei_buf=info(1 << 4, 0x5040)[:-1])
    assert (cut.severity, cut.addr) == ("fatal", None)


def test_sections_in_vendors_own_formats() -> None:
    told = error("non_standard", sev=2, fru_text="")
    assert (told.severity, told.message) == ("recoverable", None)


def table(*structures: tuple[int, int, bytes, list[str]]) -> bytes:
    """An SMBIOS table of (type, handle, fields, strings)."""
    out = b""
    for kind, handle, fields, strings in structures:
        out += struct.pack("<BBH", kind, 4 + len(fields), handle) + fields
        out += b"".join(one.encode() + b"\0" for one in strings) + (b"" if strings else b"\0")
        out += b"\0"
    return out


def test_dimms_have_the_names_that_firmware_gives_them(tmp_path: Path) -> None:
    device = bytes(12) + b"\x01\x02" + bytes(4)
    content = table(
        (0, 1, bytes(20), ["vendor"]),
        (17, 0x1100, device, ["DIMM 3", "BANK 0"]),
        (17, 0x1101, device, ["A1\x1b[2J"]),
        (17, 0x1102, bytes(18), []),
        (127, 2, b"", []),
    )
    where = tmp_path / "firmware/dmi/tables"
    where.mkdir(parents=True)
    (where / "DMI").write_bytes(content)
    labels = smbios.read(str(tmp_path)).dimms
    assert labels[0x1100] == "BANK 0 DIMM 3"
    assert labels[0x1101].startswith("A1")
    assert "\x1b" not in labels[0x1101]
    assert set(labels) == {0x1100, 0x1101}
    (where / "DMI").write_bytes(content[:60])  # cut off: what is whole counts
    assert set(smbios.read(str(tmp_path)).dimms) <= {0x1100}


def test_severities_mean_something_only_if_it_is_known_who_reports(tmp_path: Path) -> None:
    assert smbios.read(str(tmp_path)).non_standard[2] == "recoverable"
    (tmp_path / "module/acpi_extlog").mkdir(parents=True)
    assert smbios.read(str(tmp_path)).non_standard == {}
