"""Decode hardware error reports: severities, and sections of firmware's records (CPER).

The kernel passes on CPER sections as firmware wrote them (UEFI 2.10, appendix N.2;
include/linux/cper.h), so their layout is the same for all kernels and architectures. Pure
functions: numbers and bytes in, facts out.
"""

from __future__ import annotations

import struct
from collections.abc import Collection, Mapping
from typing import Any, NamedTuple

from kvmtrace import dimm_names, sanitize

# enum hw_event_mc_err_type (linux/edac.h), GHES_SEV_* (acpi/ghes.h), CPER_SEV_* (linux/cper.h)
EDAC = {0: "corrected", 1: "recoverable", 2: "deferred", 3: "fatal"}
GHES = {1: "corrected", 2: "recoverable", 3: "fatal"}
CPER = {0: "recoverable", 1: "fatal", 2: "corrected"}

# Validation bits of a memory error section, by the field that each declares valid.
_ADDRESS, _MASK, _NODE = 1 << 1, 1 << 2, 1 << 3
_ERROR_TYPE, _DIMM_HANDLE = 1 << 14, 1 << 17
_RANK = 1 << 15
_ADDRESS_BITS = 64
_NO_TYPE = 0xFF
_FRU_TEXT = 20  # struct acpi_hest_generic_data; not always ended by a zero
_ALL = (1 << _ADDRESS_BITS) - 1
_PLACES = ((1 << 4, "card", 16), (1 << 5, "module", 32), (1 << 6, "bank", 48))

# Table N.31, as drivers/firmware/efi/cper.c names them
_ERROR_TYPES = (
    "unknown,no error,single-bit ECC,multi-bit ECC,single-symbol chipkill ECC,"
    "multi-symbol chipkill ECC,master abort,target abort,parity error,watchdog timeout,"
    "invalid address,mirror broken,memory sparing,scrub corrected error,scrub uncorrected error,"
    "physical memory map-out event"
).split(",")


class MemoryErrorSection(NamedTuple):
    """A memory error section (struct cper_sec_mem_err): the words of it that are read here.

    ``place``: the 64-bit word of node, card, module and bank. ``kind``: that of the error's type,
    the rank and the handles. Offsets: ``MEMORY_WORDS``.
    """

    valid: int
    addr: int
    mask: int
    place: int = 0
    kind: int = 0


# struct cper_mem_err_compact (ras:extlog_mem_event): validation bits, node, card, module, bank;
# device, row, column and bit; three IDs; rank, handles of the array and of the DIMM
_COMPACT = struct.Struct("<QHHHH8x24xHHH")


def extlog(pa: int, lsb: int, kind: int, compact: bytes) -> MemoryErrorSection:
    """Rebuild the section of an extlog_mem_event, in which missing fields are all ones."""
    valid = place = rank = handle = 0
    if len(compact) >= _COMPACT.size:
        valid, node, card, module, bank, rank, _, handle = _COMPACT.unpack_from(compact)
        place = node | card << 16 | module << 32 | bank << 48
    valid &= ~(_ADDRESS | _MASK | _ERROR_TYPE)
    valid |= _ADDRESS if pa != _ALL else 0
    valid |= _MASK if lsb < _ADDRESS_BITS else 0
    valid |= _ERROR_TYPE if kind != _NO_TYPE else 0
    mask = 1 << lsb if valid & _MASK else 0
    return MemoryErrorSection(valid, pa, mask, place, kind | rank << 16 | handle << 48)


MEMORY_WORDS = {"valid": 0, "addr": 16, "mask": 24, "place": 32, "kind": 72}


def memory(
    section: MemoryErrorSection, labels: Mapping[int, str], fru: str | None = None
) -> dict[str, Any]:
    """Return a section's content, by field of ``events.HwError``.

    ``labels``: by SMBIOS handle (``smbios.dimm_labels``). ``fru``: the record's FRU text.
    """
    facts: dict[str, Any] = {}
    if section.valid & _ADDRESS:
        facts["addr"] = section.addr
    if section.mask and section.valid & _MASK:
        facts["grain"] = section.mask & -section.mask
    if section.valid & _NODE:
        facts["node"] = section.place & 0xFFFF
    notes = []
    if section.valid & _ERROR_TYPE:
        number = section.kind & 0xFF
        known = number < len(_ERROR_TYPES)
        notes.append(_ERROR_TYPES[number] if known else f"error type {number}")
    notes += [
        f"{name} {section.place >> shift & 0xFFFF}"
        for bit, name, shift in _PLACES
        if section.valid & bit
    ]
    if section.valid & _RANK:
        notes.append(f"rank {section.kind >> 16 & 0xFFFF}")
    if section.valid & _DIMM_HANDLE:
        handle = section.kind >> 48 & 0xFFFF
        if handle in labels:
            facts |= {"label": labels[handle], "label_from": "smbios"}
        else:
            notes.append(f"SMBIOS handle {handle:#x}, which names no DIMM")
    if fru := sanitize.clean((fru or "")[:_FRU_TEXT]):
        name = dimm_names.of_fru(fru)
        if name is not None and "label" not in facts:
            facts |= {"label": name, "label_from": "fru"}
        else:
            notes.append(fru)
    if notes:
        facts["message"] = ", ".join(notes)
    return facts


EDAC_LABEL = 31
"""Characters of a DIMM's name that EDAC keeps (EDAC_MC_LABEL_LEN, linux/edac.h)."""


class Edac(NamedTuple):
    """The fields of ras:mc_event (include/ras/ras_event.h).

    ``place``: the memory controller and its layers; -1 if one is not known.
    """

    severity: int
    addr: int
    grain_bits: int
    errors: int
    label: str
    message: str
    place: tuple[int, ...] = ()


def edac(error: Edac, alike: Collection[str] = ()) -> dict[str, Any]:
    """Return an error that EDAC reports, by field of ``events.HwError``.

    ``alike``: names that firmware gave to several DIMMs, as far as EDAC keeps them. EDAC reports an
    unknown address as 0. A driver's grain of -1 becomes 2**64 bytes (edac_mc.c), and a register
    that does not count gives a count of 0 (skx_common.c).
    """
    addr = error.addr & _ALL
    count = max(1, error.errors)
    facts: dict[str, Any] = {"severity": EDAC.get(error.severity), "count": count}
    if addr:
        facts["addr"] = addr
        if error.grain_bits < _ADDRESS_BITS:
            facts["grain"] = 1 << error.grain_bits
    if name := dimm_names.label(error.label):
        if name[:EDAC_LABEL] in alike and error.place:
            controller, *layers = error.place
            where = ":".join(str(layer) for layer in layers if layer >= 0)
            name = f"{name} (mc {controller}, {where})"
        facts |= {"label": name, "label_from": "edac"}
    if message := sanitize.clean(error.message):
        facts["message"] = message
    return facts


# struct cper_arm_err_info: version, length, validation_bits, type, multiple_error, flags,
# error_info, virt_fault_addr, physical_fault_addr
_ARM_INFO = struct.Struct("<BBHBHBQQQ")
_ARM_PHYSICAL = 1 << 4
_ARM_CACHE = 1 << 1


def arm_address(infos: bytes) -> int | None:
    """Return the physical address in an Arm processor error's information structures.

    The first cache error's, else the first one: the kernel takes only the page of a cache error out
    of use (apei/ghes.c).
    """
    first, at = None, 0
    while at + _ARM_INFO.size <= len(infos):
        _, length, valid, kind, *_, addr = _ARM_INFO.unpack_from(infos, at)
        if valid & _ARM_PHYSICAL:
            if kind & _ARM_CACHE:
                return int(addr)
            first = int(addr) if first is None else first
        at += max(length, _ARM_INFO.size)
    return first
