"""What `kvmtrace explain` prints: of what a person named, or of all that is open."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from kvmtrace import kvm
from kvmtrace.judgement.urgency import Urgency, by_urgency, urgency_of
from kvmtrace.model import Snapshot, SoftOfflinedPage
from kvmtrace.views import json_output
from kvmtrace.views.answer import word
from kvmtrace.views.explain import (
    Showing,
    as_object,
    counted_errors,
    headed,
    listing,
    origin_parts,
    paragraph,
)
from kvmtrace.views.explain_incidents import (
    answers,
    healthy,
    incidents,
    not_known,
    over,
    stamped,
)
from kvmtrace.views.explain_vm import of_vm, of_vms
from kvmtrace.views.format import Line, counted, dimm_of, listed, style_of
from kvmtrace.views.lookup import Target, TargetKind, known_vms
from kvmtrace.views.stamp import watching_since


def of_all(snapshot: Snapshot, showing: Showing) -> Iterator[Line]:
    """All that is open, worst first; or that nothing is."""
    here = by_urgency(one for one in snapshot.incidents if urgency_of(one) != Urgency.CLOSED)
    forgotten = snapshot.kernel_pages - sum(one.host_at_risk for one in here)
    if forgotten > 0:
        pages = counted(forgotten, "poisoned page")
        text = f"The host can go down at any time: its kernel may use {pages}, forgotten since."
        yield from headed(word(Urgency.KERNEL), style_of(Urgency.KERNEL), text, showing.width)
    if here:
        yield from incidents(here, snapshot, showing)
        return
    if forgotten > 0:
        yield from stamped(snapshot, showing, None)
    else:
        where = f" on {snapshot.host.name}" if snapshot.host is not None else ""
        text = f"No poisoned page of a VM is known{where}"
        yield from healthy(text, snapshot, showing)
    yield from over(by_urgency(snapshot.incidents), snapshot, showing)
    yield from not_known(snapshot, showing)


def of_time(snapshot: Snapshot, showing: Showing) -> Iterator[Line]:
    """All that there was in a time, worst first, also if it is over."""
    found = by_urgency(snapshot.incidents)
    if found:
        yield from incidents(found, snapshot, showing)
        return
    yield from healthy("No poisoned page was known in that time", snapshot, showing)
    yield from not_known(snapshot, showing)


def of_target(target: Target, snapshot: Snapshot, showing: Showing) -> Iterator[Line]:
    """What is known of what was named."""
    match target.kind:
        case TargetKind.VM if len(target.vms) > 1:
            yield from of_vms(target, snapshot, showing)
        case TargetKind.VM:
            yield from of_vm(target, snapshot, showing)
        case TargetKind.DIMM:
            yield from _dimms(target, snapshot, showing)
        case _ if target.incidents:
            found = by_urgency(target.incidents)
            yield from incidents(found, snapshot, showing, target.reading)
        case TargetKind.PAGE:
            yield from _page(target, snapshot, showing)
        case _:
            yield from _address(target, snapshot, showing)


def _address(target: Target, snapshot: Snapshot, showing: Showing) -> Iterator[Line]:
    """An address of a guest that is in no incident."""
    text = f"{target.text} is not poisoned as far as is known"
    yield from healthy(text, snapshot, showing, target.reading)
    elsewhere = [
        one
        for one in snapshot.incidents
        if set(target.vms) & one.vm_identities.keys() and urgency_of(one) != Urgency.CLOSED
    ]
    if elsewhere:
        names = dict.fromkeys(known_vms(snapshot)[vm].label for vm in target.vms)
        yield ()
        yield ((f"Elsewhere in {listed(names)}", "head"),)
        yield from answers(by_urgency(elsewhere), snapshot, showing)
    yield from not_known(snapshot, showing)


def _dimms(target: Target, snapshot: Snapshot, showing: Showing) -> Iterator[Line]:
    here = by_urgency(one for one in target.incidents if urgency_of(one) != Urgency.CLOSED)
    past = by_urgency(one for one in target.incidents if urgency_of(one) == Urgency.CLOSED)
    errors: list[Line] = [(), (("Errors", "head"),)]
    for label in target.dimms:
        history = snapshot.dimms.get(label)
        text = counted_errors(history, "reported") if history else "those of its pages only"
        errors += paragraph(f"{dimm_of(label)}: {text}", showing.width)
    if here:
        yield from incidents(here, snapshot, showing, target.reading, errors)
    else:
        since = watching_since(snapshot, showing.end(snapshot))
        labels = listed(map(dimm_of, target.dimms))
        text = f"{labels} had errors; no page of it is poisoned as far as is known, {since}."
        yield from headed("WATCH", "note", text, showing.width)
        yield from stamped(snapshot, showing, target.reading)
        yield from errors
        yield from not_known(snapshot, showing)
    if past:
        yield from over(past, snapshot, showing)


def _page(target: Target, snapshot: Snapshot, showing: Showing) -> Iterator[Line]:
    """A page that is in no incident."""
    pfn = target.pfn or 0
    moved = [page for page in snapshot.soft_offlines if page.pfn == pfn]
    reported = snapshot.reported.get(pfn)
    unharmed = f"pfn {pfn:#x} is not poisoned as far as is known"
    if moved:
        text = f"pfn {pfn:#x}: {_soft_offlined(moved[-1])}."
        yield from headed("WATCH", "note", text, showing.width)
        yield from stamped(snapshot, showing, target.reading)
    elif reported is not None:
        text = f"{unharmed}; errors of it were reported."
        yield from headed("WATCH", "note", text, showing.width)
        yield from stamped(snapshot, showing, target.reading)
    else:
        yield from healthy(unharmed, snapshot, showing, target.reading)
    facts = [
        f"{listed(origin_parts(page.origin))}, reported by {listed(page.origin.via)}"
        for page in moved
        if page.origin is not None
    ]
    if reported is not None and not moved:
        label = f", {dimm_of(reported.label)}" if reported.label else ""
        facts.append(f"{counted_errors(reported.history, 'at this page')}{label}")
    yield from listing("The page", facts, showing.width)
    yield from not_known(snapshot, showing)


def _soft_offlined(page: SoftOfflinedPage) -> str:
    if page.errno:
        return f"soft offline was tried and refused with {kvm.errno_name(page.errno)}; still in use"
    return "soft-offlined; its contents were moved, no guest is harmed"


def as_objects(
    found: Target | None, snapshot: Snapshot, now: int | None, *, is_span: bool = False
) -> list[dict[str, Any]]:
    """A JSON object for each incident; without any, for what was reported of the page.

    ``is_span``: also for those that are over.
    """
    if found is None:
        incidents = [
            one for one in snapshot.incidents if is_span or urgency_of(one) != Urgency.CLOSED
        ]
    else:
        incidents = list(found.incidents)
    if incidents:
        shown = by_urgency(incidents)
        return [as_object(incident, snapshot, now) for incident in shown]
    if found is None or found.kind != TargetKind.PAGE:
        return []
    moved = [page for page in snapshot.soft_offlines if page.pfn == found.pfn]
    if moved:
        return [json_output.soft_offlined(page, snapshot) for page in moved]
    pfn, reported = found.pfn or 0, snapshot.reported.get(found.pfn or 0)
    return [json_output.reported(pfn, reported, snapshot)] if reported is not None else []
