"""Memory errors reported by hardware or firmware: ``mce`` → ``Mce``, all others → ``HwError``.

Fields have the names of include/ras/ras_event.h. A value that is missing, or declared not valid, is
None.
"""

from __future__ import annotations

from typing import Any

from kvmtrace import kvm, sanitize
from kvmtrace.events import Event, HwError, Mce
from kvmtrace.linux import cper, mce
from kvmtrace.linux.smbios import Firmware
from kvmtrace.sources.ftrace.fields import ProbeRequest, needed, optional
from kvmtrace.sources.ftrace.records import Record

_LAYERS = ("mc_index", "top_layer", "middle_layer", "lower_layer")


def _section(word: str) -> tuple[str, ...]:
    """A word of a memory error section, which is as UEFI lays it out on every kernel."""
    return tuple(f"+{cper.MEMORY_WORDS[word]}({at}):x64" for at in ("mem_err", "$arg2"))


PROBES = {
    "mce": ProbeRequest("poison"),
    "mc_event": ProbeRequest("poison"),
    "extlog": ProbeRequest("poison"),
    # drivers/acpi/apei/ghes.c
    "apei": ProbeRequest(
        "poison",
        (
            needed("sev", "sev", "$arg1:s32"),
            needed("valid", *_section("valid")),
            needed("addr", *_section("addr")),
            optional("mask", *_section("mask")),
            optional("place", *_section("place")),
            optional("kind", *_section("kind")),
        ),
    ),
    "arm_event": ProbeRequest("poison"),
    "non_standard": ProbeRequest("poison"),
}


def machine_check(record: Record) -> Event:
    """A machine check. ``enrich`` decides whether the address is physical, as CPUs differ."""
    fields = record.fields
    status = fields["status"]
    addr = fields["addr"] if status & mce.ADDRV else None
    return Mce(
        record.ts,
        addr,
        None if addr is None else addr >> kvm.PAGE_SHIFT,
        fields["bank"],
        fields["cpu"],
        fields["socketid"],
        status,
        fields.get("misc"),
        ipid=fields.get("ipid") or None,
        fru=mce.fru_text(status, fields.get("v_data", b"")),
    )


def error(record: Record, firmware: Firmware) -> HwError:
    """A memory error of any other probe. ``firmware``: names of DIMMs."""
    fields = record.fields
    match record.probe:
        case "mc_event":
            report = cper.Edac(
                fields["error_type"],
                fields["address"],
                fields["grain_bits"],
                fields["error_count"],
                fields.get("label", ""),
                fields.get("msg", ""),
                tuple(fields.get(layer, -1) for layer in _LAYERS) if _LAYERS[0] in fields else (),
            )
            return _at(record, "ras:mc_event", **cper.edac(report, firmware.alike))
        case "extlog":
            section = cper.extlog(
                fields["pa"],
                fields["pa_mask_lsb"],
                fields.get("etype", 0xFF),
                fields.get("data", b""),
            )
            facts = cper.memory(section, firmware.dimms, fields.get("fru_text"))
            severity = cper.CPER.get(fields["sev"])
            return _at(record, "ras:extlog_mem_event", severity=severity, **facts)
        case "apei":
            section = cper.MemoryErrorSection(
                *(fields.get(word, 0) for word in cper.MemoryErrorSection._fields)
            )
            facts = cper.memory(section, firmware.dimms)
            return _at(record, "GHES", severity=cper.GHES.get(fields["sev"]), **facts)
        case "arm_event":
            return _at(
                record,
                "ras:arm_event",
                addr=cper.arm_address(fields.get("pei_buf", b"")),
                severity=cper.GHES.get(fields.get("sev", -1)),
            )
    return _at(
        record,
        "ras:non_standard_event",
        severity=firmware.non_standard.get(fields["sev"]),
        message=_text(fields.get("fru_text")),
    )


def _at(record: Record, via: str, *, addr: int | None = None, **known: Any) -> HwError:
    pfn = None if addr is None else kvm.gfn_of(addr)
    return HwError(record.ts, via, addr=addr, pfn=pfn, **known)


def _text(raw: str | None) -> str | None:
    return sanitize.clean(raw or "") or None
