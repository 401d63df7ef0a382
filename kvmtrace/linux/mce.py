"""Registers of a machine check, judged as the kernel judges them, by who made the CPU.

Sources: arch/x86/include/asm/mce.h, arch/x86/kernel/cpu/mce/{core,intel,amd,apei}.c (Linux 6.1 to
7.3); Intel SDM vol. 3B, 17.9 (compound error codes); AMD's Processor Programming References.
"""

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
# Zhaoxin's registers are Intel's; it calls itself "  Shanghai  ".
LIKE_INTEL = (INTEL, "Shanghai")

FIRMWARE_BANK = 0xFF
"""Bank -1: the kernel's own record of what firmware reported (apei_mce_report_mem_error)."""

_PADDRV = 1 << 54  # AMD, newer: the address is a system physical one
_SYNDV = 1 << 53
_AR = 1 << 55  # Intel: action is required of the thread here

_ADDR_LSB = 0x3F
_ADDR_MODE, _ADDR_PHYSICAL = 7 << 6, 2 << 6
_PAGE_SHIFT = 12

_COUNT_SHIFT, _COUNT_MASK = 38, 0x7FFF

# Compound error codes 000F 0000 1MMM CCCC (memory controller) and 000F 0010 1MMM CCCC (memory that
# caches other memory); F, bit 12, says that reports are filtered.
_CODE_MASK, _CONTROLLER_CODES = 0xEF80, (0x0080, 0x0280)

# IPID: hardware ID and type of an AMD bank; 0x96: a unified memory controller, of any type
_HWID_SHIFT, _HWID_MASK, _UMC = 32, 0xFFF, 0x96
# Before these IDs: the northbridge, its DRAM errors by extended code
_NORTHBRIDGE, _XEC_SHIFT, _XEC_MASK, _DRAM_ECC = 4, 16, 0x1F, 8


def severity(status: int, vendor: str | None) -> str:
    """Severity of a machine check, as ``events.HwError`` names them."""
    if not status & UC:
        return "deferred" if vendor in AMD and status & DEFERRED else "corrected"
    return "fatal" if status & PCC else "recoverable"


def address_shift(status: int, misc: int | None) -> int | None:
    """log2 of the bytes that the address is exact to; None where MCi_MISC does not say."""
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
    """The physical address in MCi_ADDR; None if it is not known to be one (mce_usable_address).

    ``bits``: of a physical address; above are the key of encrypted memory and what is not defined.
    ``smca``: AMD's Scalable MCA. The rule is the newest kernel's: 6.1 takes any AMD address.
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
        return True  # for any vendor: it is made up only where firmware knows the address
    if vendor in LIKE_INTEL:
        shift = address_shift(status, misc)
        if misc is None or shift is None or misc & _ADDR_MODE != _ADDR_PHYSICAL:
            return False
        return shift <= _PAGE_SHIFT
    if is_umc(ipid):
        # Its addresses are within the controller's own memory, on Hygon's CPUs as well.
        return bool(status & (POISON | _PADDRV))
    if vendor == "AuthenticAMD":
        if not smca and bank == _NORTHBRIDGE:
            return status >> _XEC_SHIFT & _XEC_MASK == _DRAM_ECC
        return bool(status & (POISON | _PADDRV if smca else POISON))
    return vendor is not None


def is_umc(ipid: int | None) -> bool:
    """Whether the bank is one of a memory controller of AMD's (smca_hwid_mcatypes)."""
    return ipid is not None and ipid >> _HWID_SHIFT & _HWID_MASK == _UMC


def at_memory(status: int, vendor: str | None, bank: int, ipid: int | None = None) -> bool:
    """Whether a memory controller reports: its socket is then the memory's.

    Any other bank is of the CPU that ran into the error, or happened to read the record.
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
    """Whether the CPU that reports ran into bad data: it says nothing of where the memory is."""
    if not status & UC or bank == FIRMWARE_BANK:
        return False
    if vendor in AMD:
        return bool(status & POISON)
    return vendor in LIKE_INTEL and bool(status & _AR)


def at(status: int, vendor: str | None, bank: int, ipid: int | None = None) -> str | None:
    """What the CPU and the socket of a record are: of the "memory" or of its "consumer".

    None: that of the CPU that read the record, or not known.
    """
    if at_memory(status, vendor, bank, ipid):
        return "memory"
    return "consumer" if consumed(status, vendor, bank) else None


def errors(status: int, vendor: str | None, bank: int) -> int:
    """How many errors one record stands for.

    Only Intel's registers count, and only corrected errors, in bits 52:38 (MCI_STATUS_CEC); 0
    where a CPU does not. AMD's threshold counters say how many are left to an interrupt: the
    kernel sets them back, and EDAC takes each of AMD's records for one error.
    """
    if vendor not in LIKE_INTEL or status & UC or bank == FIRMWARE_BANK:
        return 1
    return max(1, status >> _COUNT_SHIFT & _COUNT_MASK)


def fru_text(status: int, vendor_data: bytes) -> str | None:
    """AMD's name of a unit, in SYND1 and SYND2 if the bank is set up so (MCI_CONFIG_FRUTEXT).

    The record does not say whether it is: then they hold numbers, which are no text.
    """
    text = vendor_data[:16].rstrip(b"\0 ")
    if not status & _SYNDV or len(text) < 2 or not all(0x20 <= byte < 0x7F for byte in text):
        return None
    return text.decode("ascii")
