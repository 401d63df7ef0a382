"""Registers of a machine check (arch/x86/include/asm/mce.h; Intel SDM vol. 3B, AMD APM vol. 2)."""

from __future__ import annotations

MISCV = 1 << 59
ADDRV = 1 << 58
UC = 1 << 61
PCC = 1 << 57
# AMD's only; Intel counts corrected errors there.
DEFERRED = 1 << 44

AMD = ("AuthenticAMD", "HygonGenuine")
INTEL = "GenuineIntel"

_ADDR_LSB = 0x3F
_ADDR_MODE, _ADDR_PHYSICAL = 7 << 6, 2 << 6


def address_shift(status: int, misc: int | None) -> int | None:
    """log2 of the bytes that the address is exact to; None where MCi_MISC does not tell."""
    return misc & _ADDR_LSB if misc is not None and status & MISCV else None


def physical(
    addr: int, status: int, misc: int | None, vendor: str | None, bits: int | None
) -> int | None:
    """The physical address in MCi_ADDR; None if it is declared to be another kind of address.

    ``bits``: of a physical address; above are the key of encrypted memory and what is not defined.
    """
    mode = misc & _ADDR_MODE if misc is not None and status & MISCV else _ADDR_PHYSICAL
    if vendor == INTEL and mode != _ADDR_PHYSICAL:
        return None
    return addr if bits is None else addr & (1 << bits) - 1
