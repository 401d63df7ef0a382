"""A host in one line of words: what is worst and what to do about it; and how many of what."""

from __future__ import annotations

from collections import Counter

from kvmtrace.judgement.actions import actions, named
from kvmtrace.judgement.urgency import Level, Urgency, by_urgency, urgency_of
from kvmtrace.model import Snapshot
from kvmtrace.views.answer import answer
from kvmtrace.views.format import Line, Span, counted, style_of


def count_spans(snapshot: Snapshot) -> Line:
    """How many incidents are open, by urgency, the worst first; empty without any."""
    counts = Counter(map(urgency_of, snapshot.incidents))
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
    what = answer(named(first, snapshot), snapshot, now).rstrip(".")
    return (
        (f"{what}: ", style_of(urgency_of(first))),
        (actions(first, snapshot)[0].brief, "title"),
    )


def _nothing(snapshot: Snapshot) -> str:
    if snapshot.incidents:
        return f"nothing to do: {counted(len(snapshot.incidents), 'incident')}, all over"
    return "nothing to do: no poisoned page is known"


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
