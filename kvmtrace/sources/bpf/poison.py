"""Poisoned pages, soft offline and unpoison: their records in C, and their events."""

from __future__ import annotations

import ctypes
from collections.abc import Mapping
from ctypes import c_int32, c_uint32, c_uint64
from typing import Any

from kvmtrace.events import Event, GmemPoison, Owner, Poison, SoftOffline, Unpoison
from kvmtrace.sources.bpf import records
from kvmtrace.sources.vm_table import VmTable

MAX_OWNERS = 8

Names = tuple[Mapping[int, str], Mapping[int, str]]
"""Page types and results as the kernel prints them, by number."""


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

    def __init__(self, vms: VmTable, offset: int, names: Names) -> None:
        self._vms, self._offset = vms, offset
        self._types, self._results = names

    def poison(self, record: Any) -> list[Event]:
        ts = record.h.ts + self._offset
        events: list[Event] = []
        if record.gmem.seen:
            owners = []
            for place in record.gmem.owners[: record.gmem.nr_owners]:
                vm, seen = self._vms.key(place.kvm, place.pid, ts, generation=place.gen)
                events += seen
                owners.append(Owner(vm, place.gfn, place.hva or None))
            events.append(
                GmemPoison(
                    ts,
                    record.h.tid,
                    record.gmem.inode or None,
                    record.gmem.index,
                    tuple(owners),
                    bool(record.gmem.complete),
                )
            )
        events.append(
            Poison(
                ts,
                record.pfn,
                self._types.get(record.page_type, str(record.page_type)),
                self._results.get(record.result, str(record.result)),
                record.page_type,
                record.result,
                record.h.tid,
            )
        )
        return events

    def page(self, record: Any) -> list[Event]:
        ts = record.h.ts + self._offset
        if not record.unpoison:
            return [SoftOffline(ts, record.pfn, -record.ret)]
        return [Unpoison(ts, record.pfn)] if record.ret == 0 else []
