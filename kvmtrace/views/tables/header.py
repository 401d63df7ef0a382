"""The lines above the tables: host, kernel, source, probes, and what was lost."""

from __future__ import annotations

from kvmtrace.model import Snapshot
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
from kvmtrace.views.not_known import kernel_difference
from kvmtrace.views.tables.probes import probe_rows


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
    counts = kernel_difference(snapshot)
    return ((f"memory failures: {counts}", "bad"), ("; incidents are missing", "warn"))


def clock_spans(snapshot: Snapshot) -> Line | None:
    """The last step of the wall clock; None if there was none."""
    if not snapshot.steps:
        return None
    last = snapshot.steps[-1]
    text = f"stepped by {shift_of(last.step_ns)}, to {date_of(snapshot.wall(last.ts))}"
    if last.suspended_ns is not None:
        text += f", after {span_of(last.suspended_ns)} of suspension"
    before = len(snapshot.steps) + snapshot.lost.get("clock_steps", 0) - 1
    text += f"; {counted(before, 'step')} before" if before else ""
    return (("wall clock ", "dim"), (text, "note"))


def probe_lines(snapshot: Snapshot, *, only_missing: bool = False) -> list[Line]:
    """A line for each probe: where it is attached, or why not and what is lost without it."""
    width = max([len(probe.name) for probe in snapshot.probes], default=0)
    lines: list[Line] = []
    for row in probe_rows(snapshot):
        head = (f"  {row.id:<{width}}  ", "")
        if not row.probe.attached:
            not_seen = f"; not seen: {row.without}" if row.without else ""
            lines.append((head, ("missing   ", "warn"), (row.where, ""), (not_seen, "dim")))
        elif not only_missing:
            lines.append((head, ("attached  ", ""), (row.where, "dim")))
    return lines
