"""Records → events: joins that hold, and joins that must not."""

from __future__ import annotations

import itertools
from typing import Any

import pytest

from kvmtrace.events import (
    Event,
    Exit,
    GmemPoison,
    GmemRefusal,
    Lost,
    Mce,
    Owned,
    Owner,
    Poison,
    Sigbus,
    SoftOffline,
    Unpoison,
    VmGone,
    VmSeen,
)
from kvmtrace.sources.ftrace.attach import PROBES
from kvmtrace.sources.ftrace.exits import KVM_PFN_ERR_HWPOISON
from kvmtrace.sources.ftrace.muting import ExitMuting, SignalMuting, exclusions
from kvmtrace.sources.ftrace.records import Record
from kvmtrace.sources.ftrace.totals import (
    ExitKey,
    KernelTotals,
    RefusalKey,
    SignalDetails,
    SignalKey,
    VcpuOwner,
)
from kvmtrace.sources.ftrace.translator import FtraceTranslator
from kvmtrace.sources.ftrace.vms import VmResolver
from kvmtrace.sources.limits import MAX_MUTED, MUTE_AFTER
from kvmtrace.sources.vm_table import VmTable

VM, VCPU, PID, TID = 0xFFFF800000000000, 0xFFFF900000000000, 4194300, 4194301
HANDLER = 0xFFFFFFFFC0001000
GFN = 0x108


class World:
    """A translator, and records with a clock of their own."""

    def __init__(self, watches_gmem: bool = True) -> None:
        self.translator = FtraceTranslator(VmResolver(VmTable("/nonexistent"), lambda tid: None))
        self.translator.exits.watches_gmem = watches_gmem
        self._ts = itertools.count(1_000_000_000, 1000)
        self.exits = 0

    def record(self, probe: str, **fields: Any) -> Record:
        base = {"common_pid": TID, "kvm": VM, "tgid": PID}
        return Record(next(self._ts), probe, base | fields)

    def gmem(self, ret: int, gfn: int = GFN, caller: int = HANDLER + 0x1D1, **other: Any) -> Record:
        slot = {"base": 0x100, "npages": 64, "hva": 0x7F0000000000, "flags": 4}
        slot |= {"as_id": 0, "pgoff": 0, "ino": 77}
        return self.record("gmem", gfn=gfn, ret=ret, __probe_ret_ip=caller, **slot | other)

    def faultin(self, ret: int, gfn: int = GFN, **other: Any) -> Record:
        self.exits += 1
        known = {"vcpu": VCPU, "vid": 0, "exits": self.exits, "gfn": gfn, "pfn": 0}
        known |= {"write": 1, "exec": 0, "private": 0, "prefetch": 0, "__probe_func": HANDLER}
        return self.record("faultin", ret=ret, **known | other)

    def run(self, ret: int, reason: int = 39, gpa: int = GFN << 12, **other: Any) -> Record:
        known = {"vcpu": VCPU, "vid": 0, "exits": self.exits, "reason": reason}
        known |= {"gpa": gpa, "flags": 0, "size": 4096}
        return self.record("run", ret=ret, **known | other)

    def feed(self, *records: Record, **options: Any) -> list[Event]:
        return self.translator.batch(records, next(self._ts), **options)

    def exits_of(self, *records: Record, **options: Any) -> list[Exit]:
        return [e for e in self.feed(*records, **options) if isinstance(e, Exit)]


def poisoned(world: World) -> list[Event]:
    """A poisoned page is touched."""
    return world.feed(world.gmem(-133), world.faultin(-133), world.run(-133))


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


def test_a_storm_is_muted_until_it_is_over() -> None:
    world = World()
    for _ in range(200):
        world.feed(world.gmem(-133), world.faultin(-133), world.run(-133))
    muting = world.translator.exits.muting
    assert muting.changed
    conditions = exclusions(muting.conditions())
    assert conditions == {
        "run": f" && !(vcpu == {VCPU:#x} && ret == -133 && gpa == 0x108000)",
        "gmem": f" && !(kvm == {VM:#x} && gfn == 0x108)",
        "faultin": f" && !(vcpu == {VCPU:#x} && ret == -133 && gfn == 0x108)",
        "run_under_way": " && !(errno < 0)",
    }
    # Another vCPU's fault on that page: its gmem record would be muted, so nothing is concluded.
    (other,) = world.exits_of(world.faultin(-14, vcpu=VCPU + 64), world.run(-14, vcpu=VCPU + 64))
    assert other.gmem is None
    key = ExitKey(VCPU, -133, 39, GFN << 12, 0)
    assert [e.count for e in world.exits_of(totals=KernelTotals({key: 5000}))] == [4800]
    for _ in range(3):
        assert muting
        world.feed(totals=KernelTotals({key: 5000}))
    assert not muting
    assert set(exclusions(muting.conditions()).values()) == {""}


def test_all_that_can_be_muted_fits_into_a_filter() -> None:
    """event_filter_write takes less than a page; the numbers are as long as they can be."""
    exits, signals = ExitMuting(), SignalMuting()
    top = (1 << 64) - 1
    for n in range(2 * MAX_MUTED):
        vcpu, gpa = top - n, top - (n << 12)
        fault = ExitKey(vcpu, -4095, 39, gpa, top)
        for probe in ("sigbus", "sigbus_forced"):
            signal = SignalKey(probe, (1 << 22) - n, 4, top - n)
            for _ in range(MUTE_AFTER):
                exits.event(fault, top)
                signals.event(signal, top)
            signals.fault(signal, vcpu, top >> 12)
            signals.returned(signal, vcpu)
    conditions = (exits.conditions(), signals.conditions())
    assert len(conditions[0]["run"]) == len(conditions[1]["run"]) == MAX_MUTED
    for event, excluded in exclusions(*conditions).items():
        for _, ordinary in PROBES[event].filters:
            assert len(f"({ordinary}){excluded}") < 4096, event


def test_nothing_is_muted_after_the_kernel_refused_a_filter() -> None:
    world = World()
    for _ in range(MUTE_AFTER):
        world.feed(world.gmem(-133), world.faultin(-133), world.run(-133))
    assert world.translator.filter_exclusions()
    world.translator.exclusions_refused()
    muting = world.translator.exits.muting
    assert not muting
    assert not muting.is_muted(VM, GFN)
    # Another fault of the page: guest_memfd would have a record.
    (event,) = world.exits_of(world.faultin(-14), world.run(-14))
    assert event.gmem == 0
    for _ in range(2 * MUTE_AFTER):
        world.feed(world.gmem(-133), world.faultin(-133), world.run(-133))
    assert not muting  # nor is it tried again
    assert world.translator.filter_exclusions() is None
    world.translator.begin(watches_gmem=True)
    for _ in range(MUTE_AFTER):
        world.feed(world.gmem(-133), world.faultin(-133), world.run(-133))
    assert muting


def test_the_last_exits_of_a_storm_are_reported_before_the_vm_is_gone() -> None:
    world = World()
    for _ in range(200):
        world.feed(world.gmem(-133), world.faultin(-133), world.run(-133))
    key = ExitKey(VCPU, -133, 39, GFN << 12, 0)
    other = ExitKey(VCPU + 64, -133, 39, GFN << 12, 0)
    totals = KernelTotals({key: 1000, other: 5})
    events = world.feed(world.record("vm_gone"), read_totals=lambda: totals)
    assert [type(e) for e in events] == [Exit, VmGone]
    assert isinstance(events[0], Exit)
    assert events[0].count == 800
    assert not world.translator.exits.muting


def test_an_address_used_again_is_another_vm() -> None:
    world = World()
    (one,) = world.exits_of(world.run(-14, reason=0))
    world.feed(world.record("vm_gone"))
    (other,) = world.exits_of(world.run(-14, reason=0))
    assert one.vm != other.vm


# -- poison


def slot(world: World, **other: Any) -> Record:
    known = {"change": 0, "old_base": 0, "old_as_id": 0, "base": 0x100, "npages": 64}
    known |= {"hva": 0x7F0000000000, "flags": 4, "as_id": 0, "pgoff": 16, "ino": 77}
    return world.record("slot", **known | other)


def error(world: World, index: int = 24, **other: Any) -> Record:
    mapping = 0xFFFFA00000000100
    known = {"mapping": mapping, "index": index, "ino": 77, "entry": mapping + 0x100000}
    return world.record("gmem_error", **known | {"next": mapping + 64} | other)


def test_the_owner_of_a_poisoned_page_is_known_by_its_slot() -> None:
    world = World()
    events = world.feed(world.record("vm_new", ret=0), slot(world), error(world))
    found = events[-1]
    assert isinstance(found, GmemPoison)
    assert found.owners == (Owner(1, 0x108, 0x7F0000008000),)
    assert found.complete


@pytest.mark.parametrize(
    ("change", "gone"), [(1, True), (2, True), (3, False)], ids=["deleted", "moved", "flags"]
)
def test_slots_change(change: int, gone: bool) -> None:
    world = World()
    old = {"old_base": 0x100}
    new = {"base": 0x500} if change == 2 else {"npages": 0} if change == 1 else {}
    events = world.feed(
        world.record("vm_new", ret=0),
        slot(world),
        slot(world, change=change, **old | new),
        error(world),
    )
    found = events[-1]
    assert isinstance(found, GmemPoison)
    gfns = [owner.gfn for owner in found.owners]
    assert gfns == ([0x508] if change == 2 else [None] if gone else [0x108])
    assert found.complete == (change != 1)


def test_a_vm_that_was_there_before_owns_pages_somewhere() -> None:
    world = World()
    (_, found) = world.feed(error(world))
    assert isinstance(found, GmemPoison)
    assert found.owners == (Owner(1, None),)
    assert not found.complete


def test_an_empty_list_names_no_owner() -> None:
    world = World()
    head = error(world)
    head.fields["entry"] = head.fields["mapping"] + 64
    (found,) = world.feed(head)
    assert isinstance(found, GmemPoison)
    assert (found.owners, found.complete) == ((), False)


def test_a_fault_names_the_owner_if_the_slot_was_not_known() -> None:
    world = World()
    world.feed(error(world, index=8))
    world.feed(world.record("poison", pfn=0x1234, type=11, result=1))
    events = world.feed(world.gmem(-133), world.faultin(-133), world.run(-133))
    assert events[0] == Owned(events[0].ts, 0x1234, Owner(1, GFN, 0x7F0000008000), "fault")
    again = world.feed(world.gmem(-133), world.faultin(-133), world.run(-133))
    assert [type(e) for e in again] == [GmemRefusal, Exit]


def test_poison_has_the_kernels_words_or_its_numbers() -> None:
    world = World()
    world.translator.poisons._types, world.translator.poisons._results = {11: "dirty page"}, {}
    (event,) = world.feed(world.record("poison", pfn=0x1234, type=11, result=9))
    assert isinstance(event, Poison)
    assert (event.page_type, event.result, event.page_type_nr, event.result_nr) == (
        "dirty page",
        "9",
        11,
        9,
    )


def test_a_machine_check_without_a_valid_address() -> None:
    world = World()
    base = {"addr": 0x12345000, "bank": 4, "cpu": 1, "socketid": 0, "misc": 0x8C}
    events = world.feed(
        world.record("mce", status=1 << 58 | 1 << 63, **base),
        world.record("mce", status=1 << 63, **base),
    )
    assert [(e.addr, e.pfn) for e in events if isinstance(e, Mce)] == [
        (0x12345000, 0x12345),
        (None, None),
    ]


# -- signals


def sigbus(world: World, probe: str = "sigbus", **other: Any) -> Record:
    known = {"code": 4, "addr": 0x7F0000008000, "lsb": 12, "tid": TID}
    if probe == "sigbus_forced":
        del known["tid"]
    return world.record(probe, **known | other)


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


# -- counts


def test_exits_dropped_a_while_before_the_end_are_reported_before_the_vm_is_gone() -> None:
    """Also by keys that were never muted, and of vCPUs of which no event came."""
    world = World()
    world.feed(world.run(-14, reason=0), faults_dropped=True)
    world.feed()
    world.feed()
    bare, other = ExitKey(VCPU, -14, 0), ExitKey(VCPU + 64, -14, 0)
    whose = {VCPU: {VcpuOwner(VM, 0, PID): 50}, VCPU + 64: {VcpuOwner(VM, 1, PID): 7}}
    totals = KernelTotals({bare: 50, other: 7}, vcpu_owners=whose)
    events = world.feed(world.record("vm_gone"), read_totals=lambda: totals)
    assert [(type(e), getattr(e, "count", None)) for e in events] == [
        (Exit, 49),
        (Exit, 7),
        (VmGone, None),
    ]


def test_counts_that_were_settled_need_not_be_read_again_at_the_end() -> None:
    def never() -> KernelTotals:
        raise AssertionError("read")

    world = World()
    world.feed(world.run(-14, reason=0), faults_dropped=True)
    assert world.translator.counts_pending
    world.feed(totals=KernelTotals({ExitKey(VCPU, -14, 0): 1}))
    assert not world.translator.counts_pending
    assert [type(e) for e in world.feed(world.record("vm_gone"), read_totals=never)] == [VmGone]


def signal_key(probe: str = "sigbus", addr: int = 0x7F0000008000) -> SignalKey:
    return SignalKey(probe, TID, 4, addr)


def test_a_storm_of_signals_is_muted_counted_and_reported() -> None:
    world = World()
    for _ in range(200):
        fault = world.faultin(1, pfn=KVM_PFN_ERR_HWPOISON)
        events = world.feed(sigbus(world), fault)
        assert [(e.gfn, e.count) for e in events if isinstance(e, Sigbus)] == [(GFN, 1)]
    assert world.translator.filter_exclusions() == {
        "run": "",
        "run_under_way": "",
        "gmem": "",
        "sigbus": f" && !(tid == {TID} && addr == 0x7f0000008000)",
        "sigbus_forced": "",
        "faultin": f" && !(vcpu == {VCPU:#x} && ret >= 0 && gfn == 0x108)",
    }
    assert world.translator.filter_exclusions() is None
    # Still in the ring from before it was muted: the counts have it.
    assert world.feed(sigbus(world), world.faultin(1, pfn=KVM_PFN_ERR_HWPOISON)) == []
    (rest,) = world.feed(totals=KernelTotals(signals={signal_key(): 5000}))
    assert isinstance(rest, Sigbus)
    assert (rest.count, rest.gfn, rest.vm, rest.vcpu, rest.lsb) == (4800, GFN, 1, 0, 12)
    last = KernelTotals(signals={signal_key(): 5010, signal_key(addr=0): 3})
    events = world.feed(world.record("vm_gone"), read_totals=lambda: last)
    assert [(type(e), getattr(e, "count", None)) for e in events] == [(Sigbus, 10), (VmGone, None)]


def test_in_a_storm_of_signals_the_ways_out_are_muted_too() -> None:
    world = World()
    for _ in range(200):
        world.feed(sigbus(world), world.run(-4, reason=10))
    muted = world.translator.filter_exclusions()
    assert muted is not None
    assert muted["run"] == f" && !(vcpu == {VCPU:#x} && ret == -4)"
    for _ in range(5):
        world.feed(totals=KernelTotals(signals={signal_key(): 200}))
    muted = world.translator.filter_exclusions()
    assert muted is not None
    assert muted["run"] == ""


def test_without_counts_nothing_is_muted() -> None:
    world = World()
    world.translator.begin(watches_gmem=True, counts_exits=False, counts_signals=False)
    for _ in range(300):
        world.feed(sigbus(world), world.run(-14, reason=0))
    assert world.translator.filter_exclusions() is None


def test_signals_of_which_no_event_came() -> None:
    world = World()
    world.feed(world.record("vm_new", ret=0))
    key = signal_key("sigbus_forced")
    totals = KernelTotals(signals={key: 7}, signal_details={key: SignalDetails(21, PID)})
    (event,) = world.feed(totals=totals, signals_dropped=True)
    assert event == Sigbus(event.ts, PID, TID, 4, 0x7F0000008000, 21, vm=1, count=7)
    assert world.translator.counts_pending


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


def test_pages_moved_away_and_pages_taken_back() -> None:
    world = World()
    events = world.feed(
        world.record("soft_offline", pfn=0x1234, ret=0),
        world.record("soft_offline", pfn=0x1235, ret=-16),
        world.record("unpoison", pfn=0x1236, ret=0),
        world.record("unpoison", pfn=0x1237, ret=-16),
    )
    assert events == [
        SoftOffline(events[0].ts, 0x1234, 0),
        SoftOffline(events[1].ts, 0x1235, 16),
        Unpoison(events[2].ts, 0x1236),
    ]


def test_a_record_without_a_field_that_is_needed_costs_that_record() -> None:
    """A kernel may give a field of its tracepoint another name."""
    world = World()
    lacking = world.record("mce", status=0, addr=0, bank=1, cpu=0)  # no socketid
    whole = world.record("poison", pfn=5, type=1, result=2)
    events = world.translator.batch([lacking, whole], 2_000_000_000)
    assert [type(event) for event in events] == [Poison, Lost]
    assert events[1] == Lost(2_000_000_000, "ftrace_damaged", 1)
