"""A host in one line of words: what is worst and what to do about it; and how many of what."""

from __future__ import annotations

from kvmtrace.judgement.actions import actions
from kvmtrace.judgement.urgency import Level, Urgency, by_urgency, urgency_of
from kvmtrace.model import Incident, Snapshot
from kvmtrace.views.format import Line, Span, age_of, counted, style_of
from kvmtrace.views.tables.rows import owners_name


def count_spans(snapshot: Snapshot) -> Line:
    """How many incidents are open, by urgency, the worst first; empty without any."""
    counts: dict[Urgency, int] = {}
    for incident in snapshot.incidents:
        urgency = urgency_of(incident)
        counts[urgency] = counts.get(urgency, 0) + 1
    spans: list[Span] = []
    for urgency in Urgency:
        if urgency in counts and urgency is not Urgency.CLOSED:
            gap = "  " if spans else ""
            spans.append((f"{gap}{counts[urgency]} {urgency}", style_of(urgency)))
    return tuple(spans)


def summary_spans(snapshot: Snapshot, now: int) -> Line:
    """What is worst and what to do, as a sentence."""
    worst = [one for one in by_urgency(snapshot.incidents) if urgency_of(one).level != Level.OVER]
    if not worst:
        return ((_nothing(snapshot), ""),)
    first = worst[0]
    return (
        (f"{_what(first, snapshot, now)}: ", style_of(urgency_of(first))),
        (actions(first, snapshot)[0].brief, "title"),
    )


def _nothing(snapshot: Snapshot) -> str:
    if snapshot.incidents:
        return f"nothing to do: {counted(len(snapshot.incidents), 'incident')}, all over"
    return "nothing to do: no poisoned page is known"


def _what(incident: Incident, snapshot: Snapshot, now: int) -> str:
    who = _who(incident, snapshot)
    began = incident.first_delivery_ts or incident.poisoned_ts
    span = age_of(began, now, snapshot.steps)
    ago, long = (f" {span} ago", f" for {span}") if began is not None else ("", "")
    match urgency_of(incident):
        case Urgency.LOOPING:
            return f"{who} has been stuck on a poisoned page{long}"
        case Urgency.STOPPED:
            return f"{who} stopped on a poisoned page{ago}"
        case Urgency.UNDELIVERED:
            times = counted(incident.undelivered, "time")
            return f"{who} touched a poisoned page {times} and was not notified"
        case Urgency.KERNEL:
            return f"the kernel uses a poisoned page{long}: this host may crash"
        case Urgency.UNCLEAR:
            return f"{who} was notified of a poisoned page{ago}, and may not cope"
        case Urgency.LATENT:
            return f"{who} has a poisoned page that its guest has not touched yet"
        case Urgency.UNOWNED:
            return f"a page of no known VM is poisoned{long}"
    return f"{who} goes on without a page that was lost{ago}"


def _who(incident: Incident, snapshot: Snapshot) -> str:
    keys = list(dict.fromkeys(owner.vm for owner in incident.owners)) or list(
        incident.vm_identities
    )
    if not keys:
        return "a VM not known by name"
    more = f" and {counted(len(keys) - 1, 'other VM')}" if len(keys) > 1 else ""
    return owners_name(incident, snapshot.vms, keys[0]) + more


def note_spans(snapshot: Snapshot) -> Line:
    """What makes the picture incomplete: losses, probes that are not attached, missed failures."""
    parts: list[Span] = []
    if snapshot.kernel is not None and snapshot.kernel.missed:
        missed = counted(snapshot.kernel.missed, "memory failure")
        parts.append((f"{missed} not seen: incidents are missing", "bad"))
    lost = {where: count for where, count in snapshot.lost.items() if count}
    if lost:
        places = ", ".join(lost) if len(lost) <= 2 else f"{len(lost)} places"
        parts.append((f"{sum(lost.values())} lost ({places})", "warn"))
    missing = [probe.name for probe in snapshot.probes if not probe.attached]
    if missing:
        names = ", ".join(missing) if len(missing) <= 3 else counted(len(missing), "probe")
        parts.append((f"{names} not attached", "warn"))
    spans: list[Span] = []
    for text, style in parts:
        spans += [("  ", "")] * bool(spans) + [(text, style)]
    return tuple(spans)
