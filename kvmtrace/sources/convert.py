"""What both sources do alike with the facts of a record."""

from __future__ import annotations

from kvmtrace import dimm_names
from kvmtrace.events import HwError, MachineCheck
from kvmtrace.linux import mce

_LINE_SHIFT = 6  # of the bytes that a controller corrects at once


def machine_check(
    ts: int, check: MachineCheck, addr: int | None, pfn: int | None, count: int = 1
) -> HwError:
    """A machine check, with what its registers show.

    ``addr``: MCi_ADDR, if valid. ``pfn``: its page, if it is a physical address.
    """
    status, vendor, bank = check.status, check.vendor, check.bank
    at_memory = mce.at_memory(status, vendor, bank, check.ipid)
    # The FRU text of another unit names no DIMM.
    label = dimm_names.of_fru(check.fru) if mce.is_umc(check.ipid) else None
    shift = mce.address_shift(status, check.misc) or _LINE_SHIFT
    return HwError(
        ts,
        mce.VIA,
        mce.severity(status, vendor),
        addr,
        pfn,
        None if pfn is None else 1 << shift,
        count,
        label,
        socket=check.socket if at_memory else None,
        label_from="fru" if label else None,
        check=check,
    )
