"""Hardware errors as those who report them put it: severities, and sections of firmware's records.

The kernel hands on CPER sections as firmware wrote them (UEFI 2.10, appendix N.2;
include/linux/cper.h), so their layout is one for all kernels and architectures. Pure: numbers and
bytes in, facts out.
"""

from __future__ import annotations

import struct
from collections.abc import Mapping
from typing import Any, NamedTuple

# enum hw_event_mc_err_type (linux/edac.h), GHES_SEV_* (acpi/ghes.h), CPER_SEV_* (linux/cper.h)
EDAC = {0: "corrected", 1: "recoverable", 2: "deferred", 3: "fatal"}
GHES = {1: "corrected", 2: "recoverable", 3: "fatal"}
CPER = {0: "recoverable", 1: "fatal", 2: "corrected"}

# Validation bits of a memory error section, and what they vouch for.
_ADDRESS, _MASK, _NODE = 1 << 1, 1 << 2, 1 << 3
_ERROR_TYPE, _DIMM_HANDLE = 1 << 14, 1 << 17
_RANK = 1 << 15
_PLACES = ((1 << 4, "card", 16), (1 << 5, "module", 32), (1 << 6, "bank", 48))

# Table N.31, as drivers/firmware/efi/cper.c names them
_ERROR_TYPES = (
    "unknown,no error,single-bit ECC,multi-bit ECC,single-symbol chipkill ECC,"
    "multi-symbol chipkill ECC,master abort,target abort,parity error,watchdog timeout,"
    "invalid address,mirror broken,memory sparing,scrub corrected error,scrub uncorrected error,"
    "physical memory map-out event"
).split(",")


class Memory(NamedTuple):
    """A memory error section (struct cper_sec_mem_err), as far as anything here reads it.

    ``place``: the 64-bit word of node, card, module and bank; ``kind``: that of the error's type,
    the rank and the handles. Offsets: ``MEMORY_WORDS``.
    """

    valid: int
    addr: int
    mask: int
    place: int = 0
    kind: int = 0


MEMORY_WORDS = {"valid": 0, "addr": 16, "mask": 24, "place": 32, "kind": 72}


def memory(said: Memory, dimms: Mapping[int, str]) -> dict[str, Any]:
    """What a section tells, under the names of ``events.HwError``.

    ``dimms``: labels by SMBIOS handle (``smbios.dimm_labels``).
    """
    facts: dict[str, Any] = {}
    if said.valid & _ADDRESS:
        facts["addr"] = said.addr
    if said.mask and said.valid & _MASK:
        facts["grain"] = said.mask & -said.mask
    if said.valid & _NODE:
        facts["node"] = said.place & 0xFFFF
    if said.valid & _DIMM_HANDLE:
        handle = said.kind >> 48 & 0xFFFF
        facts["label"] = dimms.get(handle, f"SMBIOS handle {handle:#x}")
    notes = []
    if said.valid & _ERROR_TYPE:
        number = said.kind & 0xFF
        known = number < len(_ERROR_TYPES)
        notes.append(_ERROR_TYPES[number] if known else f"error type {number}")
    notes += [
        f"{name} {said.place >> shift & 0xFFFF}" for bit, name, shift in _PLACES if said.valid & bit
    ]
    if said.valid & _RANK:
        notes.append(f"rank {said.kind >> 16 & 0xFFFF}")
    if notes:
        facts["message"] = ", ".join(notes)
    return facts


# struct cper_arm_err_info: version, length, validation_bits, type, multiple_error, flags,
# error_info, virt_fault_addr, physical_fault_addr
_ARM_INFO = struct.Struct("<BBHBHBQQQ")
_ARM_PHYSICAL = 1 << 4


def arm_address(infos: bytes) -> int | None:
    """The first physical address among an Arm processor error's information structures."""
    at = 0
    while at + _ARM_INFO.size <= len(infos):
        _, length, valid, *_, addr = _ARM_INFO.unpack_from(infos, at)
        if valid & _ARM_PHYSICAL:
            return int(addr)
        at += max(length, _ARM_INFO.size)
    return None
