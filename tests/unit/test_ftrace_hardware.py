"""Reports of hardware and firmware, as their tracepoints give them."""

from __future__ import annotations

from typing import Any

import pytest

from kvmtrace.events import HwError
from kvmtrace.ftrace import hardware
from kvmtrace.ftrace.records import Record

NONE = (1 << 64) - 1


def error(probe: str, **fields: Any) -> HwError:
    return hardware.error(Record(7, probe, {"common_pid": 1} | fields))


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


@pytest.mark.parametrize(
    ("pa", "lsb", "addr", "grain"), [(0x5000, 12, 0x5000, 4096), (NONE, 255, None, None)]
)
def test_extlog(pa: int, lsb: int, addr: int | None, grain: int | None) -> None:
    told = error("extlog", sev=1, pa=pa, pa_mask_lsb=lsb)
    assert (told.severity, told.addr, told.grain) == ("fatal", addr, grain)
    assert told.pfn == (None if addr is None else addr >> 12)


def test_firmware_says_what_is_valid() -> None:
    said = {"sev": 2, "addr": 0x7000, "mask": 0xFFFFFFFFFFFFF000, "node": 1}
    told = error("apei", valid=0b1110, **said)
    assert (told.severity, told.addr, told.grain, told.node) == ("recoverable", 0x7000, 4096, 1)
    told = error("apei", valid=0, **said)
    assert (told.addr, told.pfn, told.grain, told.node) == (None, None, None, None)


def test_reports_without_an_address() -> None:
    assert error("arm_event", mpidr=1) == HwError(7, "ras:arm_event")
    told = error("non_standard", sev=2, fru_text="")
    assert (told.severity, told.message) == ("corrected", None)
