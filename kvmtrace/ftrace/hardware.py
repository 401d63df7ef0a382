"""Memory errors as the hardware or the firmware reported them: ``mc_event`` … → ``HwError``.

Fields are named as in include/ras/ras_event.h; what is not told, or declared not valid, is None.
"""

from __future__ import annotations

from typing import Any

from kvmtrace import identity, kvm
from kvmtrace.events import HwError
from kvmtrace.ftrace.records import Record

# enum hw_event_mc_err_type (linux/edac.h), GHES_SEV_* (acpi/ghes.h), CPER_SEV_* (linux/cper.h)
_EDAC = {0: "corrected", 1: "recoverable", 2: "deferred", 3: "fatal"}
_GHES = {1: "corrected", 2: "recoverable", 3: "fatal"}
_CPER = {0: "recoverable", 1: "fatal", 2: "corrected"}

# Validation bits of a memory error section (linux/cper.h)
_PA_VALID = 1 << 1
_PA_MASK_VALID = 1 << 2
_NODE_VALID = 1 << 3

_NO_ADDRESS = (1 << 64) - 1  # extlog_mem_event, where the section has no address
_MAX_LSB = 63

PROBES = ("mc_event", "extlog", "apei", "arm_event", "non_standard")


def error(record: Record) -> HwError:
    """One report."""
    said = record.fields
    match record.probe:
        case "mc_event":
            addr = said["address"] & _NO_ADDRESS
            return _at(
                record,
                "ras:mc_event",
                addr,
                severity=_EDAC.get(said["error_type"]),
                grain=1 << said["grain_bits"] if said["grain_bits"] <= _MAX_LSB else None,
                count=said["error_count"],
                label=_text(said.get("label")),
                message=_text(said.get("msg")),
            )
        case "extlog":
            lsb = said["pa_mask_lsb"]
            return _at(
                record,
                "ras:extlog_mem_event",
                None if said["pa"] == _NO_ADDRESS else said["pa"],
                severity=_CPER.get(said["sev"]),
                grain=1 << lsb if lsb <= _MAX_LSB else None,
            )
        case "apei":
            valid, mask = said["valid"], said.get("mask", 0)
            return _at(
                record,
                "arch_apei_report_mem_error",
                said["addr"] if valid & _PA_VALID else None,
                severity=_GHES.get(said["sev"]),
                grain=mask & -mask if mask and valid & _PA_MASK_VALID else None,
                node=said.get("node") if valid & _NODE_VALID else None,
            )
        case "arm_event":
            return _at(record, "ras:arm_event", None)
    return _at(
        record,
        "ras:non_standard_event",
        None,
        severity=_CPER.get(said["sev"]),
        message=_text(said.get("fru_text")),
    )


def _at(record: Record, via: str, addr: int | None, **known: Any) -> HwError:
    pfn = None if addr is None else kvm.gfn_of(addr)
    return HwError(record.ts, via, addr=addr, pfn=pfn, **known)


def _text(raw: str | None) -> str | None:
    return identity.clean(raw or "") or None
