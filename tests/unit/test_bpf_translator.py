"""Counters of the eBPF programs → exits: what is exact, and what is not known."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest

from kvmtrace.correlate import Correlator
from kvmtrace.events import Event, Exit, Lost, VmGone
from kvmtrace.sources.bpf import records
from kvmtrace.sources.bpf.exits import (
    GMEM_NOT_WATCHED,
    NO_GFN,
    NO_GPA,
    NO_REASON,
    NO_VCPU,
    ExitCount,
    ExitKeyRecord,
    ExitRecord,
    RefusalCount,
    RefusalKeyRecord,
)
from kvmtrace.sources.bpf.signals import SigbusCount, SigbusKey
from kvmtrace.sources.bpf.translator import BpfTranslator

VM, GEN, PID = 0xFFFF8000, 3, 4194300
PRIVATE = 1 << 3


def key(**other: Any) -> ExitKeyRecord:
    """An annotated EFAULT of guest_memfd's."""
    fields: dict[str, Any] = {"kvm": VM, "gen": GEN, "gpa": 0x5000, "size": 4096, "flags": 0}
    fields |= {"gfn": 5, "ret": -14, "reason": 39, "gmem": -2, "vcpu": 1, "annotated": 1}
    return ExitKeyRecord(**(fields | other))


def conversion(**other: Any) -> ExitKeyRecord:
    wanted = {"gpa": NO_GPA, "gfn": NO_GFN, "flags": PRIVATE, "gmem": 0}
    return key(**(wanted | other))


def overflow(**other: Any) -> ExitKeyRecord:
    """As bpf/exits.c counts what the map of exits has no room for."""
    wanted = {"gpa": NO_GPA, "gfn": NO_GFN, "size": 0, "vcpu": NO_VCPU}
    return key(**(wanted | other))


class Kernel:
    """The maps."""

    def __init__(self, *rows: tuple[ExitKeyRecord, int]) -> None:
        self.rows = list(rows)
        self.readings = self.active = 0
        self.places: dict[bytes, tuple[int, int]] = {}

    def activity(self) -> int:
        return self.active

    def exits(self) -> list[tuple[ExitKeyRecord, ExitCount]]:
        self.readings += 1
        return [
            (one, ExitCount(total, 9, 0, 77, PID, *self.places.get(bytes(one), (0, 0))))
            for one, total in self.rows
        ]

    def refusals(self) -> list[tuple[RefusalKeyRecord, RefusalCount]]:
        return []

    def signals(self) -> list[tuple[SigbusKey, SigbusCount]]:
        return []

    def lost(self) -> list[int]:
        return [0] * len(records.LOST_PLACES)

    def forget_exits(self, keys: list[ExitKeyRecord]) -> None:
        gone = {bytes(one) for one in keys}
        self.rows = [row for row in self.rows if bytes(row[0]) not in gone]

    def forget_refusals(self, keys: list[RefusalKeyRecord]) -> None:
        pass

    def forget_signals(self, keys: list[SigbusKey]) -> None:
        pass

    def count(self, one: ExitKeyRecord, total: int, gpa: int = 0, since: int = 0) -> None:
        """``total`` exits by now, those from number ``since`` on at ``gpa``."""
        self.rows = [row for row in self.rows if bytes(row[0]) != bytes(one)] + [(one, total)]
        self.places[bytes(one)] = gpa, since
        self.active += 1


@pytest.fixture
def translator() -> BpfTranslator:
    return BpfTranslator(0, ({}, {}), "/nonexistent")


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Callable[[float], None]:
    """Sets time.monotonic."""
    now = [100.0]
    monkeypatch.setattr("kvmtrace.sources.bpf.translator.time.monotonic", lambda: now[0])

    def set_(seconds: float) -> None:
        now[0] = seconds

    return set_


def exits_in(events: list[Event]) -> list[Exit]:
    return [event for event in events if isinstance(event, Exit)]


def told(translator: BpfTranslator, kernel: Kernel) -> list[Exit]:
    return exits_in(translator.counters(kernel, at_once=True))


def exit_record(one: ExitKeyRecord, total: int, gpa: int, since: int) -> bytes:
    header = records.Header(9, VM, GEN, records.EXIT, 77, PID, 0)
    return bytes(ExitRecord(header, one, total, gpa, since))


def vm_gone(number: int) -> bytes:
    header = records.Header(10, VM + number, GEN, records.VM_GONE, PID, PID, 0)
    return bytes(records.VmRecord(header, b"vmm"))


def test_an_exit_with_a_counter_of_its_own(translator: BpfTranslator) -> None:
    kernel = Kernel()
    kernel.count(key(), 4)
    (one,) = told(translator, kernel)
    assert (one.vcpu, one.errno, one.reason, one.annotated, one.count) == (1, 14, 39, True, 4)
    assert (one.gpa, one.gfn, one.size, one.flags, one.gmem) == (0x5000, 5, 4096, 0, 2)


def test_conversions_have_an_address_where_all_of_them_have_the_same(
    translator: BpfTranslator,
) -> None:
    kernel, one = Kernel(), conversion()
    (first,) = exits_in(translator.translate([exit_record(one, 1, 0x1000, 1)], kernel))
    assert (first.gpa, first.gfn, first.private, first.count) == (0x1000, 1, True, 1)
    assert (first.vcpu, first.size, first.flags, first.gmem) == (1, 4096, PRIVATE, 0)
    # The third to the fifth were at 0x3000, and the second elsewhere.
    kernel.count(one, 5, 0x3000, since=3)
    (mixed,) = told(translator, kernel)
    assert (mixed.gpa, mixed.gfn, mixed.count) == (None, None, 4)
    # On and on at 0x3000.
    kernel.count(one, 500, 0x3000, since=3)
    (same,) = told(translator, kernel)
    assert (same.gpa, same.gfn, same.count) == (0x3000, 3, 495)
    # The counter was read while the next exit was about to be counted.
    kernel.count(one, 510, 0x9000, since=511)
    assert [e.gpa for e in told(translator, kernel)] == [None]


@pytest.mark.parametrize(
    ("fields", "cause"),
    [
        ({"gmem": 0, "flags": PRIVATE}, "conversion"),
        ({"gmem": -2}, "backing"),
        ({"gmem": GMEM_NOT_WATCHED}, None),
        ({"ret": -133, "gmem": -133}, "hwpoison"),
        ({"annotated": 0, "reason": 0, "flags": 0, "gmem": 0}, "unannotated"),
        ({"ret": -12, "annotated": 0, "gmem": 0}, "other"),
    ],
)
def test_a_full_map_keeps_errno_and_cause(
    translator: BpfTranslator, fields: dict[str, Any], cause: str | None
) -> None:
    kernel, correlator = Kernel(), Correlator()
    kernel.count(overflow(**fields), 5000)
    events = translator.counters(kernel)
    feed = [correlator.feed(event) for event in events]
    (one,) = exits_in(events)
    assert feed[-1].cause == cause
    assert (one.errno, one.count) == (-fields.get("ret", -14), 5000)
    assert (one.reason, one.annotated) == (fields.get("reason", 39), fields.get("annotated", 1))
    assert (one.vcpu, one.tid, one.gpa, one.gfn, one.size) == (None,) * 5
    (vm,) = correlator.snapshot().vms.values()
    assert sum(vm.exits.values()) == 5000


def test_what_is_known_of_the_errno_only(translator: BpfTranslator) -> None:
    kernel, correlator = Kernel(), Correlator()
    nothing = {"flags": 0, "reason": NO_REASON, "annotated": 0, "gmem": 0}
    kernel.count(overflow(**nothing), 5)
    (one,) = exits_in(translator.counters(kernel))
    assert (one.vcpu, one.reason, one.annotated) == (None, None, None)
    assert correlator.feed(one).cause is None


def test_a_memory_fault_without_an_errno(translator: BpfTranslator) -> None:
    """arm64's nested virtualization: KVM_RUN returns 0."""
    kernel = Kernel()
    kernel.count(key(ret=0, gmem=-133), 1)
    (one,) = told(translator, kernel)
    assert (one.errno, one.reason, one.annotated, one.gpa) == (0, 39, True, 0x5000)
    assert (one.size, one.flags, one.gmem) == (4096, 0, 133)


def test_counters_are_read_once_a_second(
    translator: BpfTranslator, clock: Callable[[float], None]
) -> None:
    kernel = Kernel()
    counted = 0
    for tenth in range(40):
        clock(100 + tenth / 10)
        kernel.count(key(), tenth + 1)
        counted += sum(one.count for one in exits_in(translator.counters(kernel)))
    assert kernel.readings == 4
    clock(103.95)
    counted += sum(one.count for one in exits_in(translator.counters(kernel, at_once=True)))
    assert (kernel.readings, counted) == (5, 40)
    clock(200)
    assert translator.counters(kernel) == []
    assert kernel.readings == 5  # nothing was counted since


def test_what_is_due_is_read_though_nothing_more_is_counted(
    translator: BpfTranslator, clock: Callable[[float], None]
) -> None:
    kernel = Kernel()
    kernel.count(key(), 1)
    translator.counters(kernel)
    kernel.count(key(), 2)
    assert translator.counters(kernel) == []
    clock(101)
    assert [one.count for one in exits_in(translator.counters(kernel))] == [1]


def test_a_vms_last_exits_are_told_before_its_end_and_many_ends_take_one_reading(
    translator: BpfTranslator, clock: Callable[[float], None]
) -> None:
    kernel = Kernel()
    for number in range(50):
        kernel.count(key(kvm=VM + number), 1)
    assert len(exits_in(translator.counters(kernel))) == 50
    for number in range(50):
        kernel.count(key(kvm=VM + number), 3)
    events = translator.translate([vm_gone(number) for number in range(50)], kernel)
    assert kernel.readings == 2
    assert [one.count for one in exits_in(events)] == [2] * 50
    ended = [event.vm for event in events if isinstance(event, VmGone)]
    last = {one.vm: events.index(one) for one in exits_in(events)}
    assert len(ended) == 50
    assert all(last[vm] < n for n, e in enumerate(events) if isinstance(e, VmGone) for vm in [e.vm])
    assert kernel.rows == []
    assert [event for event in events if isinstance(event, Lost)] == []
