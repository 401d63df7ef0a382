"""Memory errors reported by hardware or firmware.

Fields have the names of include/ras/ras_event.h. A value that is missing, or declared not valid, is
None.
"""

from __future__ import annotations

from kvmtrace import sanitize
from kvmtrace.events import Event, HwError, MachineCheck
from kvmtrace.linux import cper
from kvmtrace.linux.smbios import Firmware
from kvmtrace.sources import convert
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
    fields = record.fields
    check = MachineCheck(
        fields["bank"],
        fields["cpu"],
        fields["socketid"],
        fields["status"],
        fields.get("misc"),
        ipid=fields.get("ipid") or None,
    )
    vendor_data = fields.get("v_data", b"")
    return convert.recorded_machine_check(record.ts, check, fields["addr"], vendor_data)


def error(record: Record, firmware: Firmware) -> HwError:
    """A memory error of any other probe. ``firmware``: names of DIMMs."""
    fields = record.fields
    match record.probe:
        case "mc_event":
            via = "ras:mc_event"
            report = cper.Edac(
                fields["error_type"],
                fields["address"],
                fields["grain_bits"],
                fields["error_count"],
                fields.get("label", ""),
                fields.get("msg", ""),
                tuple(fields.get(layer, -1) for layer in _LAYERS) if _LAYERS[0] in fields else (),
            )
            facts = cper.edac(report, firmware.alike)
        case "extlog":
            via = "ras:extlog_mem_event"
            section = cper.extlog(
                fields["pa"],
                fields["pa_mask_lsb"],
                fields.get("etype", 0xFF),
                fields.get("data", b""),
            )
            facts = cper.memory(section, firmware.dimms, fields.get("fru_text"))
            facts["severity"] = cper.CPER.get(fields["sev"])
        case "apei":
            via = "GHES"
            section = cper.MemoryErrorSection(
                *(fields.get(word, 0) for word in cper.MemoryErrorSection._fields)
            )
            facts = cper.memory(section, firmware.dimms)
            facts["severity"] = cper.GHES.get(fields["sev"])
        case "arm_event":
            via = "ras:arm_event"
            address = cper.arm_address(fields.get("pei_buf", b""))
            facts = {"addr": address, "severity": cper.GHES.get(fields.get("sev", -1))}
        case _:
            via = "ras:non_standard_event"
            message = sanitize.clean(fields.get("fru_text") or "") or None
            facts = {"severity": firmware.non_standard.get(fields["sev"]), "message": message}
    return convert.hardware_error(record.ts, via, facts)
