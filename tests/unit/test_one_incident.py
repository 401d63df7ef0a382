"""What KVM reports of a place and what the kernel reports of its page are one incident.

In any order: an owner is found late on a busy host, and exits do not wait for it (lab, 7.3.4).
"""

from __future__ import annotations

import itertools
from dataclasses import replace

import pytest

from kvmtrace.events import Event, Found, GmemRefusal, Owned, Owner, Sigbus, Unpoison, VmGone
from kvmtrace.facts import EntryKind
from kvmtrace.model import Incident
from kvmtrace.views import json_output
from kvmtrace.views.explain import explain_text
from kvmtrace.views.lookup import find
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
    for events in ((poison(T0), *EXITS, OWNED), (poison(T0), OWNED, *EXITS)):
        assert tell(seen(1), *events)[0].latency.sum_seconds == pytest.approx(0.002)


def test_another_page_at_the_same_place_is_another_incident() -> None:
    """The VMM put another page there, which was poisoned, too."""
    other = replace(OWNED, pfn=PFN + 1, ts=T0 + 9 * MS)
    snapshot, _ = tell(seen(1), poison(T0), OWNED, *EXITS, poison(T0, PFN + 1), other)
    assert {one.pfn: one.exits for one in snapshot.incidents} == {PFN: 4, PFN + 1: 0}


@pytest.mark.parametrize("end", [VmGone(T0 + 9 * MS, 1), Unpoison(T0 + 9 * MS, PFN)])
def test_it_is_over_as_a_whole(end: Event) -> None:
    assert only(tell(seen(1), poison(T0), *EXITS, OWNED, end)[0]).state == "closed"
