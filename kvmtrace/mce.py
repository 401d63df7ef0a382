"""Registers of a machine check (arch/x86/include/asm/mce.h; Intel SDM vol. 3B, AMD APM vol. 2)."""

from __future__ import annotations

MISCV = 1 << 59
ADDRV = 1 << 58
UC = 1 << 61
PCC = 1 << 57
# AMD's only; Intel counts corrected errors there.
DEFERRED = 1 << 44
POISON = 1 << 43

AMD = ("AuthenticAMD", "HygonGenuine")
INTEL = "GenuineIntel"

_ADDR_LSB = 0x3F
_ADDR_MODE, _ADDR_PHYSICAL = 7 << 6, 2 << 6
_NORTHBRIDGE, _XEC, _XEC_MEMORY = 4, 0x1F << 16, 0x8 << 16


def address_shift(status: int, misc: int | None) -> int | None:
    """log2 of the bytes that the address is exact to; None where MCi_MISC does not tell."""
    return misc & _ADDR_LSB if misc is not None and status & MISCV else None


def physical(  # noqa: PLR0917 (registers in their order)
    addr: int,
    status: int,
    misc: int | None,
    vendor: str | None,
    bits: int | None,
    bank: int | None = None,
) -> int | None:
    """The physical address in MCi_ADDR; None if it is another kind of address.

    ``bits``: of a physical address; above are the key of encrypted memory and what is not defined.
    """
    # Memory errors of the northbridge: of CPUs without SMCA.
    northbridge = bank == _NORTHBRIDGE and status & _XEC == _XEC_MEMORY
    if vendor in AMD and not status & POISON and not northbridge:
        return None
    mode = misc & _ADDR_MODE if misc is not None and status & MISCV else None
    if vendor == INTEL and mode != _ADDR_PHYSICAL:
        return None
    return addr if bits is None else addr & (1 << bits) - 1


def errors(status: int, vendor: str | None) -> int:
    """How many errors a record stands for: Intel counts corrected ones in bits 52:38."""
    counted = status >> 38 & 0x7FFF if vendor == INTEL and not status & UC else 0
    return max(1, counted)
