"""Machine check registers, interpreted as arch/x86/kernel/cpu/mce does for each vendor."""

from __future__ import annotations

import pytest

from kvmtrace.linux import mce

AMD, HYGON = mce.AMD
INTEL, ZHAOXIN = mce.LIKE_INTEL
ADDR = 0x3AEB64240
UMC, UMC_V2, LS = 0x9600050F00, 1 << 48 | 0x9600050F00, 0x10 << 48 | 0xB000000000
VALID = 1 << 63 | 1 << 60 | mce.ADDRV
MISCV, UC, AR, POISON, PADDRV = mce.MISCV, mce.UC, 1 << 55, mce.POISON, 1 << 54
DRAM_ECC = 8 << 16
PHYS = 2 << 6


@pytest.mark.parametrize(
    ("vendor", "bank", "status", "misc", "ipid", "usable"),
    [
        (INTEL, 7, MISCV, PHYS | 6, None, True),
        (INTEL, 7, MISCV, PHYS | 12, None, True),
        (INTEL, 7, MISCV, PHYS | 13, None, False),  # not exact to a page
        (INTEL, 7, MISCV, 1 << 6 | 6, None, False),  # linear
        (INTEL, 7, MISCV, 3 << 6 | 6, None, False),  # of the memory device
        (INTEL, 7, MISCV, 7 << 6 | 6, None, False),
        (INTEL, 7, 0, PHYS | 6, None, False),  # MISC is not valid
        (INTEL, 7, MISCV, None, None, False),
        (INTEL, 7, POISON, 0, None, False),  # counts errors there
        (ZHAOXIN, 7, MISCV, PHYS | 6, None, True),
        (ZHAOXIN, 7, 0, 0, None, False),
        (AMD, 15, 0, 0, UMC, False),
        (AMD, 15, mce.DEFERRED, 0, UMC_V2, False),
        (AMD, 15, MISCV, PHYS | 6, UMC, False),
        (AMD, 0, 0, 0, LS, False),
        (AMD, 0, UC | POISON, 0, LS, True),
        (AMD, 15, PADDRV, 0, UMC, True),
        (AMD, 4, DRAM_ECC, 0, LS, False),  # bank 4 is the northbridge before SMCA only
        (AMD, 4, DRAM_ECC, 0, None, True),
        (AMD, 4, POISON, 0, None, False),
        (AMD, 9, POISON, 0, None, True),
        (AMD, 9, 0, 0, None, False),
        (AMD, 9, PADDRV, 0, None, False),  # part of a syndrome before SMCA
        (HYGON, 15, 0, 0, UMC, False),
        (HYGON, 0, 0, 0, LS, True),
        ("CentaurHauls", 1, 0, 0, None, True),
        (None, 1, POISON | MISCV, PHYS | 6, None, False),  # nobody knows
        (AMD, mce.FIRMWARE_BANK, 0, 0, None, True),
        (INTEL, mce.FIRMWARE_BANK, 0, 0, None, True),
    ],
)
def test_usable_addresses(
    vendor: str | None, bank: int, status: int, misc: int | None, ipid: int | None, *, usable: bool
) -> None:
    told = mce.physical(ADDR, VALID | status, misc, vendor, 48, bank=bank, ipid=ipid)
    assert told == (ADDR if usable else None)


def test_smca_is_known_without_an_ipid() -> None:
    assert mce.physical(ADDR, VALID | DRAM_ECC, 0, AMD, 48, bank=4, smca=True) is None


@pytest.mark.parametrize(
    ("vendor", "bank", "status", "ipid", "memory", "consumed"),
    [
        (INTEL, 7, 0x0090, None, True, False),
        (INTEL, 7, 0x1091, None, True, False),  # filtered
        (INTEL, 13, 0x00C1, None, True, False),  # scrubber
        (INTEL, 7, 0x0281, None, True, False),
        (INTEL, 1, UC | AR | 0x0134, None, False, True),
        (INTEL, 0, UC | AR | 0x0150, None, False, True),
        (INTEL, 5, UC | 0x017A, None, False, False),  # L3 writeback
        (INTEL, 5, 0x0E0B, None, False, False),  # bus
        (INTEL, 5, 0x0890, None, False, False),  # bus, bit 11
        (ZHAOXIN, 7, 0x0090, None, True, False),
        (INTEL, mce.FIRMWARE_BANK, UC | AR | 0x009F, None, False, False),
        (AMD, 15, 0x011B, UMC, True, False),
        (AMD, 15, 0x011B, UMC_V2, True, False),
        (HYGON, 15, 0x011B, UMC, True, False),
        (AMD, 0, UC | POISON | 0x0135, LS, False, True),
        (AMD, 4, DRAM_ECC, None, True, False),
        (AMD, 4, DRAM_ECC, LS, False, False),
        (AMD, 9, mce.DEFERRED | POISON, None, False, False),
        (None, 7, 0x0090, None, False, False),
        ("CentaurHauls", 7, UC | AR | 0x0090, None, False, False),
    ],
)
def test_whose_socket_it_is(
    vendor: str | None, bank: int, status: int, ipid: int | None, *, memory: bool, consumed: bool
) -> None:
    assert mce.at_memory(VALID | status, vendor, bank, ipid) == memory
    assert mce.consumed(VALID | status, vendor, bank) == consumed


@pytest.mark.parametrize(
    ("vendor", "status", "errors"),
    [
        (INTEL, 3 << 38, 3),
        (INTEL, 0x7FFF << 38, 0x7FFF),
        (INTEL, 0, 1),
        (INTEL, UC | 3 << 38, 1),
        (ZHAOXIN, 2 << 38, 2),
        (AMD, 3 << 38, 1),
        (None, 3 << 38, 1),
    ],
)
def test_only_some_registers_count(vendor: str | None, status: int, errors: int) -> None:
    assert mce.errors(VALID | status, vendor, 7) == errors
    assert mce.errors(VALID | status, vendor, mce.FIRMWARE_BANK) == 1


@pytest.mark.parametrize(
    ("status", "data", "text"),
    [
        (1 << 53, b"DIMM_A1\0\0\0\0\0\0\0\0\0", "DIMM_A1"),
        (1 << 53, b"P0_CHANNEL_A_DIM", "P0_CHANNEL_A_DIM"),
        (0, b"DIMM_A1\0\0\0\0\0\0\0\0\0", None),
        (1 << 53, bytes(16), None),
        (1 << 53, b"\x01\x02syndrome\0\0\0\0\0\0", None),
        (1 << 53, b"DIMM\0A1\0\0\0\0\0\0\0\0\0", None),
        (1 << 53, b"", None),
    ],
)
def test_vendor_data_is_text_or_numbers(status: int, data: bytes, text: str | None) -> None:
    assert mce.fru_text(status, data) == text
