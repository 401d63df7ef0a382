"""Exits of KVM_RUN and refusals of guest_memfd: records and counters, and their events."""

from __future__ import annotations

import ctypes
from ctypes import c_int32, c_uint32, c_uint64
from typing import Any

from kvmtrace import kvm
from kvmtrace.events import Event, Exit, GmemRefusal
from kvmtrace.sources.bpf import records
from kvmtrace.sources.vm_table import VmTable

ACCESS_READ, ACCESS_WRITE, ACCESS_EXEC, ACCESS_PRIVATE, ACCESS_KNOWN = 1, 2, 4, 8, 16
ACCESS_PRIVATE_KNOWN = 32
GMEM_NOT_WATCHED = -0x7FFFFFFF
NO_GFN = NO_GPA = (1 << 64) - 1
NO_VCPU = NO_REASON = (1 << 32) - 1


class ExitKeyRecord(ctypes.Structure):
    _fields_ = (
        ("kvm", c_uint64),
        ("gen", c_uint64),
        ("gpa", c_uint64),
        ("size", c_uint64),
        ("flags", c_uint64),
        ("gfn", c_uint64),
        ("ret", c_int32),
        ("reason", c_uint32),
        ("gmem", c_int32),
        ("vcpu", c_uint32),
        ("access", c_uint32),
        ("annotated", c_uint32),
    )


class ExitCount(ctypes.Structure):
    _fields_ = (
        ("total", c_uint64),
        ("last_ts", c_uint64),
        ("last_emit_ts", c_uint64),
        ("tid", c_uint32),
        ("tgid", c_uint32),
        ("gpa", c_uint64),
        ("since", c_uint64),
    )


class ExitRecord(ctypes.Structure):
    _fields_ = (
        ("h", records.Header),
        ("key", ExitKeyRecord),
        ("total", c_uint64),
        ("gpa", c_uint64),
        ("since", c_uint64),
    )


class RefusalKeyRecord(ctypes.Structure):
    _fields_ = (("kvm", c_uint64), ("gen", c_uint64), ("gfn", c_uint64))


class RefusalCount(ctypes.Structure):
    _fields_ = (("total", c_uint64), ("last_ts", c_uint64), ("tgid", c_uint32), ("pad", c_uint32))


class BpfExits:
    """Turns counters and records into events, each exit and refusal once.

    ``offset``: epoch minus CLOCK_MONOTONIC, ns.
    """

    def __init__(self, vms: VmTable, offset: int) -> None:
        self._vms, self._offset = vms, offset
        self._reported: dict[bytes, int] = {}  # by key: how many are in events already
        self._exits: dict[tuple[int, int], dict[bytes, ExitKeyRecord]] = {}  # by VM
        self._refusals: dict[tuple[int, int], dict[bytes, RefusalKeyRecord]] = {}  # by VM

    def exit(self, key: ExitKeyRecord, counted: Any, at: int, tid: int, tgid: int) -> list[Event]:
        """``counted``: an ExitCount or ExitRecord, with the number of exits so far."""
        raw = bytes(key)
        reported = self._reported.get(raw, 0)
        count = counted.total - reported
        if count <= 0:
            return []
        self._reported[raw] = counted.total
        self._exits.setdefault((key.kvm, key.gen), {})[raw] = key
        ts = at + self._offset
        vm, events = self._vms.key(key.kvm, tgid, ts, generation=key.gen)
        gpa = _gpa(key, counted, reported)
        gfn = kvm.gfn_of(gpa) if gpa is not None else None
        if gfn is None and key.gfn != NO_GFN:
            gfn = key.gfn
        private = access_private(key.access)
        if key.annotated:
            private = bool(key.flags & kvm.MEMORY_EXIT_FLAG_PRIVATE)
        events.append(
            Exit(
                ts,
                vm,
                None if key.vcpu == NO_VCPU else key.vcpu,
                -key.ret,
                None if key.reason == NO_REASON else key.reason,
                None if key.reason == NO_REASON else bool(key.annotated),
                tid=None if key.vcpu == NO_VCPU else tid,
                flags=key.flags if key.annotated else None,
                gpa=gpa,
                size=(key.size or None) if key.annotated else None,
                gfn=gfn,
                private=private,
                access=access_text(key.access),
                gmem=None if key.gmem == GMEM_NOT_WATCHED else -key.gmem,
                count=count,
            )
        )
        return events

    def refusal(self, key: RefusalKeyRecord, counted: RefusalCount) -> list[Event]:
        raw = bytes(key)
        count = counted.total - self._reported.get(raw, 0)
        if count <= 0:
            return []
        self._reported[raw] = counted.total
        self._refusals.setdefault((key.kvm, key.gen), {})[raw] = key
        ts = counted.last_ts + self._offset
        vm, events = self._vms.key(key.kvm, counted.tgid, ts, generation=key.gen)
        return [*events, GmemRefusal(ts, vm, key.gfn, count)]

    def forget(self, struct: tuple[int, int]) -> tuple[list[ExitKeyRecord], list[RefusalKeyRecord]]:
        """Drop a VM that is gone (address and generation); the keys of its counters."""
        exits, refusals = self._exits.pop(struct, {}), self._refusals.pop(struct, {})
        for raw in (*exits, *refusals):
            self._reported.pop(raw, None)
        return list(exits.values()), list(refusals.values())


def _gpa(key: ExitKeyRecord, counted: Any, reported: int) -> int | None:
    """The address of all exits after the first ``reported``; None if they differ in it."""
    if not key.annotated:
        return None
    if key.gpa != NO_GPA:
        return int(key.gpa)
    return int(counted.gpa) if 0 < counted.since <= reported + 1 else None


def access_text(access: int) -> str | None:
    """``"r"``, ``"w"``, ``"x"``; None if no fault record has it."""
    if not access & ACCESS_KNOWN:
        return None
    for bit, text in ((ACCESS_WRITE, "w"), (ACCESS_EXEC, "x"), (ACCESS_READ, "r")):
        if access & bit:
            return text
    return None


def access_private(access: int) -> bool | None:
    """Whether the guest accessed the page as private; None if that is not known."""
    return bool(access & ACCESS_PRIVATE) if access & ACCESS_PRIVATE_KNOWN else None
