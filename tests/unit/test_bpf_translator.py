"""Records and counters of the eBPF programs → events: what is exact, and what is not known."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest

from kvmtrace.correlate import Correlator
from kvmtrace.events import (
    Event,
    Exit,
    GmemPage,
    GmemRefusal,
    Lost,
    Owner,
    Poison,
    Sigbus,
    SoftOffline,
    Unpoison,
    VmGone,
    VmSeen,
)
from kvmtrace.sources import limits
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
from kvmtrace.sources.bpf.maps import Maps
from kvmtrace.sources.bpf.poison import OwnerRecord, PageRecord, PoisonRecord
from kvmtrace.sources.bpf.signals import FaultRecord, SigbusCount, SigbusKey, SigbusRecord
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


class Kernel(Maps):
    """The maps, with these exits counted."""

    def __init__(self, *rows: tuple[ExitKeyRecord, int]) -> None:
        self.rows = list(rows)
        self.readings = self.active = self.calls = 0
        self.places: dict[bytes, tuple[int, int]] = {}
        self.refused: list[tuple[RefusalKeyRecord, RefusalCount]] = []
        self.signalled: list[tuple[SigbusKey, SigbusCount]] = []
        self.losses = [0] * len(records.LOST_PLACES)

    def activity(self) -> int:
        self.calls += 1
        return self.active

    def exits(self) -> list[tuple[ExitKeyRecord, ExitCount]]:
        self.readings += 1
        return [
            (one, ExitCount(total, 9, 0, 77, PID, *self.places.get(bytes(one), (0, 0))))
            for one, total in self.rows
        ]

    def refusals(self) -> list[tuple[RefusalKeyRecord, RefusalCount]]:
        return list(self.refused)

    def signals(self) -> list[tuple[SigbusKey, SigbusCount]]:
        return self.signalled

    def lost(self) -> list[int]:
        self.calls += 1
        return list(self.losses)

    def forget_exits(self, keys: list[ExitKeyRecord]) -> None:
        gone = {bytes(one) for one in keys}
        self.rows = [row for row in self.rows if bytes(row[0]) not in gone]

    def forget_refusals(self, keys: list[RefusalKeyRecord]) -> None:
        gone = {bytes(one) for one in keys}
        self.refused = [row for row in self.refused if bytes(row[0]) not in gone]

    def forget_signals(self, keys: list[SigbusKey]) -> None:
        gone = {bytes(one) for one in keys}
        self.signalled = [row for row in self.signalled if bytes(row[0]) not in gone]

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


def read_exits(translator: BpfTranslator, kernel: Kernel) -> list[Exit]:
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
    (one,) = read_exits(translator, kernel)
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
    (mixed,) = read_exits(translator, kernel)
    assert (mixed.gpa, mixed.gfn, mixed.count) == (None, None, 4)
    # On and on at 0x3000.
    kernel.count(one, 500, 0x3000, since=3)
    (same,) = read_exits(translator, kernel)
    assert (same.gpa, same.gfn, same.count) == (0x3000, 3, 495)
    # The counter was read while the next exit was about to be counted.
    kernel.count(one, 510, 0x9000, since=511)
    assert [e.gpa for e in read_exits(translator, kernel)] == [None]


def test_what_is_counted_between_two_readings_is_not_undelivered(
    translator: BpfTranslator,
) -> None:
    """The storm goes on: each reading finds one more refusal, and one more exit, than the last."""

    class Storm(Kernel):
        def one_more(self) -> int:
            self.readings += 1
            return self.readings

        def refusals(self) -> list[tuple[RefusalKeyRecord, RefusalCount]]:
            return [(RefusalKeyRecord(VM, GEN, 5), RefusalCount(self.one_more(), 9, PID))]

        def exits(self) -> list[tuple[ExitKeyRecord, ExitCount]]:
            one = key(ret=-133, gmem=-133)
            return [(one, ExitCount(self.one_more(), 9, 0, 77, PID, 0, 0))]

    storm = Storm()
    storm.active = 1
    events = translator.counters(storm, at_once=True)
    counts = {type(event).__name__: event.count for event in events if hasattr(event, "count")}
    assert counts["GmemRefusal"] < counts["Exit"]


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


def test_an_exit_of_which_only_the_errno_is_known(translator: BpfTranslator) -> None:
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
    (one,) = read_exits(translator, kernel)
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


def test_a_storm_costs_the_same_however_fast_it_is(
    translator: BpfTranslator, clock: Callable[[float], None]
) -> None:
    """Every record of the ring ends a wait, after which counters could be read."""
    for rate in (10, 1000):
        kernel = Kernel()
        for number in range(3 * rate):
            clock(1000 * rate + number / rate)
            kernel.count(key(), number + 1)
            kernel.losses[0] += 1
            translator.counters(kernel)
        assert (kernel.readings, kernel.calls) == (3, 6)
        translator._start_over()


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


def test_a_vms_last_exits_come_before_its_end_and_many_ends_take_one_reading(
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


# -- records: signals, poison, VMs

TID, HVA = 77, 0x7F0000005000


def header(kind: int, ts: int = 9, *, kvm: int = VM, gen: int = GEN, tid: int = TID) -> Any:
    return records.Header(ts, kvm, gen, kind, tid, PID, 0)


def sigbus(ts: int = 9, *, total: int = 1, **other: Any) -> bytes:
    fields: dict[str, Any] = {"hva": HVA, "code": 4, "lsb": 12, "vcpu": 1, "comm": b"vmm"}
    fields |= {"target_tid": TID, "target_tgid": PID, "total": total}
    return bytes(SigbusRecord(header(records.SIGBUS, ts), **(fields | other)))


def fault(hva: int = HVA, tid: int = TID) -> bytes:
    return bytes(FaultRecord(header(records.FAULT, tid=tid), gfn=5, hva=hva, vcpu=1))


def vm_new(gen: int, kvm: int = VM) -> bytes:
    return bytes(records.VmRecord(header(records.VM_NEW, kvm=kvm, gen=gen), b"vmm"))


def poison(**gmem: Any) -> bytes:
    record = PoisonRecord(header(records.POISON, kvm=0, gen=0), pfn=0x1234, page_type=7, result=2)
    for name, value in gmem.items():
        setattr(record.gmem, name, value)
    return bytes(record)


def signals_in(events: list[Event]) -> list[Sigbus]:
    return [event for event in events if isinstance(event, Sigbus)]


@pytest.fixture
def at_start(monkeypatch: pytest.MonkeyPatch) -> None:
    """No signal is overdue: it is the time of the records."""
    monkeypatch.setattr("kvmtrace.sources.bpf.translator.time.monotonic_ns", lambda: 9)


@pytest.mark.usefixtures("at_start")
def test_a_signal_has_the_gfn_of_its_fault(translator: BpfTranslator) -> None:
    kernel = Kernel()
    assert signals_in(translator.translate([sigbus()], kernel)) == []
    (one,) = signals_in(translator.translate([fault(tid=TID + 1), fault()], kernel))
    assert (one.pid, one.tid, one.code, one.hva, one.lsb) == (PID, TID, 4, HVA, 12)
    assert (one.vm, one.vcpu, one.gfn, one.count, one.comm) == (1, 1, 5, 1, "vmm")


@pytest.mark.usefixtures("at_start")
@pytest.mark.parametrize(
    "next_record", [fault(HVA + 4096), sigbus(total=2), exit_record(key(), 1, 0, 0)]
)
def test_a_signal_does_not_wait_for_a_fault_that_is_not_its_own(
    translator: BpfTranslator, next_record: bytes
) -> None:
    (one,) = signals_in(translator.translate([sigbus(), next_record], Kernel()))
    assert (one.hva, one.gfn, one.count) == (HVA, None, 1)


@pytest.mark.usefixtures("at_start")
@pytest.mark.parametrize(
    "fields",
    [{"vcpu": -1}, {"target_tid": TID + 1}, {"code": 128, "hva": 0}],
    ids=["not in KVM_RUN", "to another thread", "without an address"],
)
def test_a_signal_that_no_fault_follows_is_not_held_back(
    translator: BpfTranslator, fields: dict[str, Any]
) -> None:
    (one,) = signals_in(translator.translate([sigbus(**fields)], Kernel()))
    assert one.gfn is None
    assert one.hva == (HVA if fields.get("code") != 128 else None)


def test_a_signal_waits_for_its_fault_no_longer_than_it_may(
    translator: BpfTranslator, monkeypatch: pytest.MonkeyPatch
) -> None:
    now = [9]
    monkeypatch.setattr("kvmtrace.sources.bpf.translator.time.monotonic_ns", lambda: now[0])
    translator.translate([sigbus()], Kernel())
    now[0] += limits.BPF_SIGNAL_WAIT_NS - 1
    assert translator.translate([], Kernel()) == []
    now[0] += 1
    assert [one.gfn for one in signals_in(translator.translate([], Kernel()))] == [None]


@pytest.mark.usefixtures("at_start")
def test_what_is_held_back_comes_at_the_end(translator: BpfTranslator) -> None:
    translator.translate([sigbus()], Kernel())
    assert len(signals_in(translator.flush(Kernel()))) == 1
    assert translator.flush_pending_signals() == []


@pytest.mark.usefixtures("at_start")
def test_signals_without_a_record_are_like_the_last_that_had_one(
    translator: BpfTranslator,
) -> None:
    kernel = Kernel()
    translator.translate([sigbus(), fault()], kernel)
    row = SigbusKey(VM, GEN, HVA, 4, 12, TID, PID, 1, TID)
    kernel.signalled = [(row, SigbusCount(1000, 200, 77, 0, 0))]
    kernel.active += 1
    (one,) = signals_in(translator.counters(kernel, at_once=True))
    assert (one.ts, one.gfn, one.count) == (77, 5, 999)
    translator.translate([vm_gone(0)], kernel)
    assert kernel.signalled == []


def test_a_poisoned_page_by_its_names() -> None:
    translator = BpfTranslator(1000, ({7: "huge page"}, {2: "Recovered"}), "/nonexistent")
    (one,) = translator.translate([poison()], Kernel())
    assert one == Poison(1009, 0x1234, "huge page", "Recovered", 7, 2, TID)
    unnamed = BpfTranslator(0, ({}, {}), "/nonexistent").translate([poison()], Kernel())
    assert unnamed == [Poison(9, 0x1234, "7", "2", 7, 2, TID)]


def test_a_poisoned_page_of_guest_memfd_with_its_owners(translator: BpfTranslator) -> None:
    owners = (OwnerRecord * 8)(
        OwnerRecord(VM, GEN, 5, HVA, PID), OwnerRecord(VM + 1, GEN, 6, 0, PID)
    )
    record = poison(inode=42, index=3, seen=1, complete=1, nr_owners=2, owners=owners)
    *seen, page = translator.translate([record], Kernel())
    assert [event.kind for event in seen] == ["vm_seen", "vm_seen"]
    assert isinstance(page, Poison)
    assert page.gmem == GmemPage(42, 3, (Owner(1, 5, HVA), Owner(2, 6, None)), True)
    (page,) = translator.translate([poison(seen=1)], Kernel())
    assert isinstance(page, Poison)
    assert page.gmem == GmemPage(None, 0, (), False)


def test_soft_offline_and_unpoison(translator: BpfTranslator) -> None:
    raw = [
        bytes(PageRecord(header(records.PAGE, kvm=0), 7, ret, unpoison))
        for ret, unpoison in ((0, 0), (-16, 0), (0, 1), (-16, 1))
    ]
    assert translator.translate(raw, Kernel()) == [
        SoftOffline(9, 7, 0),
        SoftOffline(9, 7, 16),
        Unpoison(9, 7),
    ]


def test_refusals_are_reported_once(translator: BpfTranslator) -> None:
    kernel = Kernel()
    counted = []
    for total in (3, 3, 5):
        kernel.refused = [(RefusalKeyRecord(VM, GEN, 5), RefusalCount(total, 9, PID))]
        kernel.active += 1
        counted += translator.counters(kernel, at_once=True)
    assert counted[1:] == [GmemRefusal(9, 1, 5, 3), GmemRefusal(9, 1, 5, 2)]
    translator.translate([vm_gone(0)], kernel)
    assert kernel.refused == []


def test_losses_are_reported_once(translator: BpfTranslator) -> None:
    kernel = Kernel()
    kernel.losses = [2, 0, 1]
    lost = [event for event in translator.counters(kernel) if isinstance(event, Lost)]
    assert [(one.where, one.count) for one in lost] == [("ring", 2), ("exit_counts", 1)]
    assert translator.counters(kernel) == []
    kernel.losses[0] = 3
    more = translator.counters(kernel, at_once=True)
    assert [one.count for one in more if isinstance(one, Lost)] == [1]


def test_a_vm_at_the_address_of_one_whose_end_was_missed(translator: BpfTranslator) -> None:
    kernel = Kernel()
    translator.translate([vm_new(1)], kernel)
    kernel.count(key(gen=1), 4)
    events = translator.translate([vm_new(3)], kernel)
    assert [event.kind for event in events] == ["exit", "vm_gone", "vm_seen"]
    assert [event.vm for event in events if isinstance(event, (Exit, VmGone, VmSeen))] == [1, 1, 2]
    assert kernel.rows == []


def test_new_programs_count_from_zero(translator: BpfTranslator) -> None:
    kernel = Kernel()
    kernel.count(key(), 4)
    assert [one.count for one in read_exits(translator, kernel)] == [4]
    assert translator.reset() == []
    kernel = Kernel()
    kernel.count(key(), 3)
    assert [one.count for one in read_exits(translator, kernel)] == [3]
