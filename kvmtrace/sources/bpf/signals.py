"""SIGBUS to VMMs: records and counters in C, and their events.

Not every signal has a record: the counters report the rest by number.
"""

from __future__ import annotations

import ctypes
from collections import OrderedDict
from collections.abc import Iterable, Iterator
from ctypes import c_char, c_int32, c_uint32, c_uint64
from dataclasses import replace
from typing import Any, NamedTuple

from kvmtrace import kvm
from kvmtrace.events import Event, Sigbus
from kvmtrace.sources import limits
from kvmtrace.sources.bpf import records
from kvmtrace.sources.vm_table import VmTable

_MAX_KINDS = 4096

_Kind = tuple[int, int, int, int | None]  # sender, target thread, code, address


class SigbusRecord(ctypes.Structure):
    _fields_ = (
        ("h", records.Header),
        ("hva", c_uint64),
        ("code", c_int32),
        ("lsb", c_int32),
        ("target_tid", c_uint32),
        ("target_tgid", c_uint32),
        ("vcpu", c_int32),
        ("pad", c_uint32),
        ("total", c_uint64),
        ("comm", c_char * 16),
    )


class FaultRecord(ctypes.Structure):
    _fields_ = (
        ("h", records.Header),
        ("gfn", c_uint64),
        ("hva", c_uint64),
        ("vcpu", c_int32),
        ("access", c_uint32),
    )


class SigbusKey(ctypes.Structure):
    _fields_ = (
        ("kvm", c_uint64),
        ("gen", c_uint64),
        ("hva", c_uint64),
        ("code", c_int32),
        ("lsb", c_int32),
        ("target_tid", c_uint32),
        ("target_tgid", c_uint32),
        ("vcpu", c_int32),
        ("sender", c_uint32),
    )


class SigbusCount(ctypes.Structure):
    _fields_ = (
        ("total", c_uint64),
        ("sent", c_uint64),
        ("last_ts", c_uint64),
        ("since", c_uint64),
        ("left", c_uint64),
    )


class BpfSignals:
    """Turns records and counters into events. ``offset``: epoch minus CLOCK_MONOTONIC, ns."""

    def __init__(self, vms: VmTable, offset: int) -> None:
        self._vms, self._offset = vms, offset
        self._counts = SignalCounts()
        # By sending thread: the fault is to follow. With the VM's address and generation.
        self._pending: dict[int, tuple[Sigbus, tuple[int, int]]] = {}

    def signal(self, record: Any) -> list[Event]:
        """The events of a SigbusRecord; the signal itself may be held back for its fault."""
        count = self._counts.record(record)
        if not count:
            return []
        events: list[Event] = []
        signal = replace(self._sigbus(record, events), count=count)
        self._counts.remember(signal)
        self._pending[record.h.tid] = signal, (record.h.kvm, record.h.gen)
        if record.vcpu == -1 or record.target_tid != record.h.tid or signal.hva is None:
            events += self.flush(record.h.tid)
        return events

    def fault(self, record: Any) -> list[Event]:
        """A fault on a poisoned page, right after the signal that was sent from it."""
        if record.h.tid not in self._pending:
            return []
        signal, _ = self._pending.pop(record.h.tid)
        lsb = signal.lsb or kvm.PAGE_SHIFT
        if record.hva and signal.hva is not None and record.hva >> lsb != signal.hva >> lsb:
            return [signal]
        vm, events = self._vm(record.h)
        signal = replace(signal, vm=vm, vcpu=record.vcpu, gfn=record.gfn)
        self._counts.remember(signal)
        return [*events, signal]

    def counted(self, rows: Iterable[tuple[SigbusKey, SigbusCount]]) -> list[Event]:
        """The signals of these counters that no record reports."""
        events: list[Event] = []
        for like, count, ts in self._counts.uncounted(rows):
            signal = self._counts.lookup(like) or self._sigbus(like, events)
            events.append(replace(signal, ts=ts + self._offset, count=count))
        return events

    def flush(self, tid: int) -> list[Event]:
        """The signal of this thread that is held back, as it is."""
        pending = self._pending.pop(tid, None)
        return [pending[0]] if pending else []

    def flush_vm(self, struct: tuple[int, int]) -> list[Event]:
        """The signals of a VM (address and generation) that are held back, as they are."""
        tids = [tid for tid, (_, vm) in self._pending.items() if vm == struct]
        return [event for tid in tids for event in self.flush(tid)]

    def flush_all(self) -> list[Event]:
        return [event for tid in list(self._pending) for event in self.flush(tid)]

    def flush_overdue(self, now: int) -> list[Event]:
        """Signals whose fault did not come in time. ``now``: epoch, ns."""
        return [
            event
            for tid, (pending, _) in list(self._pending.items())
            if now - pending.ts >= limits.BPF_SIGNAL_WAIT_NS
            for event in self.flush(tid)
        ]

    def forget(self, struct: tuple[int, int]) -> list[SigbusKey]:
        """Drop a VM that is gone (address and generation); the keys of its counters."""
        return self._counts.forget(struct)

    def _sigbus(self, record: Any, events: list[Event]) -> Sigbus:
        ts = record.h.ts + self._offset
        vm = None
        if record.h.kvm:
            vm, seen = self._vm(record.h)
            events += seen
        else:
            keys = self._vms.of_pid(record.target_tgid)
            vm = keys[0] if len(keys) == 1 else None
        return Sigbus(
            ts,
            record.target_tgid,
            record.target_tid,
            record.code,
            None if record.code == kvm.SI_KERNEL else record.hva,
            lsb=kvm.lsb_of(record.lsb) or None,
            sender=record.h.tid,
            vm=vm,
            vcpu=record.vcpu if record.vcpu >= 0 else None,
            comm=records.text(record.comm),
        )

    def _vm(self, header: Any) -> tuple[int, list[Event]]:
        ts = header.ts + self._offset
        return self._vms.key(header.kvm, header.tgid, ts, generation=header.gen)


class SignalCounts:
    """Which signals are in events already: each is reported once, by record or by counter."""

    def __init__(self) -> None:
        self._reported: dict[bytes, int] = {}
        self._keys: dict[bytes, SigbusKey] = {}
        self._latest: OrderedDict[_Kind, Sigbus] = OrderedDict()

    def record(self, record: Any) -> int:
        """How many signals a record stands for; 0 if the counters have reported it."""
        if not record.total:
            return 1  # the map is full
        key = SigbusKey(
            *(record.h.kvm, record.h.gen, record.hva, record.code, record.lsb),
            *(record.target_tid, record.target_tgid, record.vcpu, record.h.tid),
        )
        return self._newly_reported(key, record.total)

    def uncounted(
        self, counted: Iterable[tuple[SigbusKey, SigbusCount]]
    ) -> Iterator[tuple[Any, int, int]]:
        """(key in the form of a record, count, time) of signals that no record will report."""
        for key, count in counted:
            # Records of the signals up to ``sent`` are in the ring buffer.
            fresh = self._newly_reported(key, count.total) if count.total > count.sent else 0
            if fresh:
                header = _Header(count.last_ts, key.kvm, key.gen, key.sender, key.target_tgid)
                yield _RecordFromKey(header, key), fresh, count.last_ts

    def remember(self, signal: Sigbus) -> None:
        """Keep the latest signal of its kind."""
        kind = (signal.sender or 0, signal.tid, signal.code, signal.hva)
        self._latest[kind] = signal
        self._latest.move_to_end(kind)
        while len(self._latest) > _MAX_KINDS:
            self._latest.popitem(last=False)

    def lookup(self, like: Any) -> Sigbus | None:
        """The latest signal of the kind of a record."""
        return self._latest.get((like.h.tid, like.target_tid, like.code, like.hva))

    def forget(self, struct: tuple[int, int]) -> list[SigbusKey]:
        """Drop a VM that is gone (address and generation); the keys of its counters."""
        keys = {raw: key for raw, key in self._keys.items() if (key.kvm, key.gen) == struct}
        for raw in keys:
            del self._keys[raw], self._reported[raw]
        return list(keys.values())

    def _newly_reported(self, key: SigbusKey, total: int) -> int:
        raw = bytes(key)
        count = total - self._reported.get(raw, 0)
        if count <= 0:
            return 0
        self._reported[raw], self._keys[raw] = total, key
        return count


class _Header(NamedTuple):
    ts: int
    kvm: int
    gen: int
    tid: int
    tgid: int


class _RecordFromKey:
    """A key in the form of a SigbusRecord."""

    def __init__(self, header: _Header, key: SigbusKey) -> None:
        self.h = header
        self.hva, self.code, self.lsb = key.hva, key.code, key.lsb
        self.target_tid, self.target_tgid, self.vcpu = key.target_tid, key.target_tgid, key.vcpu
        self.comm = b""
