"""Poisoned pages, soft offline and unpoison: their records in C, and their events."""

from __future__ import annotations

import ctypes
from ctypes import c_int32, c_uint32, c_uint64
from typing import Any

from kvmtrace.events import Event, GmemPage, Owner
from kvmtrace.sources import convert
from kvmtrace.sources.bpf import records
from kvmtrace.sources.vm_table import VmTable

MAX_OWNERS = 8


class OwnerRecord(ctypes.Structure):
    _fields_ = (
        ("kvm", c_uint64),
        ("gen", c_uint64),
        ("gfn", c_uint64),
        ("hva", c_uint64),
        ("pid", c_uint32),
        ("pad", c_uint32),
    )


class GmemWalk(ctypes.Structure):
    _fields_ = (
        ("inode", c_uint64),
        ("index", c_uint64),
        ("seen", c_uint32),
        ("complete", c_uint32),
        ("nr_owners", c_uint32),
        ("pad", c_uint32),
        ("owners", OwnerRecord * MAX_OWNERS),
    )


class PoisonRecord(ctypes.Structure):
    _fields_ = (
        ("h", records.Header),
        ("pfn", c_uint64),
        ("page_type", c_int32),
        ("result", c_int32),
        ("gmem", GmemWalk),
    )


class PageRecord(ctypes.Structure):
    _fields_ = (("h", records.Header), ("pfn", c_uint64), ("ret", c_int32), ("unpoison", c_uint32))


class BpfPoison:
    """Turns records into events. ``offset``: epoch minus CLOCK_MONOTONIC, ns."""

    def __init__(self, vms: VmTable, offset: int, names: convert.Names) -> None:
        self._vms, self._offset, self._names = vms, offset, names

    def poison(self, record: Any) -> list[Event]:
        ts = record.h.ts + self._offset
        events: list[Event] = []
        gmem = None
        if record.gmem.seen:
            owners = []
            for place in record.gmem.owners[: record.gmem.nr_owners]:
                vm, seen = self._vms.key(place.kvm, place.pid, ts, generation=place.gen)
                events += seen
                owners.append(Owner(vm, place.gfn, place.hva or None))
            inode, complete = record.gmem.inode or None, bool(record.gmem.complete)
            gmem = GmemPage(inode, record.gmem.index, tuple(owners), complete)
        numbers = (record.page_type, record.result)
        tid = record.h.tid
        event = convert.poison(ts, record.pfn, numbers, self._names, tid=tid, gmem=gmem)
        return [*events, event]

    def page(self, record: Any) -> list[Event]:
        ts, is_unpoison = record.h.ts + self._offset, bool(record.unpoison)
        return convert.page_change(ts, record.pfn, record.ret, is_unpoison=is_unpoison)
