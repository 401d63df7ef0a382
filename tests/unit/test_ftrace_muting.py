"""Storms are muted, and what the kernel counted of them is reported."""

from __future__ import annotations

from kvmtrace.events import Exit, Sigbus, VmGone
from kvmtrace.sources.ftrace.attach import PROBES
from kvmtrace.sources.ftrace.exits import KVM_PFN_ERR_HWPOISON
from kvmtrace.sources.ftrace.muting import ExitMuting, SignalMuting, exclusions
from kvmtrace.sources.ftrace.totals import (
    ExitKey,
    KernelTotals,
    SignalDetails,
    SignalKey,
    VcpuOwner,
)
from kvmtrace.sources.limits import MAX_MUTED, MUTE_AFTER
from tests.unit.ftrace_world import GFN, PID, TID, VCPU, VM, World, sigbus


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
