"""Interpret machine check registers as the kernel does, by the vendor of the CPU.

Sources: arch/x86/include/asm/mce.h, arch/x86/kernel/cpu/mce/{core,intel,amd,apei}.c (Linux 6.1 to
7.3); Intel SDM vol. 3B, 17.9 (compound error codes); AMD's Processor Programming References.
"""

from __future__ import annotations

import functools

VIA = "mce:mce_record"
"""``events.HwError.via`` of a machine check."""

MISCV = 1 << 59
ADDRV = 1 << 58
UC = 1 << 61
PCC = 1 << 57
# On AMD; Intel has the count of corrected errors there.
DEFERRED = 1 << 44
POISON = 1 << 43

AMD = ("AuthenticAMD", "HygonGenuine")
INTEL = "GenuineIntel"
# Zhaoxin's registers are like Intel's; its vendor string is "  Shanghai  ".
LIKE_INTEL = (INTEL, "Shanghai")

FIRMWARE_BANK = 0xFF
"""Bank -1: a record that the kernel made of a firmware report (apei_mce_report_mem_error)."""

_PADDRV = 1 << 54  # newer AMD: the address is a system physical address
_SYNDV = 1 << 53
_AR = 1 << 55  # Intel: action is required of the thread here

_ADDR_LSB = 0x3F
_ADDR_MODE, _ADDR_PHYSICAL = 7 << 6, 2 << 6
_PAGE_SHIFT = 12

_COUNT_SHIFT, _COUNT_MASK = 38, 0x7FFF

# Compound error codes 000F 0000 1MMM CCCC (memory controller) and 000F 0010 1MMM CCCC (memory that
# caches other memory). F, bit 12: reports are filtered.
_CODE_MASK, _CONTROLLER_CODES = 0xEF80, (0x0080, 0x0280)

# IPID: hardware ID and type of an AMD bank; 0x96: a unified memory controller, of any type
_HWID_SHIFT, _HWID_MASK, _UMC = 32, 0xFFF, 0x96
# CPUs without these IDs: bank of the northbridge, and the extended code of its DRAM errors
_NORTHBRIDGE, _XEC_SHIFT, _XEC_MASK, _DRAM_ECC = 4, 16, 0x1F, 8


def severity(status: int, vendor: str | None) -> str:
    """Severity of a machine check, as ``events.HwError`` names them."""
    if not status & UC:
        return "deferred" if vendor in AMD and status & DEFERRED else "corrected"
    return "fatal" if status & PCC else "recoverable"


def address_shift(status: int, misc: int | None) -> int | None:
    """Return log2 of the bytes that the address is exact to; None if MCi_MISC does not have it."""
    return misc & _ADDR_LSB if misc is not None and status & MISCV else None


def physical(
    addr: int,
    status: int,
    misc: int | None,
    vendor: str | None,
    bits: int | None,
    *,
    bank: int | None = None,
    ipid: int | None = None,
    smca: bool = False,
) -> int | None:
    """Return the physical address in MCi_ADDR; None if it may not be one (mce_usable_address).

    ``bits``: of a physical address; bits above are the key of encrypted memory, or undefined.
    ``smca``: AMD's Scalable MCA. The rule is that of the newest kernel; 6.1 takes any AMD address.
    """
    if not _is_physical(status, misc, vendor, bank, ipid, smca=smca or bool(ipid)):
        return None
    return addr if bits is None else addr & (1 << bits) - 1


def _is_physical(
    status: int,
    misc: int | None,
    vendor: str | None,
    bank: int | None,
    ipid: int | None,
    *,
    smca: bool,
) -> bool:
    if bank == FIRMWARE_BANK:
        return True  # for any vendor: the record is only made if firmware has the address
    if vendor in LIKE_INTEL:
        shift = address_shift(status, misc)
        if misc is None or shift is None or misc & _ADDR_MODE != _ADDR_PHYSICAL:
            return False
        return shift <= _PAGE_SHIFT
    if is_umc(ipid):
        # Other addresses are relative to the controller's memory, also on Hygon's CPUs.
        return bool(status & (POISON | _PADDRV))
    if vendor == "AuthenticAMD":
        if not smca and bank == _NORTHBRIDGE:
            return status >> _XEC_SHIFT & _XEC_MASK == _DRAM_ECC
        return bool(status & (POISON | _PADDRV if smca else POISON))
    return vendor is not None


def is_umc(ipid: int | None) -> bool:
    """Whether the bank is an AMD memory controller's (smca_hwid_mcatypes)."""
    return ipid is not None and ipid >> _HWID_SHIFT & _HWID_MASK == _UMC


@functools.lru_cache(maxsize=256)
def at_memory(status: int, vendor: str | None, bank: int, ipid: int | None = None) -> bool:
    """Whether a memory controller reports, so that its socket is the memory's.

    Any other bank is that of the CPU that consumed the error, or that happened to read the record.
    """
    if bank == FIRMWARE_BANK:
        return False
    if vendor in LIKE_INTEL:
        return status & _CODE_MASK in _CONTROLLER_CODES
    if vendor in AMD:
        dram = status >> _XEC_SHIFT & _XEC_MASK == _DRAM_ECC
        return is_umc(ipid) or (not ipid and bank == _NORTHBRIDGE and dram)
    return False


def consumed(status: int, vendor: str | None, bank: int) -> bool:
    """Whether the reporting CPU consumed bad data; its socket need not be the memory's."""
    if not status & UC or bank == FIRMWARE_BANK:
        return False
    if vendor in AMD:
        return bool(status & POISON)
    return vendor in LIKE_INTEL and bool(status & _AR)


@functools.lru_cache(maxsize=256)
def at(status: int, vendor: str | None, bank: int, ipid: int | None = None) -> str | None:
    """Return whose CPU and socket a record has: the "memory"'s or its "consumer"'s.

    None: those of the CPU that read the record, or not known.
    """
    if at_memory(status, vendor, bank, ipid):
        return "memory"
    return "consumer" if consumed(status, vendor, bank) else None


def errors(status: int, vendor: str | None, bank: int) -> int:
    """Return how many errors one record stands for.

    Only Intel's registers count, and only corrected errors, in bits 52:38 (MCI_STATUS_CEC), which
    are 0 if the CPU does not count. AMD's threshold counters hold how many errors remain until an
    interrupt. The kernel resets them, and EDAC counts each AMD record as one error.
    """
    if vendor not in LIKE_INTEL or status & UC or bank == FIRMWARE_BANK:
        return 1
    return max(1, status >> _COUNT_SHIFT & _COUNT_MASK)


def fru_text(status: int, vendor_data: bytes) -> str | None:
    """Return AMD's name of a unit, in SYND1 and SYND2 if the bank is so configured.

    The record does not have that setting (MCI_CONFIG_FRUTEXT). Without it, the registers hold
    numbers, which are not printable text.
    """
    text = vendor_data[:16].rstrip(b"\0 ")
    if not status & _SYNDV or len(text) < 2 or not all(0x20 <= byte < 0x7F for byte in text):
        return None
    return text.decode("ascii")
