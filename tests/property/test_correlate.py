"""The correlator under any order of events: losses, duplicates, ends before beginnings."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable
from typing import Any
from unittest import mock

from hypothesis import given, settings
from hypothesis import strategies as st

from kvmtrace import correlate, wire
from kvmtrace.correlate import Correlator, Told
from kvmtrace.events import (
    Event,
    Exit,
    Found,
    GmemPoison,
    HwError,
    KernelCounts,
    Lost,
    Mce,
    Owned,
    Owner,
    Poison,
    Refused,
    Sigbus,
    SoftOffline,
    Unpoison,
    VcpuState,
    VmGone,
    VmSeen,
    from_record,
    to_record,
)
from kvmtrace.model import CAUSES, STATES, Snapshot
from kvmtrace.views import lines

# Few of each, so that things meet: the same page twice, two VMs on one thread, a key that is gone.
VMS = st.integers(1, 4)
GFNS = st.integers(0, 3)
PFNS = st.integers(0x100, 0x104)
TIDS = st.integers(1, 4)
HVAS = st.sampled_from([0x7F0000000000, 0x7F0000001000, 0x7F0000200000])
TS = st.one_of(st.integers(0, 20_000_000_000), st.just(1_790_000_000_000_000_000))
OWNERS = st.builds(Owner, VMS, st.none() | GFNS, st.none() | HVAS)
NAMES = st.none() | st.sampled_from(["web", "db"])

EVENTS: st.SearchStrategy[Event] = st.one_of(
    st.builds(VmSeen, TS, VMS, st.integers(4001, 4004), NAMES),
    st.builds(VmGone, TS, VMS),
    st.builds(
        Exit,
        TS,
        VMS,
        st.integers(0, 2),
        st.sampled_from([133, 133, 14, 22, 999]),
        st.sampled_from([39, 0]),
        st.booleans(),
        tid=TIDS,
        gfn=st.none() | GFNS,
        gmem=st.sampled_from([None, 0, 2, 133]),
        count=st.integers(1, 5),
    ),
    st.builds(Poison, TS, PFNS, st.sampled_from("ab"), st.sampled_from("xy"), tid=st.none() | TIDS),
    st.builds(
        GmemPoison, TS, TIDS, st.just(7), st.integers(0, 9), st.lists(OWNERS, max_size=3).map(tuple)
    ),
    st.builds(Owned, TS, PFNS, OWNERS, st.just("pagemap")),
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
    ),
    st.builds(Mce, TS, st.none(), st.none(), st.just(1), st.just(0), st.just(0), st.just(0)),
    st.builds(Refused, TS, VMS, GFNS, st.integers(1, 5)),
    st.builds(Unpoison, TS, PFNS),
    st.builds(Found, TS, PFNS),
    st.builds(SoftOffline, TS, PFNS, st.sampled_from([0, 16])),
    st.builds(HwError, TS, st.just("ras:mc_event"), pfn=st.none() | PFNS),
    st.builds(VcpuState, TS, VMS, TIDS, st.sampled_from(["running", "outside", "gone"])),
    st.builds(KernelCounts, TS, st.just((("total", 1),)), st.integers(0, 4) | st.none()),
    st.builds(Lost, TS, st.sampled_from(["ringbuf", "maps"]), st.integers(1, 9)),
)
LOGS = st.lists(EVENTS, max_size=60)
LONG_LOGS = st.lists(EVENTS, min_size=100, max_size=250)


def fed(events: Iterable[Event]) -> tuple[Correlator, list[Told]]:
    correlator = Correlator()
    return correlator, [correlator.feed(event) for event in events]


def snapshot(events: Iterable[Event]) -> Snapshot:
    return fed(events)[0].snapshot()


@given(LOGS)
@settings(max_examples=400)
def test_any_log_can_be_fed_and_shown(events: list[Event]) -> None:
    correlator, all_told = fed(events)
    for told in all_told:
        wire.event_line(told)
        lines.event_text(told)
    wire.top(correlator.snapshot())


@given(LOGS)
@settings(max_examples=400)
def test_an_owner_is_somebody_whom_an_event_named(events: list[Event]) -> None:
    named: set[tuple[int, int | None]] = set()
    addresses: set[tuple[int, int | None]] = set()
    for event in events:
        match event:
            case GmemPoison():
                new = list(event.owners)
            case Owned():
                new = [event.owner]
            case Sigbus(vm=int(vm)):
                new = [Owner(vm, event.gfn, event.hva)]
            case Exit() | Refused():
                new = [Owner(event.vm, event.gfn)]
            case _:
                new = []
        named |= {(owner.vm, owner.gfn) for owner in new}
        addresses |= {(owner.vm, owner.hva) for owner in new if owner.hva is not None}
    for incident in snapshot(events).incidents:
        for owner in incident.owners:
            assert (owner.vm, owner.gfn) in named
            assert owner.hva is None or (owner.vm, owner.hva) in addresses


@given(LOGS)
@settings(max_examples=400)
def test_a_fault_belongs_to_an_incident_of_its_own_vm(events: list[Event]) -> None:
    correlator = Correlator()
    for event in events:
        told = correlator.feed(event)
        if isinstance(event, Exit) and told.incident is not None:
            assert told.cause == "hwpoison"
            incident = {i.id: i for i in correlator.snapshot().incidents}[told.incident]
            assert (event.vm, event.gfn) in {(o.vm, o.gfn) for o in incident.owners}


@given(LOGS)
@settings(max_examples=400)
def test_vms_do_not_leak_into_each_other(events: list[Event]) -> None:
    """What is told of VM 1 alone is the same when the others' faults are left out."""
    others = [
        event
        for event in events
        if not (isinstance(event, Exit | Sigbus | VmSeen | VmGone) and event.vm == 1)
    ]
    with_, without = snapshot(events), snapshot(others)
    for key, vm in without.vms.items():
        if key != 1 and key in with_.vms:
            assert dict(vm.exits) == dict(with_.vms[key].exits)
            assert dict(vm.sigbus) == dict(with_.vms[key].sigbus)


@given(LOGS)
@settings(max_examples=400)
def test_counts_are_exact(events: list[Event]) -> None:
    # VMs are seen first and never end here: then nothing of them may be missing.
    begin = [VmSeen(0, key, 4000 + key) for key in range(1, 5)]
    log = [*begin, *(event for event in events if not isinstance(event, VmGone | VmSeen))]
    shown = snapshot(log)
    exits: Counter[tuple[int, int]] = Counter()
    for event in log:
        if isinstance(event, Exit):
            exits[(event.vm, event.errno)] += event.count
    for key, vm in shown.vms.items():
        assert sum(vm.exits.values()) == sum(n for (of, _), n in exits.items() if of == key)
        assert sum(vm.sigbus.values()) == sum(
            isinstance(event, Sigbus) and event.vm == key for event in log
        )
    assert sum(i.exits for i in shown.incidents) == sum(
        n for (_, errno), n in exits.items() if errno == 133
    )
    assert sum(shown.poisons.values()) == sum(isinstance(event, Poison) for event in log)
    assert sum(shown.lost.values()) == sum(e.count for e in log if isinstance(e, Lost))


@given(LOGS)
@settings(max_examples=200)
def test_same_log_same_snapshot(events: list[Event]) -> None:
    again = [from_record(to_record(event)) for event in events]
    assert again == events
    assert snapshot(again) == snapshot(events)


@given(LOGS)
@settings(max_examples=400)
def test_what_is_shown_makes_sense(events: list[Event]) -> None:
    correlator, all_told = fed(events)
    shown = correlator.snapshot()
    ids = [incident.id for incident in shown.incidents]
    assert len(set(ids)) == len(ids)
    for incident in shown.incidents:
        assert incident.state in STATES
        assert len(set(incident.owners)) == len(incident.owners)
        delivered = incident.first_delivery_ts is not None
        assert delivered == (incident.last_delivery_ts is not None)
        if incident.state in ("delivered", "looping"):
            assert delivered
        if incident.state == "latent":
            assert incident.owners
        if incident.state in ("latent", "unowned"):
            assert not incident.exits
    for vm in shown.vms.values():
        assert all(count > 0 for count in vm.exits.values())
        assert {cause for _, cause in vm.exits} <= {*CAUSES, None}
    assert sum(shown.latency.counts) <= len(shown.incidents)
    assert shown.latency.sum_seconds >= 0
    for told in all_told:
        if told.incident is not None:
            assert told.incident in ids


def sizes(correlator: Correlator) -> dict[str, int]:
    """Elements in every container that the correlator holds, containers within them included."""

    def elements(value: Any) -> int:
        if isinstance(value, dict):
            return len(value) + sum(elements(v) for v in value.values() if not isinstance(v, int))
        if isinstance(value, str | bytes | tuple):
            return 0
        if hasattr(value, "__len__"):
            return len(value)
        return 0

    return {name: elements(value) for name, value in vars(correlator).items()}


LIMITS: dict[str, Any] = {
    "MAX_INCIDENTS": 3,
    "MAX_GONE_VMS": 2,
    "MAX_PENDING": 3,
    "MAX_PENDING_EACH": 3,
    "MAX_KINDS": 3,
}


@given(LONG_LOGS)
@settings(max_examples=150, deadline=None)
def test_memory_stays_bounded(events: list[Event]) -> None:
    with mock.patch.multiple(correlate, **LIMITS):
        correlator, _ = fed(events)
        shown = correlator.snapshot()
        assert len(shown.incidents) <= 3
        assert sum(vm.gone for vm in shown.vms.values()) <= 2
        assert len(shown.poisons) <= 3 + 1
        for name, size in sizes(correlator).items():
            assert size <= 40, (name, size)
        assert len({i.id for i in shown.incidents}) == len(shown.incidents)


@given(
    st.lists(
        st.builds(VmGone, TS, VMS)
        | st.builds(Exit, TS, VMS, st.just(0), st.just(133), st.just(39), st.just(True), gfn=GFNS)
        | st.builds(VmSeen, TS, VMS, st.just(4001)),
        min_size=20,
        max_size=200,
    )
)
@settings(max_examples=150, deadline=None)
def test_births_and_deaths_in_any_order(events: list[Event]) -> None:
    with mock.patch.multiple(correlate, **LIMITS):
        snapshot(events)
