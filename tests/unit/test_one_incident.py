"""What KVM reports of a place and what the kernel reports of its page are one incident.

In any order: an owner is found late on a busy host, and exits do not wait for it (lab, 7.3.4).
"""

from __future__ import annotations

import itertools
from dataclasses import replace

import pytest

from kvmtrace.cli.event_filter import EventFilter
from kvmtrace.correlate import Correlator
from kvmtrace.correlate.limits import Limits
from kvmtrace.events import (
    Event,
    Found,
    GmemRefusal,
    Owned,
    Owner,
    Sigbus,
    Unpoison,
    VcpuState,
    VmGone,
)
from kvmtrace.facts import EntryKind
from kvmtrace.model import Incident
from kvmtrace.views import json_output
from kvmtrace.views.explain import explain_text
from kvmtrace.views.lookup import find
from kvmtrace.views.terminal.pages import incident_page
from tests.unit.test_correlate import (
    HVA,
    MS,
    PFN,
    T0,
    VCPU,
    hwpoison,
    only,
    poison,
    seen,
    tell,
)

OWNED = Owned(T0 + 8 * MS, PFN, Owner(1, 8, HVA), "pagemap", 4096)
EXITS = (hwpoison(T0 + 2 * MS), hwpoison(T0 + 4 * MS, vcpu=1, count=3))
SIGNAL = Sigbus(T0 + 5 * MS, 4001, VCPU, 4, HVA, 12, VCPU, vm=1, vcpu=0, pfn=PFN)
REFUSAL = GmemRefusal(T0 + MS, 1, 8, 4)


def told_in(*order: Event) -> tuple[Incident, list[tuple[int, EntryKind, int]]]:
    """The incident after events in this order, and its timeline; both sorted.

    Without owners in the timeline: a signal may show one, too.
    """
    incident = only(tell(seen(1), *order)[0])
    timeline = [entry for entry in incident.timeline if entry.kind != EntryKind.OWNER]
    entries = sorted((entry.ts, entry.kind, entry.count) for entry in timeline)
    notifications = tuple(sorted(incident.notifications, key=lambda one: one.vcpu or 0))
    return replace(
        incident, id="", former_ids=(), timeline=(), notifications=notifications
    ), entries


@pytest.mark.parametrize("lost", [poison(T0), Found(T0, PFN)], ids=["poison", "found"])
def test_any_order(lost: Event) -> None:
    events = (lost, OWNED, *EXITS, REFUSAL, SIGNAL)
    known, entries = told_in(*events)
    assert (known.pfn, known.before_start) == (PFN, isinstance(lost, Found))
    assert (known.owners, known.size) == ((Owner(1, 8, HVA),), 4096)
    assert (known.exits, known.undelivered, known.sigbus) == (4, 0, 1)
    assert {one.vcpu: one.exits for one in known.notifications} == {0: 1, 1: 3}
    for order in itertools.permutations(events):
        assert told_in(*order) == (known, entries), order


def test_the_first_id_stays() -> None:
    """It may be in the log, and in somebody's shell."""
    for events in ((poison(T0), *EXITS, OWNED), (*EXITS, poison(T0), OWNED)):
        snapshot, told = tell(seen(1), *events)
        assert only(snapshot).id == told[1].incident == told[-1].incident


def test_it_is_found_by_the_other_id() -> None:
    snapshot, told = tell(seen(1), poison(T0), *EXITS, OWNED)
    former = told[2].incident
    assert former is not None
    assert only(snapshot).former_ids == (former,)
    target = find(snapshot, former)
    assert (target.incidents, target.reading) == (
        snapshot.incidents,
        f"as {only(snapshot).id}: of the same page",
    )
    assert json_output.incident(only(snapshot), snapshot)["former_ids"] == [former]
    ids = f"(incident {only(snapshot).id}, {former})"
    assert ids in explain_text(only(snapshot), snapshot)


def test_both_were_notified() -> None:
    """A process that shares the page by its address, a VM by its exits: counts add up."""
    signal = replace(SIGNAL, gfn=None)
    snapshot, _ = tell(seen(1), poison(T0), signal, *EXITS, OWNED, hwpoison(T0 + 9 * MS))
    incident = only(snapshot)
    assert (incident.exits, incident.sigbus) == (5, 1)
    assert {(one.vcpu, one.exits, sum(one.sigbus.values())) for one in incident.notifications} == {
        (0, 2, 1),
        (1, 3, 0),
    }
    assert sum(snapshot.latency.counts) == 1


def test_latency_is_known_once_the_owner_is() -> None:
    for events in itertools.permutations((poison(T0), EXITS[0], OWNED)):
        assert tell(seen(1), *events)[0].latency.sum_seconds == pytest.approx(0.002)


def test_another_page_at_the_same_place_is_another_incident() -> None:
    """The VMM put another page there, which was poisoned, too."""
    other = replace(OWNED, pfn=PFN + 1, ts=T0 + 9 * MS)
    snapshot, _ = tell(seen(1), poison(T0), OWNED, *EXITS, poison(T0, PFN + 1), other)
    assert {one.pfn: one.exits for one in snapshot.incidents} == {PFN: 4, PFN + 1: 0}


@pytest.mark.parametrize("end", [VmGone(T0 + 9 * MS, 1), Unpoison(T0 + 9 * MS, PFN)])
def test_it_is_over_as_a_whole(end: Event) -> None:
    assert only(tell(seen(1), poison(T0), *EXITS, OWNED, end)[0]).state == "closed"


def test_every_owner_is_kept_that_came_before_the_page() -> None:
    """Their lookups are put in front of it, and one VM was notified before."""
    owners = (replace(OWNED, owner=Owner(2, 16)), OWNED)
    snapshot, _ = tell(
        seen(1), seen(2), EXITS[0], *owners, Found(T0 + 9 * MS, PFN), hwpoison(T0 + 9 * MS, 2, 16)
    )
    assert {(owner.vm, owner.gfn) for owner in only(snapshot).owners} == {(1, 8), (2, 16)}
    assert only(snapshot).exits == 2


def test_an_owner_alone_is_no_page() -> None:
    """What becomes of it, once it is unpoisoned, is another VM's."""
    snapshot, _ = tell(
        *(seen(vm) for vm in (1, 2)),
        *(poison(T0), EXITS[0], Unpoison(T0 + 3 * MS, PFN), OWNED),
        replace(OWNED, ts=T0 + 100_000 * MS, owner=Owner(2, 16)),
        poison(T0 + 100_000 * MS),
    )
    assert {
        frozenset(owner.vm for owner in one.owners): one.exits for one in snapshot.incidents
    } == {
        frozenset(): 0,
        frozenset({1}): 1,
        frozenset({2}): 0,
    }


def test_of_a_huge_page_every_gfn() -> None:
    huge = replace(OWNED, size=2 << 20, owner=Owner(1, 0x208, HVA + 0x200000))
    lost = replace(poison(T0), page_type="huge page")
    exits = [hwpoison(T0 + n * MS, gfn=0x203 + n, count=n) for n in (1, 2, 3)]
    for order in ((lost, huge, *exits), (lost, *exits, huge), (*exits, lost, huge)):
        snapshot, _ = tell(seen(1), *order)
        assert (only(snapshot).exits, only(snapshot).state) == (6, "delivered")
        (notified,) = only(snapshot).notifications
        assert (notified.exits, notified.most) == (6, 3)


def test_an_owner_that_a_signal_shows() -> None:
    signal = replace(SIGNAL, gfn=8)
    for order in ((poison(T0), EXITS[0], signal), (poison(T0), signal, EXITS[0])):
        assert only(tell(seen(1), *order)[0]).exits == 1


def test_vcpus_without_room_leave_no_samples() -> None:
    correlator = Correlator(Limits(notified_vcpus=2))
    for event in (seen(1), poison(T0)):
        correlator.feed(event)
    for n in range(10):
        ts = T0 + 10_000 * MS * (n + 1)
        for vcpu in (2 * n, 2 * n + 1):
            correlator.feed(hwpoison(ts, 1, n, vcpu))
            correlator.feed(VcpuState(ts + MS, 1, 5000 + vcpu, "outside", vcpu, 1))
        correlator.feed(Owned(ts + 2 * MS, PFN, Owner(1, n, HVA + 4096 * n), "pagemap"))
    (merged,) = (one for one in correlator._incidents if one.pfn == PFN)
    assert (len(merged.deliveries), len(merged.samples)) == (2, 2)


def test_room_is_made_by_rank_after_two_became_one() -> None:
    """Nobody's page is forgotten before a VM's."""
    correlator = Correlator(Limits(incidents=48))
    known = replace(OWNED, pfn=0x100, owner=Owner(2, 8))
    others = [hwpoison(T0 + n * MS, 1, 100 + n) for n in range(48)]
    signal = replace(SIGNAL, pid=4002, vm=2, sender=77, pfn=0x100, vcpu=None)
    events = (seen(1), seen(2), hwpoison(T0, 2), *others, signal, poison(T0, 0x100), known)
    for event in (*events, poison(T0, 0x200), hwpoison(T0 + 99 * MS, 2, 9)):
        correlator.feed(event)
    assert 0x200 not in {one.pfn for one in correlator.snapshot().incidents}
    assert correlator.snapshot().lost == {"incidents": 3}


def test_an_id_that_is_in_use_again_is_the_new_ones() -> None:
    more = [poison(T0 + (10 + n) * MS, 0x500 + n) for n in range(20)]
    snapshot, _ = tell(
        *(seen(1), seen(2), poison(T0), EXITS[0], OWNED, *more, hwpoison(T0 + 99 * MS, 2, 8)),
        limits=Limits(incidents=2),
    )
    assert [one.former_ids for one in snapshot.incidents] == [("g8-1",), ()]
    (target,) = find(snapshot, "g8-1").incidents
    assert target.owners == (Owner(2, 8),)


def test_a_former_id_names_it_everywhere() -> None:
    correlator = Correlator()
    exits = [hwpoison(T0 + n * MS) for n in range(1, 8)]
    told = [correlator.feed(one) for one in (seen(1), poison(T0), *exits, OWNED)]
    snapshot = correlator.snapshot()
    former = told[2].incident or ""
    assert find(snapshot, former[:-1]).incidents == snapshot.incidents
    chosen = EventFilter(frozenset({"exit"}), frozenset({"looping"}), None)
    assert len(chosen.chosen(told, correlator.snapshot)) == len(exits)
    shown = incident_page(snapshot, former, T0)
    assert shown == incident_page(snapshot, only(snapshot).id, T0)
    assert "no longer" not in str(shown)
