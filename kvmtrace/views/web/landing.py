"""The landing page: one snapshot as plain HTML, for people who open the exporter's port.

What to do comes first, then the open incidents by urgency, the VMs, and what kvmtrace itself may
have missed. All text is escaped.
"""

from __future__ import annotations

import html
from collections import Counter
from collections.abc import Sequence
from urllib.parse import quote

from kvmtrace.judgement.actions import actions
from kvmtrace.judgement.urgency import Level, Urgency, by_urgency, urgency_of
from kvmtrace.model import Incident, Snapshot
from kvmtrace.views.format import UNKNOWN, age_of, counted, hex_of, listed, shift_of
from kvmtrace.views.tables import header
from kvmtrace.views.tables.columns import VM_COLUMNS
from kvmtrace.views.tables.grid import Column
from kvmtrace.views.tables.rows import KERNEL_ITSELF, VmRow, owners_name, vm_rows
from kvmtrace.views.web.document import (
    badge,
    classes,
    document,
    host_name,
    sentence,
    spans,
    stamp,
    utc,
)

MAX_ROWS = 200

_NAMES = 3
_FEW = 20


def render(snapshot: Snapshot, now: int) -> str:
    """The page for ``snapshot`` at ``now`` (nanoseconds since the epoch, by the events' clock)."""
    ordered = by_urgency(snapshot.incidents)
    opened = [one for one in ordered if urgency_of(one) != Urgency.CLOSED]
    closed = ordered[len(opened) :]
    host = host_name(snapshot)
    return document(
        f"{host}: {_summary(opened)}",
        f"<h1>{html.escape(host)}</h1>{stamp(snapshot, now)}",
        _answer(opened, snapshot)
        + _doubts(snapshot)
        + (_incidents(opened, snapshot, now) if opened else "")
        + _folded(
            f"VMs: {len(snapshot.vms)}", _vms(snapshot, now), is_open=0 < len(snapshot.vms) <= _FEW
        )
        + (_folded(f"Closed: {len(closed)}", _incidents(closed, snapshot, now)) if closed else "")
        + _folded("What is watched", _watched(snapshot)),
    )


def render_failure(reason: str) -> str:
    """The page when the source has ended."""
    return document(
        "kvmtrace: not watching",
        "<h1>kvmtrace</h1>",
        f'<section class="answer now"><p>Not watching: {html.escape(reason)}</p></section>',
    )


# -- what to do


def _counts(opened: Sequence[Incident]) -> list[tuple[Urgency, int]]:
    """How many incidents have which urgency, worst first."""
    counts = Counter(map(urgency_of, opened))
    return sorted(counts.items(), key=lambda item: item[0].rank)


def _summary(opened: Sequence[Incident]) -> str:
    return listed((f"{count} {urgency}" for urgency, count in _counts(opened)), "nothing to do")


def _answer(opened: Sequence[Incident], snapshot: Snapshot) -> str:
    if not opened and snapshot.kernel_pages:
        pages = counted(snapshot.kernel_pages, "poisoned page")
        return _box(
            Urgency.KERNEL.level,
            f"Move the VMs away and reboot this host: the kernel uses {pages}, of which no more is "
            "remembered.",
        )
    if not opened:
        return _box(Level.OVER, "Nothing to do: no poisoned page is open.")
    worst = opened[0]
    counts = " · ".join(badge(urgency, f"{count} ") for urgency, count in _counts(opened))
    return _box(
        urgency_of(worst).level,
        sentence(actions(worst, snapshot)[0].text),
        f"<p>{counts}</p>",
        f'<p><a href="{path_of(worst)}">Commands, and the whole story</a></p>',
    )


def _box(level: Level, todo: str, before: str = "", after: str = "") -> str:
    return (
        f'<section class="answer {level}">{before}<p class="todo">{html.escape(todo)}</p>{after}'
        "</section>"
    )


def _doubts(snapshot: Snapshot) -> str:
    """Why the answer may be incomplete; empty if nothing is known to be missing."""
    doubts = [
        f"{counted(count, 'event')} lost ({where})"
        for where, count in sorted(snapshot.lost.items())
        if count
    ]
    if off := [probe.name for probe in snapshot.probes if not probe.attached]:
        doubts.append(f"not attached: {listed(off)}")
    if (kernel := header.kernel_spans(snapshot)) is not None:
        doubts.append("".join(text for text, _ in kernel))
    if not doubts:
        return ""
    return f'<p class="warn small">May be incomplete: {html.escape("; ".join(doubts))}</p>'


# -- incidents


def path_of(incident: Incident) -> str:
    """The path of an incident's page, for an attribute."""
    return html.escape(f"/incident/{quote(incident.id, safe='')}")


def _incidents(incidents: Sequence[Incident], snapshot: Snapshot, now: int) -> str:
    heads = ("state", "VM", "what to do", "since", "notified", "verdict", "page", "DIMM")
    rows = [_incident(one, snapshot, now) for one in incidents[:MAX_ROWS]]
    head = "".join(f"<th>{name}</th>" for name in heads)
    more = len(incidents) - MAX_ROWS
    note = f"<p>… and {more:,} more: kvmtrace top lists all</p>" if more > 0 else ""
    return _table(head, rows) + note


def _incident(incident: Incident, snapshot: Snapshot, now: int) -> str:
    urgency = urgency_of(incident)
    who = html.escape(who_has(incident, snapshot))
    verdict = str(incident.verdict or UNKNOWN)
    cells = (
        f"<td>{badge(urgency)}</td>",
        f'<td class="name"><a href="{path_of(incident)}">{who}</a></td>',
        f'<td class="do">{html.escape(actions(incident, snapshot)[0].brief)}</td>',
        _fact("since", _since(incident, snapshot, now), "short"),
        _fact("notified", _notified(incident), "short"),
        _fact("verdict", verdict, "same" if verdict == urgency else ""),
        _fact("page", hex_of(incident.pfn), "short"),
        _fact("DIMM", (incident.origin.label if incident.origin else None) or UNKNOWN, "label"),
    )
    return f'<tr class="{urgency.level}">{"".join(cells)}</tr>'


def who_has(incident: Incident, snapshot: Snapshot) -> str:
    """Names of the VMs of an incident, or what else has the page."""
    keys = [owner.vm for owner in incident.owners] + [one.vm for one in incident.notifications]
    if not keys:
        return KERNEL_ITSELF if incident.host_at_risk else "no VM"
    keys = list(dict.fromkeys(keys))
    found = (owners_name(incident, snapshot.vms, key) for key in keys[:_NAMES])
    names = listed("a VM not known by name" if name == UNKNOWN else name for name in found)
    return names + (f" +{len(keys) - _NAMES}" if keys[_NAMES:] else "")


def _since(incident: Incident, snapshot: Snapshot, now: int) -> str:
    if incident.before_start:
        return "before the start"
    return age_of(incident.poisoned_ts or incident.first_delivery_ts, now, snapshot.steps)


def _notified(incident: Incident) -> str:
    if times := incident.exits + incident.sigbus:
        return "once" if times == 1 else f"{times:,} times"
    if incident.undelivered:
        return f"not, {counted(incident.undelivered, 'refusal')}"
    return "not yet" if incident.owners else UNKNOWN


def _fact(name: str, value: str, css: str = "") -> str:
    css = classes(css, "none" if value == UNKNOWN else "")
    return f'<td data-head="{name}"{css}>{html.escape(value)}</td>'


# -- VMs, and kvmtrace itself


def _vms(snapshot: Snapshot, now: int) -> str:
    if not snapshot.vms:
        return "<p>no VMs seen</p>"
    columns = [column for column in VM_COLUMNS if column.name != "EXITS/S"]
    rows = vm_rows(snapshot, now)
    head = "".join(
        f"<th{classes('n' if column.right else '')}>{html.escape(column.name)}</th>"
        for column in columns
    )
    lines = [
        f"<tr>{''.join(_cell(column, row) for column in columns)}</tr>" for row in rows[:MAX_ROWS]
    ]
    more = len(rows) - MAX_ROWS
    note = f"<p>… and {more:,} more</p>" if more > 0 else ""
    return _table(head, lines) + note


def _cell(column: Column[VmRow], row: VmRow) -> str:
    text = html.escape(column.text(row, None) if column.full is None else column.full(row))
    if column.name == "VM":
        return f"<td{classes('name', column.style(row))}>{text}</td>"
    none = "none" if text in ("0", UNKNOWN) else ""
    css = classes("n" if column.right else "", none, column.style(row))
    return f'<td data-head="{html.escape(column.name)}"{css}>{text}</td>'


def _watched(snapshot: Snapshot) -> str:
    lines = [header.probe_spans(snapshot), header.memory_spans(snapshot)]
    if snapshot.steps:
        # In UTC as all of the page: readers need not be where the host is.
        last = snapshot.steps[-1]
        at = utc(snapshot.wall(last.ts))
        lines.append(((f"wall clock stepped by {shift_of(last.step_ns)}, to {at}", "note"),))
    text = "".join(f"<p>{spans(line)}</p>" for line in lines)
    probes = [f"<li>{spans(line)}</li>" for line in header.probe_lines(snapshot)]
    return f"{text}<ul>{''.join(probes)}</ul>" if probes else text


def _folded(title: str, body: str, *, is_open: bool = False) -> str:
    """A section that opens by a touch."""
    opened = " open" if is_open else ""
    return f"<details{opened}><summary>{title}</summary>{body}</details>"


def _table(head: str, rows: Sequence[str]) -> str:
    return f"<table><thead><tr>{head}</tr></thead><tbody>{''.join(rows)}</tbody></table>"
