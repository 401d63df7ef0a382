"""Memory errors as the hardware or the firmware reported them: ``mc_event`` … → ``HwError``.

Fields are named as in include/ras/ras_event.h; what is not told, or declared not valid, is None.
"""

from __future__ import annotations

from typing import Any

from kvmtrace import cper, identity, kvm
from kvmtrace.events import HwError
from kvmtrace.firmware import Firmware
from kvmtrace.ftrace.records import Record

_NO_ADDRESS = (1 << 64) - 1  # extlog_mem_event, where the section has no address
_MAX_LSB = 63

PROBES = ("mc_event", "extlog", "apei", "arm_event", "non_standard")


def error(record: Record, firmware: Firmware) -> HwError:
    """One report."""
    said = record.fields
    match record.probe:
        case "mc_event":
            # EDAC has no word for "not known" but 0.
            addr = said["address"] & _NO_ADDRESS or None
            exact = addr is not None and said["grain_bits"] <= _MAX_LSB
            return _at(
                record,
                "ras:mc_event",
                addr=addr,
                severity=cper.EDAC.get(said["error_type"]),
                grain=1 << said["grain_bits"] if exact else None,
                count=said["error_count"],
                label=_text(said.get("label")),
                message=_text(said.get("msg")),
            )
        case "extlog":
            lsb = said["pa_mask_lsb"]
            return _at(
                record,
                "ras:extlog_mem_event",
                addr=None if said["pa"] == _NO_ADDRESS else said["pa"],
                severity=cper.CPER.get(said["sev"]),
                grain=1 << lsb if lsb <= _MAX_LSB else None,
            )
        case "apei":
            section = cper.Memory(*(said.get(word, 0) for word in cper.Memory._fields))
            facts = cper.memory(section, firmware.dimms)
            return _at(record, "GHES", severity=cper.GHES.get(said["sev"]), **facts)
        case "arm_event":
            return _at(
                record,
                "ras:arm_event",
                addr=cper.arm_address(said.get("pei_buf", b"")),
                severity=cper.GHES.get(said.get("sev", -1)),
            )
    return _at(
        record,
        "ras:non_standard_event",
        severity=firmware.non_standard.get(said["sev"]),
        message=_text(said.get("fru_text")),
    )


def _at(record: Record, via: str, *, addr: int | None = None, **known: Any) -> HwError:
    pfn = None if addr is None else kvm.gfn_of(addr)
    return HwError(record.ts, via, addr=addr, pfn=pfn, **known)


def _text(raw: str | None) -> str | None:
    return identity.clean(raw or "") or None
