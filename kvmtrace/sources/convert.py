"""Events from the facts of a record, which both sources make alike."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from kvmtrace import dimm_names, kvm
from kvmtrace.events import Event, GmemPage, HwError, MachineCheck, Poison, SoftOffline, Unpoison
from kvmtrace.linux import mce

Names = tuple[Mapping[int, str], Mapping[int, str]]
"""Page types and results as the kernel prints them, by number."""

_LINE_SHIFT = 6  # of the bytes that a controller corrects at once


def hardware_error(ts: int, via: str, facts: Mapping[str, Any]) -> HwError:
    """A report of hardware or firmware. ``facts``: fields of HwError; ``pfn`` follows from addr."""
    addr = facts.get("addr")
    return HwError(ts, via, pfn=None if addr is None else kvm.gfn_of(addr), **facts)


def recorded_machine_check(ts: int, check: MachineCheck, addr: int, vendor_data: bytes) -> HwError:
    """A machine check as mce:mce_record has it.

    ``addr``: MCi_ADDR. ``enrich`` adds the vendor and decides whether that is physical, as CPUs
    differ.
    """
    status = check.status
    check = replace(check, fru=mce.fru_text(status, vendor_data))
    valid = addr if status & mce.ADDRV else None
    return machine_check(ts, check, valid, None if valid is None else kvm.gfn_of(valid))


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


def poison(
    ts: int, pfn: int, numbers: tuple[int, int], names: Names, *, tid: int, gmem: GmemPage | None
) -> Poison:
    """memory_failure has handled a page. ``numbers``: its type and the result."""
    kind, result = (table.get(nr, str(nr)) for table, nr in zip(names, numbers, strict=True))
    return Poison(ts, pfn, kind, result, *numbers, tid, gmem)


def page_change(ts: int, pfn: int, ret: int, *, is_unpoison: bool) -> list[Event]:
    """A page was moved off bad memory, or could not be; or it was taken off the poison list."""
    if is_unpoison:
        return [Unpoison(ts, pfn)] if ret == 0 else []
    return [SoftOffline(ts, pfn, -ret)]
