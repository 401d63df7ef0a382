"""Memory errors as hardware and firmware report them: their records in C, and their events."""

from __future__ import annotations

import ctypes
from collections.abc import Mapping
from ctypes import c_char, c_int32, c_uint8, c_uint32, c_uint64
from typing import Any

from kvmtrace.events import HwError, MachineCheck
from kvmtrace.linux import cper, smbios
from kvmtrace.sources import convert
from kvmtrace.sources.bpf import records

HW_MC_EVENT, HW_EXTLOG, HW_APEI, HW_ARM, HW_NON_STANDARD = range(5)

_HW_VIA: dict[int, tuple[str, Mapping[int, str]]] = {
    HW_MC_EVENT: ("ras:mc_event", cper.EDAC),
    HW_EXTLOG: ("ras:extlog_mem_event", cper.CPER),
    HW_APEI: ("GHES", cper.GHES),
    HW_ARM: ("ras:arm_event", cper.GHES),
    HW_NON_STANDARD: ("ras:non_standard_event", {}),
}


class MceRecord(ctypes.Structure):
    _fields_ = (
        ("h", records.Header),
        ("status", c_uint64),
        ("addr", c_uint64),
        ("misc", c_uint64),
        ("bank", c_uint32),
        ("mce_cpu", c_uint32),
        ("socket", c_uint32),
        ("pad", c_uint32),
        ("ipid", c_uint64),
        ("vendor_data", c_uint8 * 16),
    )


class HwRecord(ctypes.Structure):
    _fields_ = (
        ("h", records.Header),
        ("valid", c_uint64),
        ("addr", c_uint64),
        ("mask", c_uint64),
        ("place", c_uint64),
        ("kind", c_uint64),
        ("via", c_uint32),
        ("severity", c_int32),
        ("count", c_uint32),
        ("grain_bits", c_uint32),
        ("label", c_char * records.HW_TEXT),
        ("message", c_char * records.HW_TEXT),
    )


class BpfHardware:
    """Turns records into events. ``offset``: epoch minus CLOCK_MONOTONIC, ns."""

    def __init__(self, offset: int) -> None:
        self._offset = offset
        self._firmware = smbios.read()

    def hw_error(self, record: Any) -> HwError:
        via, severities = _HW_VIA[record.via]
        if record.via == HW_NON_STANDARD:
            severities = self._firmware.non_standard
        facts: dict[str, Any] = {"severity": severities.get(record.severity)}
        label, message = records.text(record.label), records.text(record.message)
        if record.via == HW_MC_EVENT:
            addr = record.addr if record.valid else 0
            place = tuple(ctypes.c_int8(record.place >> shift).value for shift in (8, 16, 24))
            head = (record.severity, addr, record.grain_bits, record.count, label, message)
            error = cper.Edac(*head, (record.place & 0xFF, *place))
            facts = cper.edac(error, self._firmware.alike)
        elif record.via in (HW_EXTLOG, HW_APEI):
            section = cper.MemoryErrorSection(
                record.valid, record.addr, record.mask, record.place, record.kind
            )
            facts |= cper.memory(section, self._firmware.dimms, label)
        else:
            if record.valid:
                facts["addr"] = record.addr
            facts["message"] = message or None
        return convert.hardware_error(record.h.ts + self._offset, via, facts)

    def mce(self, record: Any) -> HwError:
        check = MachineCheck(
            record.bank,
            record.mce_cpu,
            record.socket,
            record.status,
            record.misc,
            ipid=record.ipid or None,
        )
        ts, vendor_data = record.h.ts + self._offset, bytes(record.vendor_data)
        return convert.recorded_machine_check(ts, check, record.addr, vendor_data)
