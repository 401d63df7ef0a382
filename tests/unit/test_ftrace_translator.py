"""Records → events: joins that hold, and joins that must not."""

from __future__ import annotations

from typing import Any

import pytest

from kvmtrace.events import Exit, GmemRefusal, Lost, Poison, Sigbus, VmGone, VmSeen
from kvmtrace.sources.ftrace.exits import KVM_PFN_ERR_HWPOISON
from kvmtrace.sources.ftrace.totals import ExitKey, KernelTotals, RefusalKey, VcpuOwner
from tests.unit.ftrace_world import GFN, HANDLER, PID, TID, VCPU, VM, World, poisoned, sigbus


def test_a_poisoned_page_is_touched() -> None:
    world = World()
    (event,) = world.exits_of(world.gmem(-133), world.faultin(-133), world.run(-133))
    assert (event.errno, event.reason, event.annotated, event.count) == (133, 39, True, 1)
    assert (event.gpa, event.gfn, event.size, event.flags, event.private) == (
        0x108000,
        0x108,
        4096,
        0,
        False,
    )
    assert (event.gmem, event.access, event.tid) == (133, "w", TID)


def test_a_conversion_does_not_call_guest_memfd() -> None:
    world = World()
    (event,) = world.exits_of(world.faultin(-14), world.run(-14))
    assert event.gmem == 0


def test_without_the_gmem_probe_nothing_is_concluded() -> None:
    world = World(watches_gmem=False)
    (event,) = world.exits_of(world.faultin(-14), world.run(-14))
    assert event.gmem is None


def test_a_call_that_began_before_the_start_is_reported_by_its_tracepoint() -> None:
    world = World()
    behind = world.record("run_under_way", errno=-133, reason=39)
    (event,) = world.exits_of(world.gmem(-133), world.faultin(-133), behind)
    assert (event.errno, event.reason, event.annotated, event.vcpu) == (133, 39, True, 0)
    assert (event.gfn, event.gmem, event.access, event.gpa, event.tid) == (GFN, 133, "w", None, TID)
    # What `run` saw is not reported again, nor is what another call failed with.
    for known in ((world.faultin(-133), world.run(-133)), (world.faultin(-14),)):
        behind = world.record("run_under_way", errno=-133, reason=39)
        assert len(world.exits_of(*known, behind)) == len(known) - 1
    assert world.exits_of(world.faultin(-133), behind, faults_dropped=True) == []


@pytest.mark.parametrize("reason", [0, 2, 17])
def test_junk_of_another_union_member_never_shows(reason: int) -> None:
    world = World()
    (event,) = world.exits_of(world.faultin(-14), world.run(-14, reason, 0x200))
    assert not event.annotated
    assert (event.gpa, event.flags, event.size) == (None, None, None)
    assert event.gfn == GFN  # the fault handler's own


def test_a_stale_reason_39_is_not_annotated() -> None:
    world = World()
    (event,) = world.exits_of(world.run(-12))
    assert (event.annotated, event.gpa, event.gfn, event.private) == (False, None, None, None)


def test_a_fault_of_another_exit_is_not_joined() -> None:
    world = World()
    stale = world.faultin(-14, gfn=0x999)
    world.exits += 1
    (event,) = world.exits_of(stale, world.run(-14, reason=0))
    assert (event.gfn, event.access, event.gmem) == (None, None, None)


def test_a_prefault_is_not_joined() -> None:
    world = World()
    prefault = [world.gmem(-133), world.faultin(-133, prefetch=1)]
    world.exits -= 1
    (event,) = world.exits_of(*prefault, world.run(-14, reason=0))
    assert (event.gfn, event.gmem) == (None, None)


def test_a_failed_call_of_another_function_is_not_of_this_fault() -> None:
    world = World()
    elsewhere = world.gmem(-14, caller=HANDLER + 0x90000)
    (event,) = world.exits_of(elsewhere, world.faultin(-14), world.run(-14))
    assert event.gmem == 0


def test_without_a_token_nothing_is_joined() -> None:
    world = World()
    fault, run = world.faultin(-14), world.run(-14)
    del fault.fields["exits"]
    (event,) = world.exits_of(fault, run)
    assert (event.access, event.gmem) == (None, None)


def test_with_records_dropped_a_missing_one_means_nothing() -> None:
    world = World()
    (event,) = world.exits_of(world.faultin(-14), world.run(-14), faults_dropped=True)
    assert event.gmem is None


def test_exits_of_one_kind_in_a_batch_are_two_events_that_count_all() -> None:
    world = World()
    records = []
    for _ in range(50):
        records += [world.gmem(-133), world.faultin(-133), world.run(-133)]
    events = world.exits_of(*records)
    assert [e.count for e in events] == [1, 49]
    assert events[1].ts == records[-1].ts
    assert events[0].gmem == events[1].gmem == 133


def test_exits_known_by_counts_alone_have_the_details_of_their_key() -> None:
    world = World()
    first = world.exits_of(world.gmem(-133), world.faultin(-133), world.run(-133))
    key = ExitKey(VCPU, -133, 39, GFN << 12, 0)
    (rest,) = world.exits_of(totals=KernelTotals({key: 1000}))
    assert rest.count == 999
    assert (rest.gmem, rest.access, rest.gfn, rest.vm) == (133, "w", GFN, first[0].vm)
    assert world.exits_of(totals=KernelTotals({key: 1000})) == []


def test_counts_of_a_vcpu_never_seen() -> None:
    world = World()
    key = ExitKey(VCPU, -133, 39, GFN << 12, 8)
    totals = KernelTotals({key: 7}, {key: 4096}, {VCPU: {VcpuOwner(VM, 3, PID): 7}})
    (event,) = world.exits_of(totals=totals)
    assert (event.vcpu, event.count, event.gfn, event.size, event.private) == (
        3,
        7,
        GFN,
        4096,
        True,
    )
    assert (event.gmem, event.access) == (None, None)


def test_an_address_used_again_is_another_vm() -> None:
    world = World()
    (one,) = world.exits_of(world.run(-14, reason=0))
    world.feed(world.record("vm_gone"))
    (other,) = world.exits_of(world.run(-14, reason=0))
    assert one.vm != other.vm


def test_kvms_own_signal_has_the_vcpu_and_gfn() -> None:
    world = World()
    events = world.feed(sigbus(world), world.faultin(1, pfn=KVM_PFN_ERR_HWPOISON))
    (signal,) = [e for e in events if isinstance(e, Sigbus)]
    assert (signal.vm, signal.vcpu, signal.gfn) == (1, 0, GFN)
    assert (signal.pid, signal.tid, signal.sender, signal.lsb) == (PID, TID, TID, 12)
    assert signal.ts < events[-1].ts or events[-1] is signal


def test_without_a_pfn_the_return_of_kvm_run_names_the_vcpu() -> None:
    world = World()
    events = world.feed(sigbus(world), world.run(-4, reason=10))
    assert [(e.vm, e.vcpu, e.gfn) for e in events if isinstance(e, Sigbus)] == [(1, 0, None)]
    # After a fault that reported more, nothing is left to report; nor without a signal.
    events = world.feed(sigbus(world), world.faultin(1, pfn=KVM_PFN_ERR_HWPOISON), world.run(-4))
    assert [(e.vcpu, e.gfn) for e in events if isinstance(e, Sigbus)] == [(0, GFN)]
    assert not [e for e in events if isinstance(e, Exit)]
    assert world.feed(world.run(-4, reason=10)) == []


@pytest.mark.parametrize("lsb", [-1, 64, 1 << 15])
def test_what_is_no_size_is_not_known(lsb: int) -> None:
    world = World()
    (event,) = [e for e in world.feed(sigbus(world, lsb=lsb)) if isinstance(e, Sigbus)] or [
        e for e in world.translator.batch([], 1 << 62, last=True) if isinstance(e, Sigbus)
    ]
    assert event.lsb is None


def test_its_fault_may_come_in_the_next_batch() -> None:
    world = World()
    assert world.feed(sigbus(world)) == []
    events = world.feed(world.faultin(1, pfn=KVM_PFN_ERR_HWPOISON))
    assert [e.gfn for e in events if isinstance(e, Sigbus)] == [GFN]


def test_a_signal_without_its_fault_is_reported_all_the_same() -> None:
    world = World()
    world.feed(sigbus(world))
    assert world.translator.signals.any_waiting
    (event,) = world.translator.batch([], 2_000_000_000)
    assert isinstance(event, Sigbus)
    assert (event.vm, event.gfn) == (None, None)
    world.feed(sigbus(world))
    assert len(world.feed(last=True)) == 1


def test_what_cannot_be_private_is_no_conversion() -> None:
    """Whichever of guest_memfd's answers were recorded."""
    cases: tuple[tuple[dict[str, Any], int | None], ...]
    cases = (({}, None), ({"has_private": 1}, None), ({"has_private": 0}, 14))
    for fields, expected in cases:
        world = World()
        events = world.exits_of(world.run(-14, **fields), faults_dropped=True)
        counts = KernelTotals(exits={ExitKey(VCPU, -14, 39, (GFN + 1) << 12, 0): 5})
        events += world.exits_of(totals=counts)
        assert [(e.gmem, e.count) for e in events] == [(expected, 1), (expected, 5)]
    world = World()
    world.feed(world.record("vm_new", ret=0, has_private=0))
    (exit_,) = world.exits_of(world.faultin(-14), world.run(-14))
    assert (exit_.gmem, exit_.access) == (14, "w")
    (exit_,) = world.exits_of(world.faultin(-14), world.run(-14, reason=0))
    assert exit_.gmem == 0
    world.feed(world.record("vm_gone"))
    (exit_,) = world.exits_of(world.faultin(-14, gfn=9), world.run(-14, gpa=9 << 12))
    assert exit_.gmem == 0


def test_a_vm_whose_end_was_missed_ends_where_the_next_one_begins() -> None:
    """With the counts that no event reported yet, which are not the next one's."""
    world = World()
    first = [*world.feed(world.record("vm_new", ret=0)), *poisoned(world)]
    key = next(e for e in first if isinstance(e, Exit)).vm
    world.translator.exits.counts_pending = True
    counts = KernelTotals(exits={ExitKey(VCPU, -133, 39, GFN << 12, 0): 5})
    events = world.feed(world.record("vm_new", ret=0, tgid=PID + 1), read_totals=lambda: counts)
    assert [(e.vm, e.count) for e in events if isinstance(e, Exit)] == [(key, 4)]
    assert [e.vm for e in events if isinstance(e, VmGone)] == [key]
    (seen,) = (e for e in events if isinstance(e, VmSeen))
    assert (seen.vm, seen.pid) == (key + 1, PID + 1)


def test_a_waiting_signal_keeps_its_vm_though_that_is_gone_meanwhile() -> None:
    world = World()
    events = world.feed(world.record("vm_new", ret=0), sigbus(world), world.record("vm_gone"))
    events += world.feed(last=True)
    assert [e.vm for e in events if isinstance(e, Sigbus)] == [1]


def test_signals_of_memory_failure_do_not_wait() -> None:
    world = World()
    world.feed(world.record("vm_new", ret=0))
    events = world.feed(
        sigbus(world, "sigbus_forced"), sigbus(world, code=5, tid=TID + 9, common_pid=2)
    )
    assert [(e.vm, e.tid, e.code) for e in events if isinstance(e, Sigbus)] == [
        (1, TID, 4),
        (1, TID + 9, 5),
    ]


def test_arm64_has_address_and_access_in_registers() -> None:
    world = World()
    fault = world.faultin(-14)
    for name in ("gfn", "pfn", "write", "exec", "private", "prefetch"):
        del fault.fields[name]
    fault.fields.update(hpfar=0x108 << 4, esr=0x24 << 26 | 1 << 6)
    (event,) = world.exits_of(fault, world.run(-14, reason=0))
    assert (event.gfn, event.access, event.private) == (GFN, "w", None)


@pytest.mark.parametrize(("flags", "gfn"), [(1, GFN), (0, None)])
def test_arm64s_own_exit_has_no_errno(flags: int, gfn: int | None) -> None:
    world = World()
    sea = {"vcpu": VCPU, "vid": 2, "reason": 41, "ret": 0, "flags": flags, "gpa": GFN << 12}
    (event,) = world.exits_of(world.record("arm_sea", **sea))
    assert (event.vm, event.vcpu, event.errno, event.reason, event.gfn) == (1, 2, 0, 41, gfn)
    assert (event.annotated, event.gpa, event.tid) == (False, None, TID)
    assert event.is_poison


@pytest.mark.parametrize("errno", [14, 5, 133, 12])
def test_arm64s_nested_virtualization_faults_without_an_errno(errno: int) -> None:
    """kvm_handle_vncr_abort: guest_memfd failed in this thread, and KVM_RUN returns 0."""
    world = World()
    vncr = {"vcpu": VCPU, "vid": 2, "reason": 39, "ret": 0, "gpa": GFN << 12 | 0x10}
    vncr |= {"flags": 0, "size": 4096}
    for gmem, known in (
        (world.gmem(-errno), errno),
        (world.gmem(-errno, gfn=9), None),
        (None, None),
    ):
        records = [] if gmem is None else [gmem]
        (event,) = world.exits_of(*records, world.record("vncr", **vncr))
        assert (event.errno, event.reason, event.annotated, event.count) == (0, 39, True, 1)
        assert (event.vcpu, event.tid, event.gpa, event.gfn) == (2, TID, GFN << 12 | 0x10, GFN)
        assert (event.flags, event.size, event.private, event.gmem) == (0, 4096, False, known)
    # What the ring had no room for.
    key = ExitKey(VCPU, 0, 39, GFN << 12 | 0x10, 0)
    (rest,) = world.exits_of(totals=KernelTotals({key: 1000}))
    assert (rest.errno, rest.reason, rest.annotated, rest.count) == (0, 39, True, 997)
    assert (rest.vcpu, rest.gpa, rest.gfn) == (2, GFN << 12 | 0x10, GFN)


@pytest.mark.parametrize(
    ("failing", "watches", "gmem"),
    [
        (set(), True, 0),
        ({VM + 64}, True, 0),
        ({VM}, True, None),
        (None, True, None),
        (set(), False, None),
    ],
)
def test_conversions_known_by_counts_alone(
    failing: set[int] | None, watches: bool, gmem: int | None
) -> None:
    """Where guest_memfd of that VM has never failed there is nothing else that they can be."""
    world = World(watches_gmem=watches)
    world.feed(world.record("vm_new", ret=0, has_private=1))
    rest, one = ExitKey(VCPU, -14, 39), ExitKey(VCPU, -14, 39, 9 << 12, 8)
    bare, odd = ExitKey(VCPU, -14, 0), ExitKey(VCPU, -14, 39, 7 << 12, 16)
    events = world.exits_of(
        totals=KernelTotals(
            exits={one: 5, bare: 2},
            unkeyed={rest: 5000},
            vcpu_owners={VCPU: {VcpuOwner(VM, 0, PID): 5007}},
            gmem_efault_vms=failing,
        )
    )
    assert [(e.count, e.gmem) for e in events] == [(5, gmem), (2, None), (5000, gmem)]
    events = world.exits_of(
        totals=KernelTotals(exits={odd: 5}, unkeyed={rest: 5001}, gmem_efault_vms=failing)
    )
    assert [(e.count, e.gmem) for e in events] == [(5, None), (1, None)]


@pytest.mark.parametrize("flags", [1 << 4, 1 << 4 | 1 << 3, 1 << 5, 1 << 63])
def test_a_flag_that_is_not_mainlines_makes_no_failure_of_guest_memfd(flags: int) -> None:
    """Demand paging of a VM that has nothing private: by its event, and by counts alone."""
    world = World()
    (event,) = world.exits_of(world.faultin(-14), world.run(-14, flags=flags, has_private=0))
    assert (event.flags, event.gmem) == (flags, 0)
    rest = ExitKey(VCPU, -14, 39)
    counts = {ExitKey(VCPU, -14, 39, 9 << 12, flags): 5, ExitKey(VCPU, -14, 39, 8 << 12, 0): 6}
    by_counts = world.exits_of(totals=KernelTotals(exits=counts, unkeyed={rest: 1 + 7}, full=True))
    assert [(e.count, e.flags, e.gmem) for e in by_counts] == [
        (5, flags, None),
        (6, 0, 14),
        (7, None, None),
    ]


def test_refusals_are_reported_once_by_events_and_counts() -> None:
    world = World()
    events = world.feed(
        world.gmem(-133), world.gmem(-133), world.gmem(-14), world.gmem(-133, 0x109)
    )
    assert [(e.gfn, e.count) for e in events if isinstance(e, GmemRefusal)] == [
        (GFN, 2),
        (0x109, 1),
    ]
    totals = KernelTotals(refusals={RefusalKey(VM, GFN): 10, RefusalKey(VM, 0x109): 1})
    events = world.feed(totals=totals)
    assert [(e.vm, e.gfn, e.count) for e in events if isinstance(e, GmemRefusal)] == [(1, GFN, 8)]


def test_a_record_without_a_field_that_is_needed_costs_that_record() -> None:
    """A kernel may give a field of its tracepoint another name."""
    world = World()
    lacking = world.record("mce", status=0, addr=0, bank=1, cpu=0)  # no socketid
    whole = world.record("poison", pfn=5, type=1, result=2)
    events = world.translator.batch([lacking, whole], 2_000_000_000)
    assert [type(event) for event in events] == [Poison, Lost]
    assert events[1] == Lost(2_000_000_000, "ftrace_damaged", 1)
