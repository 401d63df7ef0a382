"""Signals reported once: by their records, or by the counters."""

from __future__ import annotations

from kvmtrace.events import Sigbus, VmGone
from kvmtrace.sources.bpf import records
from kvmtrace.sources.bpf.signals import (
    FaultRecord,
    SigbusCount,
    SigbusKey,
    SigbusRecord,
    SignalCounts,
)
from kvmtrace.sources.bpf.translator import BpfTranslator
from tests.unit.test_bpf_translator import Kernel

KEY = SigbusKey(0xFFFF1000, 3, 0x7F00, 4, 12, 186, 185, 0, 186)
VM = (0xFFFF1000, 3)


def record(total: int) -> SigbusRecord:
    header = records.Header(9, KEY.kvm, KEY.gen, records.SIGBUS, 186, 185, 0)
    return SigbusRecord(header, KEY.hva, KEY.code, KEY.lsb, 186, 185, 0, 0, total)


def uncounted(counts: SignalCounts, total: int, sent: int) -> list[tuple[int, int]]:
    row = (KEY, SigbusCount(total, sent, 77, 0, 0))
    return [(count, ts) for _, count, ts in counts.uncounted([row])]


def test_records_on_their_way_are_waited_for() -> None:
    counts = SignalCounts()
    assert counts.record(record(1)) == 1
    assert uncounted(counts, 2, 2) == []
    assert counts.record(record(2)) == 1
    assert uncounted(counts, 2, 2) == []


def test_counters_report_what_no_record_reports() -> None:
    counts = SignalCounts()
    assert counts.record(record(1)) == 1
    assert uncounted(counts, 1000, 200) == [(999, 77)]
    # Sent before, read only now.
    assert counts.record(record(200)) == 0
    assert uncounted(counts, 1000, 200) == []
    assert counts.record(record(1001)) == 1


def test_a_record_stands_for_those_that_found_no_room() -> None:
    counts = SignalCounts()
    assert counts.record(record(5)) == 5


def test_a_full_map_leaves_the_records() -> None:
    counts = SignalCounts()
    assert [counts.record(record(0)) for _ in range(2)] == [1, 1]


def test_counted_signals_are_like_the_last_of_their_kind() -> None:
    counts = SignalCounts()
    counts.record(record(1))
    latest = Sigbus(9, 185, 186, 4, 0x7F00, 12, sender=186, vm=1, vcpu=0, gfn=8)
    counts.remember(latest)
    ((like, _, _),) = counts.uncounted([(KEY, SigbusCount(3, 1, 77, 0, 0))])
    assert counts.lookup(like) == latest
    assert (like.h.kvm, like.h.tgid, like.target_tid, like.vcpu) == (KEY.kvm, 185, 186, 0)


def test_the_end_of_a_vm() -> None:
    counts = SignalCounts()
    counts.record(record(4))
    assert counts.forget((VM[0], 2)) == []
    assert [bytes(key) for key in counts.forget(VM)] == [bytes(KEY)]
    assert counts.forget(VM) == []


def test_what_is_no_size_is_not_known() -> None:
    """Found by `make fuzz`: a shift by it raised ValueError."""
    signal = record(1)
    signal.lsb = -1
    fault = FaultRecord(signal.h, 8, KEY.hva, 0, 0)
    fault.h.type = records.FAULT
    translator = BpfTranslator(0, ({}, {}), "/nonexistent")
    (one,) = [
        event
        for event in translator.translate([bytes(signal), bytes(fault)], Kernel())
        if isinstance(event, Sigbus)
    ]
    assert (one.lsb, one.gfn) == (None, 8)


def test_a_signal_without_its_fault_comes_before_the_end_of_its_vm() -> None:
    """As if the program that records faults had been skipped."""
    signal = record(1)
    gone = records.VmRecord(records.Header(11, KEY.kvm, KEY.gen, records.VM_GONE, 185, 185, 0))
    translator = BpfTranslator(0, ({}, {}), "/nonexistent")
    events = translator.translate([bytes(signal), bytes(gone)], Kernel())
    kinds = [type(event) for event in events if isinstance(event, Sigbus | VmGone)]
    assert kinds == [Sigbus, VmGone]
