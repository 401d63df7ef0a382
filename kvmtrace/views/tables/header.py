"""The lines above the tables: host, kernel, source, probes, and what was lost."""

from __future__ import annotations

from kvmtrace.model import Snapshot
from kvmtrace.probes import Probe, specs
from kvmtrace.views.format import (
    UNKNOWN,
    Line,
    Span,
    counted,
    date_of,
    listed,
    plain,
    shift_of,
    size_of,
    span_of,
)


def lines(snapshot: Snapshot) -> list[Line]:
    """All lines above the tables, with one for each probe that is not attached."""
    found = [
        host_spans(snapshot),
        probe_spans(snapshot),
        *probe_lines(snapshot, only_missing=True),
        memory_spans(snapshot),
        kernel_spans(snapshot),
        clock_spans(snapshot),
    ]
    return [line for line in found if line]


def host_spans(snapshot: Snapshot) -> Line:
    """Host, kernel and source."""
    host = snapshot.host
    if host is None:
        return (("host ", "dim"), (UNKNOWN, ""))
    return (
        (host.name, "title"),
        (f"  Linux {host.kernel}", ""),
        ("  source ", "dim"),
        (host.source, ""),
        (f" ({host.source_why})" if host.source_why else "", "dim"),
    )


def probe_spans(snapshot: Snapshot) -> Line:
    """How many probes are attached, and the names of those that are not."""
    missing = [probe.name for probe in snapshot.probes if not probe.attached]
    total = len(snapshot.probes)
    if not total:
        return (("probes ", "dim"), (UNKNOWN, ""))
    spans: list[Span] = [("probes ", "dim"), (f"{total - len(missing)} of {total} attached", "")]
    if missing:
        spans.append((f", not attached: {listed(missing)}", "warn"))
    return tuple(spans)


def watching_text(snapshot: Snapshot) -> str:
    """The source and the probes in one line, for when watching starts."""
    host = snapshot.host
    source = f"{host.source} ({host.source_why})" if host else UNKNOWN
    return f"watching by {source}, {plain(probe_spans(snapshot))}"


def memory_spans(snapshot: Snapshot) -> Line:
    """What was lost, poison events by result, HardwareCorrupted of /proc/meminfo."""
    lost = {where: count for where, count in snapshot.lost.items() if count}
    results: dict[str, int] = {}
    for (_, result), count in snapshot.poisons.items():
        results[result] = results.get(result, 0) + count
    corrupted = snapshot.host.hardware_corrupted_bytes if snapshot.host else None
    pages = counted(snapshot.kernel_pages, "poisoned page")
    before = sum(incident.before_start for incident in snapshot.incidents)
    what_was_lost = listed((f"{count} at {where}" for where, count in lost.items()), "nothing")
    poisons = listed((f"{count} {result}" for result, count in results.items()), "none")
    return (
        ("lost ", "dim"),
        (what_was_lost, "bad" if lost else ""),
        ("  poisons ", "dim"),
        (poisons, ""),
        (f", {before} before" if before else "", ""),
        ("  HardwareCorrupted ", "dim"),
        (size_of(corrupted), "warn" if corrupted else ""),
        (f"  host at risk: {pages} of the kernel's" if snapshot.kernel_pages else "", "bad"),
    )


def kernel_spans(snapshot: Snapshot) -> Line | None:
    """The kernel's own count of memory failures if kvmtrace missed some; else None."""
    if snapshot.kernel is None or not snapshot.kernel.missed:
        return None
    handled, seen = snapshot.kernel.handled, snapshot.kernel.seen
    counts = f"the kernel handled {handled}, kvmtrace saw {seen}"
    return ((f"memory failures: {counts}", "bad"), ("; incidents are missing", "warn"))


def clock_spans(snapshot: Snapshot) -> Line | None:
    """The last step of the wall clock; None if there was none."""
    text = clock_text(snapshot)
    return None if text is None else (("wall clock ", "dim"), (text, "note"))


def clock_text(snapshot: Snapshot) -> str | None:
    """The last step of the wall clock in words; None if there was none."""
    if not snapshot.steps:
        return None
    last = snapshot.steps[-1]
    text = f"stepped by {shift_of(last.step_ns)}, to {date_of(snapshot.wall(last.ts))}"
    if last.suspended_ns is not None:
        text += f", after {span_of(last.suspended_ns)} of suspension"
    before = len(snapshot.steps) + snapshot.lost.get("clock_steps", 0) - 1
    return text + (f"; {counted(before, 'step')} before" if before else "")


def probe_lines(snapshot: Snapshot, *, only_missing: bool = False) -> list[Line]:
    """A line for each probe: where it is attached, or why not and what is lost without it."""
    without = {spec.name: spec.without for spec in specs()}
    width = max([len(probe.name) for probe in snapshot.probes], default=0)
    lines: list[Line] = []
    for probe in snapshot.probes:
        if probe.attached and only_missing:
            continue
        lines.append(((f"  {probe.name:<{width}}  ", ""), *_probe(probe, without.get(probe.name))))
    return lines


def _probe(probe: Probe, without: str | None) -> Line:
    if probe.attached:
        via = f" by {probe.via}" if probe.via else ""
        return (("attached  ", ""), (f"{probe.target or UNKNOWN}{via}", "dim"))
    spans: list[Span] = [("missing   ", "warn"), (probe.why or "reason unknown", "")]
    if without:
        spans.append((f"; not seen: {without}", "dim"))
    return tuple(spans)
