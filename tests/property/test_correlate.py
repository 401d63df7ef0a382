"""The correlator under any order of events: losses, duplicates, ends before beginnings."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable
from dataclasses import replace
from typing import Any

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from kvmtrace.correlate import Correlator, snapshots
from kvmtrace.correlate.limits import Limits
from kvmtrace.events import (
    JOIN_NS,
    KINDS,
    LAST_NS,
    ClockStep,
    Event,
    Exit,
    Found,
    GmemPage,
    GmemRefusal,
    HwError,
    KernelCounts,
    Lost,
    Owned,
    Owner,
    PageReplaced,
    Poison,
    Reboot,
    Sigbus,
    SoftOffline,
    Tick,
    Unpoison,
    VcpuState,
    VmGone,
    VmSeen,
)
from kvmtrace.model import CAUSES, CorrelatedEvent, IncidentStatus, PageClass, Snapshot, VerdictWord
from kvmtrace.sources.codec import checked, from_record, to_record
from kvmtrace.views import event_lines, json_output
from tests.property import examples
from tests.unit.fake import machine_check

# Few of each, so that things meet: the same page twice, two VMs on one thread, a key that is gone.
VMS = st.integers(1, 4)
GFNS = st.integers(0, 3)
PFNS = st.integers(0x100, 0x104)
TIDS = st.integers(1, 4)
HVA = 0x7F0000000000
HVAS = st.sampled_from([HVA, 0x7F0000001000, 0x7F0000200000])
TS = st.one_of(st.integers(0, 20_000_000_000), st.just(1_790_000_000_000_000_000))
STEPS = st.sampled_from([86400 * 10**9, -3600 * 10**9, LAST_NS, -LAST_NS])
OWNERS = st.builds(Owner, VMS, st.none() | GFNS, st.none() | HVAS)
PAGE_TYPES = st.sampled_from(
    ["dirty LRU page", "huge page", "reserved kernel page", "unknown page", "already poisoned", "a"]
)
RESULTS = st.sampled_from(["Ignored", "Failed", "Recovered", "x"])
NAMES = st.none() | st.sampled_from(["web", "db"])

GMEM_PAGES = st.builds(
    GmemPage, st.just(7), st.integers(0, 9), st.lists(OWNERS, max_size=3).map(tuple)
)

EVENTS: st.SearchStrategy[Event] = st.one_of(
    st.builds(VmSeen, TS, VMS, st.integers(4001, 4004), NAMES),
    st.builds(VmGone, TS, VMS),
    st.builds(
        Exit,
        TS,
        VMS,
        st.none() | st.integers(0, 2),
        st.sampled_from([133, 133, 14, 22, 999, 0]),
        st.sampled_from([39, 39, 0, None]),
        st.none() | st.booleans(),
        tid=TIDS,
        flags=st.sampled_from([None, 0, 8, 1 << 4, 1 << 5]),
        gfn=st.none() | GFNS,
        gmem=st.sampled_from([None, 0, 2, 133]),
        count=st.integers(1, 5),
    ),
    st.builds(
        Poison, TS, PFNS, PAGE_TYPES, RESULTS, tid=st.none() | TIDS, gmem=st.none() | GMEM_PAGES
    ),
    st.builds(
        Owned, TS, PFNS, OWNERS, st.just("pagemap"), st.sampled_from([None, 4096, 2 << 20, 3])
    ),
    st.builds(
        Sigbus,
        TS,
        st.integers(4001, 4004),
        TIDS,
        st.sampled_from([4, 5, 6]),
        HVAS,
        st.sampled_from([None, 12, 21]),
        sender=st.none() | TIDS,
        vm=st.none() | VMS,
        vcpu=st.none() | st.integers(0, 2),
        gfn=st.none() | GFNS,
        pfn=st.none() | PFNS,
        count=st.integers(1, 5),
        comm=NAMES,
    ),
    st.builds(Tick, TS),
    st.builds(PageReplaced, TS, VMS, PFNS, HVAS),
    st.builds(
        machine_check,
        TS,
        st.none(),
        st.none() | PFNS,
        st.integers(1, 2),
        st.just(0),
        st.just(0),
        st.sampled_from([0, 1 << 59, 7 << 59, 1 << 61 | 1 << 57, 1 << 44]),
        st.sampled_from([None, 0, 12, 14, 63]),
        st.integers(1, 5),
        st.sampled_from([None, "AuthenticAMD"]),
    ),
    st.builds(
        HwError,
        TS,
        st.sampled_from(["ras:mc_event", "extlog"]),
        st.sampled_from([None, "corrected", "fatal", "odd"]),
        st.none() | PFNS.map(lambda pfn: pfn << 12),
        st.none() | PFNS,
        st.sampled_from([None, 0, 1, 4096, 1 << 15, 1 << 40]),
        st.integers(1, 3),
        st.sampled_from([None, "", "DIMM_A1", "DIMM_B2"]),
    ),
    st.builds(GmemRefusal, TS, VMS, GFNS, st.integers(1, 5)),
    st.builds(SoftOffline, TS, PFNS, st.sampled_from([0, 16])),
    st.builds(Unpoison, TS, PFNS),
    st.builds(Found, TS, PFNS),
    st.builds(
        KernelCounts,
        TS,
        st.sampled_from([(), (("total", 1),), (("total", 3), ("recovered", 2))]),
        st.none() | st.integers(0, 9),
        st.booleans(),
    ),
    st.builds(
        VcpuState,
        TS,
        VMS,
        TIDS,
        st.sampled_from(["running", "waiting", "outside", "gone", "strange"]),
        st.none() | st.integers(0, 2),
        st.none() | st.integers(0, 10**9),
    ),
    st.builds(GmemRefusal, TS, VMS, GFNS, st.integers(1, 5)),
    st.builds(Unpoison, TS, PFNS),
    st.builds(Found, TS, PFNS),
    st.builds(SoftOffline, TS, PFNS, st.sampled_from([0, 16])),
    st.builds(HwError, TS, st.just("ras:mc_event"), pfn=st.none() | PFNS),
    st.builds(VcpuState, TS, VMS, TIDS, st.sampled_from(["running", "outside", "gone"])),
    st.builds(KernelCounts, TS, st.just((("total", 1),)), st.integers(0, 4) | st.none()),
    st.builds(Lost, TS, st.sampled_from(["ringbuf", "maps"]), st.integers(1, 9)),
    st.builds(ClockStep, TS, STEPS, STEPS, st.none() | st.integers(0, 10**12)),
    st.builds(Reboot, TS),
)

# Where anything may happen, what would go wrong hardly ever meets: so also two VMs, two pages and
# two threads within seconds, and nothing but what is joined.
FEW = st.integers(1, 2)
SOON = st.integers(0, 12_000_000_000)
_PAGES = st.integers(0x100, 0x101)
_NEAR = st.sampled_from([0x7F0000000000, 0x7F0000001000])
_OWNER = st.builds(Owner, FEW, FEW, st.none() | _NEAR)
_GMEM = st.builds(GmemPage, st.just(7), FEW, st.lists(_OWNER, min_size=1, max_size=2).map(tuple))
JOINED: st.SearchStrategy[Event] = st.one_of(
    st.builds(Exit, SOON, FEW, FEW, st.just(133), st.just(39), st.just(True), gfn=FEW, count=FEW),
    st.builds(Poison, SOON, _PAGES, st.just("dirty LRU page"), st.just("Failed"), tid=FEW),
    st.builds(Poison, SOON, _PAGES, PAGE_TYPES, st.just("Ignored"), tid=FEW),
    st.builds(
        Poison, SOON, _PAGES, st.just("dirty LRU page"), st.just("Failed"), tid=FEW, gmem=_GMEM
    ),
    st.builds(Owned, SOON, _PAGES, _OWNER, st.just("pagemap")),
    st.builds(
        Sigbus,
        SOON,
        st.integers(4001, 4002),
        FEW,
        st.just(4),
        _NEAR,
        st.just(12),
        sender=FEW,
        vm=st.none() | FEW,
        vcpu=st.none() | FEW,
        gfn=st.none() | FEW,
        pfn=st.none() | _PAGES,
        count=FEW,
    ),
    st.builds(GmemRefusal, SOON, FEW, FEW, FEW),
    st.builds(VcpuState, SOON, FEW, FEW, st.sampled_from(["running", "outside"]), FEW),
    st.builds(PageReplaced, SOON, FEW, _PAGES, _NEAR),
    st.builds(Unpoison, SOON, _PAGES),
    st.builds(VmGone, SOON, FEW),
    st.builds(Reboot, SOON),
)
_KNOWN = st.lists(FEW, max_size=2, unique=True).map(
    lambda keys: [VmSeen(0, key, 4000 + key) for key in keys]
)
STORIES = st.builds(lambda known, events: known + events, _KNOWN, st.lists(JOINED, max_size=30))

LOGS = st.one_of(st.lists(EVENTS, max_size=60), STORIES, STORIES)
LONG_LOGS = st.lists(EVENTS, min_size=100, max_size=250)


def fed(
    events: Iterable[Event],
    limits: Limits = Limits(),  # noqa: B008 (frozen)
) -> tuple[Correlator, list[CorrelatedEvent]]:
    correlator = Correlator(limits)
    return correlator, [correlator.feed(event) for event in events]


def snapshot(events: Iterable[Event]) -> Snapshot:
    return fed(events)[0].snapshot()


@given(LOGS)
@examples(400)
def test_any_log_can_be_fed_and_shown(events: list[Event]) -> None:
    correlator, all_told = fed(events)
    for told in all_told:
        assert (json_output.event_line(told) is None) == (event_lines.event_text(told) is None)
    json_output.top(correlator.snapshot())


@given(LOGS)
@examples(400)
def test_an_owner_is_somebody_whom_an_event_named(events: list[Event]) -> None:
    named: set[tuple[int, int | None]] = set()
    addresses: set[tuple[int, int | None]] = set()
    for event in events:
        match event:
            case Poison(gmem=GmemPage(owners=owners)):
                new = list(owners)
            case Owned():
                new = [event.owner]
            case Sigbus(vm=int(vm)):
                new = [Owner(vm, event.gfn, event.hva)]
            case Exit() | GmemRefusal():
                new = [Owner(event.vm, event.gfn)]
            case _:
                new = []
        named |= {(owner.vm, owner.gfn) for owner in new}
        addresses |= {(owner.vm, owner.hva) for owner in new if owner.hva is not None}
    for incident in snapshot(events).incidents:
        for owner in incident.owners:
            assert (owner.vm, owner.gfn) in named
            assert owner.hva is None or (owner.vm, owner.hva) in addresses


def _half_of_nothing(event: Event, poisons: list[Poison]) -> bool:
    """An event of memory_failure before it traces, without a poison of that thread after it."""
    match event:
        case Sigbus(sender=int(thread), vm=None, pfn=None):
            pass
        case _:
            return False
    return not any(p.tid == thread and 0 <= p.ts - event.ts <= JOIN_NS for p in poisons)


@given(LOGS)
@examples(400)
def test_halves_of_other_threads_and_times_join_nothing(events: list[Event]) -> None:
    poisons = [event for event in events if isinstance(event, Poison)]
    kept = [event for event in events if not _half_of_nothing(event, poisons)]
    found, allowed = (
        {(i.pfn, owner.vm, owner.gfn) for i in snapshot(log).incidents for owner in i.owners}
        for log in (events, kept)
    )
    assert found <= allowed


@given(LOGS)
@examples(400)
def test_a_fault_belongs_to_an_incident_of_its_own_vm(events: list[Event]) -> None:
    correlator = Correlator()
    for event in events:
        told = correlator.feed(event)
        if isinstance(event, Exit) and told.incident is not None:
            assert told.cause == "hwpoison"
            incident = {i.id: i for i in correlator.snapshot().incidents}[told.incident]
            exact = (event.vm, event.gfn) in {(o.vm, o.gfn) for o in incident.owners}
            losses = [incident.lost_gfns(o) for o in incident.owners if o.vm == event.vm]
            within = [a <= event.gfn <= b for a, b in filter(None, losses) if event.gfn is not None]
            assert exact or any(within)


@given(STORIES)
@examples(400)
def test_a_signal_without_more_is_joined_by_an_address_of_its_own_vm(events: list[Event]) -> None:
    correlator = Correlator()
    for event in events:
        if not isinstance(event, Sigbus) or event.vm is None:
            correlator.feed(event)
            continue
        vague = replace(event, pfn=None, gfn=None)
        before = {incident.id: incident for incident in correlator.snapshot().incidents}
        told = correlator.feed(vague)
        if told.incident is not None:
            incident = before[told.incident]
            size = max(incident.size or 4096, 1 << (vague.lsb or 0))
            assert any(
                owner.vm == vague.vm
                and owner.hva is not None
                and vague.hva is not None
                and owner.hva // size == vague.hva // size
                for owner in incident.owners
            )


# Of the page's two VMs, the first is gone: the incident is the other one's.
_ONE_OF_TWO_IS_GONE: list[Event] = [
    VmSeen(0, 1, 4001),
    VmSeen(0, 2, 4002),
    VmGone(0, 1),
    Poison(0, 256, "dirty LRU page", "Failed", gmem=GmemPage(7, 1, (Owner(1, 1), Owner(2, 1)))),
    Sigbus(0, 4002, 1, 4, HVA, 12, 1, pfn=256),
]


@example(_ONE_OF_TWO_IS_GONE)
@given(LOGS)
@examples(400)
def test_vms_do_not_leak_into_each_other(events: list[Event]) -> None:
    """The report about the other VMs does not change if VM 1's faults are left out.

    Its end is not: a page that it had may be another VM's when it is poisoned again.
    """
    others = [
        event
        for event in events
        if not (isinstance(event, Exit | Sigbus | GmemRefusal) and event.vm == 1)
    ]
    with_, without = snapshot(events), snapshot(others)
    for key, vm in without.vms.items():
        if key != 1 and key in with_.vms:
            assert dict(vm.exits) == dict(with_.vms[key].exits)
            assert dict(vm.sigbus) == dict(with_.vms[key].sigbus)


@given(LOGS)
@examples(400)
def test_counts_are_exact(events: list[Event]) -> None:
    # VMs are seen first and never end here: then nothing of them may be missing.
    begin = [VmSeen(0, key, 4000 + key) for key in range(1, 5)]
    log = [*begin, *(event for event in events if not isinstance(event, VmGone | VmSeen))]
    shown = snapshot(log)
    exits: Counter[tuple[int, bool]] = Counter()
    for event in log:
        if isinstance(event, Exit):
            exits[(event.vm, event.is_poison)] += event.count
    for key, vm in shown.vms.items():
        assert sum(vm.exits.values()) == sum(n for (of, _), n in exits.items() if of == key)
        # Of signals whose VM the source does not know, those are known that are about its page.
        signals = [event for event in log if isinstance(event, Sigbus)]
        told = sum(event.count for event in signals if event.vm == key)
        vague = sum(event.count for event in signals if event.vm is None and event.pid == vm.pid)
        assert told <= sum(vm.sigbus.values()) <= told + vague
    assert sum(i.exits for i in shown.incidents) == sum(
        n for (_, of_poison), n in exits.items() if of_poison
    )
    assert sum(shown.poisons.values()) == sum(isinstance(event, Poison) for event in log)
    assert sum(shown.lost.values()) == sum(e.count for e in log if isinstance(e, Lost))


@given(LOGS)
@examples(200)
def test_same_log_same_snapshot(events: list[Event]) -> None:
    events = [checked(event) for event in events]  # as recordings have them
    again = [from_record(to_record(event)) for event in events]
    assert again == events
    assert snapshot(again) == snapshot(events)


@given(LOGS)
@examples(80)
def test_a_snapshot_does_not_depend_on_earlier_ones(events: list[Event]) -> None:
    """Parts of the last one are taken over if they have not changed, and some copied before."""
    limits = Limits(incidents=4, pending=8)
    watched = Correlator(limits)
    parts: list[Callable[[], None]] = []
    for number, event in enumerate(events):
        with pytest.MonkeyPatch.context() as patched:
            patched.setattr(snapshots, "_INCIDENTS_AT_ONCE", 1)
            patched.setattr(snapshots, "_VMS_AT_ONCE", 1)
            parts = watched.copying() if number % 3 else parts
        watched.feed(event)
        for copy in parts[number % 2 :]:
            copy()
        snapshot = watched.snapshot()
        fresh = Correlator(limits)
        for earlier in events[: number + 1]:
            fresh.feed(earlier)
        assert snapshot == fresh.snapshot()


@given(LOGS)
@examples(400)
def test_what_is_shown_makes_sense(events: list[Event]) -> None:
    correlator, all_told = fed(events)
    shown = correlator.snapshot()
    ids = [incident.id for incident in shown.incidents]
    assert len(set(ids)) == len(ids)
    for incident in shown.incidents:
        assert isinstance(incident.state, IncidentStatus)
        assert isinstance(incident.page_class, PageClass | None)
        assert not incident.host_at_risk or not incident.owners
        assert len(set(incident.owners)) == len(incident.owners)
        delivered = incident.first_delivery_ts is not None
        assert delivered == (incident.last_delivery_ts is not None)
        if incident.state in ("delivered", "looping"):
            assert delivered
        if incident.state == "latent":
            assert set(incident.owners) > set(incident.released)
        assert set(incident.released) <= set(incident.owners)
        if incident.state in ("latent", "unowned"):
            assert not incident.exits
    at_risk = sum(incident.host_at_risk for incident in shown.incidents)
    assert shown.kernel_pages == at_risk
    for vm in shown.vms.values():
        assert not vm.forgotten_pages
        assert all(count > 0 for count in vm.exits.values())
        assert {cause for _, cause in vm.exits} <= {*CAUSES, None}
    assert sum(shown.latency.counts) <= len(shown.incidents)
    assert shown.latency.sum_seconds >= 0
    former = {key for incident in shown.incidents for key in incident.former_ids}
    assert not former.intersection(ids)
    for told in all_told:
        if told.incident is not None:
            assert told.incident in (*ids, *former)


def size(value: Any, seen: set[int]) -> int:
    """Number of elements in all reachable containers."""
    if id(value) in seen or isinstance(value, Event | Limits | str | bytes | int | float):
        return 0
    seen.add(id(value))
    if isinstance(value, dict):
        return len(value) + sum(size(key, seen) + size(v, seen) for key, v in value.items())
    if isinstance(value, list | tuple | set | frozenset):
        return len(value) + sum(size(item, seen) for item in value)
    slots = [name for cls in type(value).__mro__ for name in getattr(cls, "__slots__", ())]
    fields = [getattr(value, name, None) for name in slots]
    return sum(size(item, seen) for item in [*fields, *getattr(value, "__dict__", {}).values()])


TIGHT = Limits(
    incidents=3,
    gone_vms=2,
    departed=2,
    pending=3,
    pending_each=2,
    kinds=3,
    places=2,
    soft_offlines=2,
    owners=2,
    notified_vcpus=2,
    timeline=3,
)


BEGIN: tuple[Event, ...] = (
    VmSeen(0, 1, 4001),
    Poison(0, 0x100, "a", "x"),
    Owned(0, 0x100, Owner(1, 1, HVA), "pagemap"),
    Exit(0, 1, 0, 133, 39, True, 7, gfn=1),
)

# What a host may say without end, a new number each time: {what: (n) -> events}
FLOODS: dict[str, Callable[[int], list[Event]]] = {
    "pages of a guest_memfd": lambda n: [
        Poison(n, n, "a", "x", gmem=GmemPage(7, n, (Owner(1, n),)))
    ],
    "halves by signal": lambda n: [Sigbus(n, 4001, n, 4, HVA, sender=n)],
    "signals of one thread": lambda n: [Sigbus(n, 4001, n, 4, HVA, sender=3)],
    "halves by page": lambda n: [Owned(n, n, Owner(1, n), "pagemap")],
    "owners of a page": lambda n: [Owned(n, 0x100, Owner(1, n), "pagemap")],
    "pages": lambda n: [Poison(n, n, "a", "x", tid=n)],
    "kinds of pages": lambda n: [Poison(n, 0x100, f"a{n}", "x")],
    "pages from before": lambda n: [Found(n, n)],
    "gfns": lambda n: [Exit(n, 1, 0, 133, 39, True, 7, gfn=n)],
    "owners found late": lambda n: [
        Poison(n, n, "a", "x"),
        Exit(n, 1, 0, 133, 39, True, 7, gfn=n),
        Owned(n, n, Owner(1, n), "pagemap"),
    ],
    "places of one page, found late": lambda n: [
        Exit(n, 1, n, 133, 39, True, 7, gfn=n),
        Owned(n, 0x100, Owner(1, n), "pagemap"),
    ],
    "vCPUs": lambda n: [Exit(n, 1, n, 133, 39, True, 7, gfn=1)],
    "errnos": lambda n: [Exit(n, 1, 0, n, 39, False)],
    "codes": lambda n: [Sigbus(n, 4001, 7, n, HVA, vm=1, vcpu=0)],
    "refusals": lambda n: [GmemRefusal(n, 1, n)],
    "machine checks": lambda n: [machine_check(n, n << 12, n, 1, 0, 0, 0)],
    "DIMMs": lambda n: [HwError(n, "x", "corrected", label=f"DIMM{n}")],
    "reporters": lambda n: [HwError(n, f"x{n}", "corrected", pfn=0x100)],
    "places of one page": lambda n: [HwError(n, "x", "fatal", pfn=0x100, grain=1 << (12 + n % 9))],
    "soft offlines": lambda n: [SoftOffline(n, n, 0)],
    "unpoisoned pages": lambda n: [Poison(n, n, "a", "x"), Unpoison(n, n)],
    "one page, again and again": lambda n: [Poison(n, 9, "a", "x"), Unpoison(n, 9)],
    "looks": lambda n: [VcpuState(n, 1, 7, "running", 0, 1)],
    "threads": lambda n: [VcpuState(n, 1, n, "running", 0, 1)],
    "releases": lambda n: [PageReplaced(n, 1, 0x100, HVA + (n << 12))],
    "losses": lambda n: [Lost(n, f"place{n}", 1)],
    "counts": lambda n: [KernelCounts(n, (("total", n),))],
    "silence": lambda n: [Tick(n)],
    "steps of the clock": lambda n: [ClockStep(n, 1, n)],
    "reboots": lambda n: [Poison(n, n, "a", "x"), Reboot(n)],
    "VMs": lambda n: [VmSeen(n, n, n), VmGone(n, n)],
    "eventful VMs": lambda n: [
        VmSeen(n, n, n),
        Exit(n, n, 0, 133, 39, True, gfn=n),
        VmGone(n, n),
    ],
    "VMs with one page": lambda n: [
        VmSeen(n, n, n),
        Owned(n, 0x100, Owner(n, 1), "pagemap"),
        Exit(n, n, 0, 133, 39, True, gfn=1),
        VmGone(n, n),
    ],
}


@pytest.mark.parametrize("flood", FLOODS)
def test_no_flood_takes_memory(flood: str) -> None:
    """Once all bounds are reached, a thousand more events do not add memory."""
    correlator = Correlator(TIGHT)
    for event in BEGIN:
        correlator.feed(event)
    sizes = []
    for first in (1000, 1400, 2400):
        for n in range(first, first + 400):
            for event in FLOODS[flood](n):
                correlator.feed(event)
        sizes.append(size(correlator, set()))
    assert sizes[2] <= sizes[1] + 10


def test_every_kind_of_event_floods() -> None:
    kinds = {type(event) for flood in FLOODS.values() for event in flood(1)}
    assert kinds == set(KINDS.values())


@given(LONG_LOGS)
@examples(150)
def test_memory_stays_bounded(events: list[Event]) -> None:
    correlator, _ = fed(events, TIGHT)
    shown = correlator.snapshot()
    assert len(shown.incidents) <= 3
    assert sum(vm.gone for vm in shown.vms.values()) <= 2
    assert len(shown.poisons) <= 3 + 1
    assert len(shown.soft_offlines) <= 2
    assert len(shown.dimms) <= 2
    for incident in shown.incidents:
        assert len(incident.owners) <= 2
        assert len(incident.notifications) <= 2
    for name, value in vars(correlator).items():
        assert size(value, set()) <= 450, name
    assert len({i.id for i in shown.incidents}) == len(shown.incidents)


@given(st.lists(EVENTS, min_size=10, max_size=40))
@examples(30)
def test_memory_does_not_grow_with_time(events: list[Event]) -> None:
    """Repeating the same events on new pages and VMs does not add memory forever."""
    correlator = Correlator(TIGHT)
    sizes = []
    for turn in range(12):
        for event in events:
            changes = {
                name: getattr(event, name) + 10 * turn
                for name in ("vm", "pfn", "tid")
                if getattr(event, name, None) is not None
            }
            correlator.feed(replace(event, **changes))
            if isinstance(vm := getattr(event, "vm", None), int):
                correlator.feed(VmGone(event.ts, vm + 10 * turn))
        sizes.append(size(correlator, set()))
    assert max(sizes[6:]) <= max(sizes[:6]) + 150


@given(LOGS)
@examples(400)
def test_vms_never_meet_in_an_incident_that_no_event_shares(events: list[Event]) -> None:
    """Each notified VM of an incident is related to it by an owner entry, or by the pfn itself."""
    named = {event.vm for event in events if isinstance(event, Sigbus) and event.pfn is not None}
    named |= {e.vm for e in events if isinstance(e, Sigbus) and e.sender is not None}
    for incident in snapshot(events).incidents:
        owners = {owner.vm for owner in incident.owners}
        if incident.page_class == "kernel":  # VMs that had it mapped do not own it
            owners |= {event.owner.vm for event in events if isinstance(event, Owned)}
            owners |= {event.vm for event in events if isinstance(event, Sigbus) and event.vm}
        assert {telling.vm for telling in incident.notifications} <= owners | named


@given(LOGS)
@examples(400)
def test_verdicts_and_their_evidence(events: list[Event]) -> None:
    for incident in snapshot(events).incidents:
        assert {v.vm for v in incident.verdicts} == {t.vm for t in incident.notifications}
        assert all(isinstance(v.word, VerdictWord) and v.evidence for v in incident.verdicts)
        assert (incident.verdict is None) == (not incident.notifications)
        if incident.state == "looping":
            assert incident.verdict == "looping"
        assert incident.undelivered >= 0
        assert sum(t.exits for t in incident.notifications) == incident.exits
        assert [m.ts for m in incident.timeline] == sorted(m.ts for m in incident.timeline)


@given(LOGS)
@examples(300)
def test_harmless_events_change_no_state(events: list[Event]) -> None:
    """Soft offlines, hardware errors and vCPU samples do not open, close or deliver incidents."""
    harmless = SoftOffline | HwError | KernelCounts
    with_ = snapshot(events)
    kept = [event for event in events if not isinstance(event, harmless)]
    # A page that was soft-offlined is not Found; and events move the model's time.
    if any(isinstance(event, Found) for event in kept):
        return
    without = snapshot(kept)
    assert [(i.id, i.owners, i.exits, i.sigbus) for i in with_.incidents] == [
        (i.id, i.owners, i.exits, i.sigbus) for i in without.incidents
    ]


@given(LOGS, st.integers(0, 59))
@example(
    # Read when newer events were known for more than five seconds.
    [
        VmSeen(0, 1, 4001),
        Unpoison(5_000_000_001, 0x100),
        GmemRefusal(0, 1, 1, 1),
        *[Unpoison(5_000_000_001, 0x100)] * 5,
        *[Exit(0, 1, 1, 133, 39, annotated=True, gfn=1)] * 7,
    ],
    0,
)
@examples(300)
def test_undelivered_never_goes_down(events: list[Event], at: int) -> None:
    correlator = Correlator()
    high: dict[int, int] = {}
    for number, event in enumerate(events):
        correlator.feed(event)
        if number % 7 == at % 7:
            for key, vm in correlator.snapshot().vms.items():
                assert vm.undelivered >= high.get(key, 0)
                high[key] = vm.undelivered
        if isinstance(event, VmGone | VmSeen):
            high.clear()  # a VM that is forgotten may be seen anew here, never in a kernel


@given(
    st.lists(
        st.builds(VmGone, TS, VMS)
        | st.builds(Exit, TS, VMS, st.just(0), st.just(133), st.just(39), st.just(True), gfn=GFNS)
        | st.builds(VmSeen, TS, VMS, st.just(4001)),
        min_size=20,
        max_size=200,
    )
)
@examples(150)
def test_births_and_deaths_in_any_order(events: list[Event]) -> None:
    fed(events, TIGHT)[0].snapshot()
