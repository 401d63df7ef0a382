"""Memory errors as the hardware or the firmware reported them: ``mc_event`` … → ``HwError``.

Fields are named as in include/ras/ras_event.h; what is missing, or declared not valid, is None.
"""

from __future__ import annotations

from typing import Any

from kvmtrace import kvm, sanitize
from kvmtrace.events import HwError
from kvmtrace.linux import cper
from kvmtrace.linux.smbios import Firmware
from kvmtrace.sources.ftrace.records import Record

PROBES = ("mc_event", "extlog", "apei", "arm_event", "non_standard")

_LAYERS = ("mc_index", "top_layer", "middle_layer", "lower_layer")


def error(record: Record, firmware: Firmware) -> HwError:
    """One report."""
    said = record.fields
    match record.probe:
        case "mc_event":
            told = cper.Edac(
                said["error_type"],
                said["address"],
                said["grain_bits"],
                said["error_count"],
                said.get("label", ""),
                said.get("msg", ""),
                tuple(said.get(layer, -1) for layer in _LAYERS) if _LAYERS[0] in said else (),
            )
            return _at(record, "ras:mc_event", **cper.edac(told, firmware.alike))
        case "extlog":
            section = cper.extlog(
                said["pa"], said["pa_mask_lsb"], said.get("etype", 0xFF), said.get("data", b"")
            )
            facts = cper.memory(section, firmware.dimms, said.get("fru_text"))
            severity = cper.CPER.get(said["sev"])
            return _at(record, "ras:extlog_mem_event", severity=severity, **facts)
        case "apei":
            section = cper.MemoryErrorSection(
                *(said.get(word, 0) for word in cper.MemoryErrorSection._fields)
            )
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
    return sanitize.clean(raw or "") or None
