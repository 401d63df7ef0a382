"""The landing page: one snapshot as plain HTML, for people who open the exporter's port.

What to do comes first, then the open incidents by urgency, the VMs, and what is watched. The tables
have the columns of ``top``. All text is escaped.
"""

from __future__ import annotations

import html
from collections.abc import Iterable, Sequence
from urllib.parse import quote

from kvmtrace.judgement.urgency import Level, Urgency
from kvmtrace.model import Incident, Snapshot
from kvmtrace.views.format import UNKNOWN, counted, plain
from kvmtrace.views.tables import header
from kvmtrace.views.tables.columns import INCIDENT_COLUMNS, LIVE_ONLY, VM_COLUMNS
from kvmtrace.views.tables.grid import Column, Row
from kvmtrace.views.tables.rows import IncidentRow, incident_rows, vm_rows
from kvmtrace.views.tables.summary import count_spans, note_spans, summary_spans
from kvmtrace.views.web.document import badge, classes, document, host_name, spans, stamp

MAX_ROWS = 200

# VMs that are shown at once; more are folded.
_FEW = 20

_VERDICT: Column[IncidentRow] = Column(
    "VERDICT",
    lambda row, width: str(row.incident.verdict or UNKNOWN),
    lambda row: str(row.incident.verdict or ""),
    right=False,
)
_BY_NAME = {column.name: column for column in (*INCIDENT_COLUMNS, _VERDICT)}
_INCIDENTS = [
    _BY_NAME[name] for name in "STATE|VM|WHAT TO DO|SINCE|NOTIFIED|VERDICT|INCIDENT|DIMM".split("|")
]
_VMS = [column for column in VM_COLUMNS if column.name not in LIVE_ONLY]

# What stands alone on a card; other cells have the column's name before them.
_CSS = {"VM": "name", "WHAT TO DO": "do", "DIMM": "label", "CAUSES": "label"}


def render(snapshot: Snapshot, now: int) -> str:
    """The page for ``snapshot`` at ``now`` (nanoseconds since the epoch, by the events' clock)."""
    rows = incident_rows(snapshot, now)
    opened = [row for row in rows if row.urgency != Urgency.CLOSED]
    closed = rows[len(opened) :]
    vms = vm_rows(snapshot, now)
    host = host_name(snapshot)
    parts = [
        _answer(opened, snapshot, now),
        _doubts(snapshot),
        _table(_INCIDENTS, opened),
        _folded(f"VMs: {len(vms)}", _table(_VMS, vms), is_open=0 < len(vms) <= _FEW),
        _folded(f"Closed: {len(closed)}", _table(_INCIDENTS, closed)) if closed else "",
        _folded("What is watched", _watched(snapshot)),
    ]
    title = plain(count_spans(snapshot)).replace("  ", ", ") or "nothing to do"
    return document(
        f"{host}: {title}",
        f"<h1>{html.escape(host)}</h1>{stamp(snapshot, now)}",
        "".join(parts),
    )


def render_failure(reason: str) -> str:
    """The page when the source has ended."""
    return document(
        "kvmtrace: not watching", "<h1>kvmtrace</h1>", _box(Level.NOW, f"Not watching: {reason}")
    )


def path_of(incident: Incident) -> str:
    """The path of an incident's page, for an attribute."""
    return html.escape(f"/incident/{quote(incident.id, safe='')}")


def who_has(row: IncidentRow) -> str:
    """The VMs of an incident, or what else has the page."""
    return _BY_NAME["VM"].text(row, None)


# -- what to do


def _answer(opened: Sequence[IncidentRow], snapshot: Snapshot, now: int) -> str:
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
    counts = " · ".join(badge(text.strip(), style) for text, style in count_spans(snapshot))
    return _box(
        worst.urgency.level,
        plain(summary_spans(snapshot, now)),  # it may begin with a name: no capital letter
        f"<p>{counts}</p>",
        f'<p><a href="{path_of(worst.incident)}">Commands, and the whole story</a></p>',
    )


def _box(level: Level, todo: str, before: str = "", after: str = "") -> str:
    return (
        f'<section class="answer {level}">{before}<p class="todo">{html.escape(todo)}</p>{after}'
        "</section>"
    )


def _doubts(snapshot: Snapshot) -> str:
    """Why the answer may be incomplete; empty if nothing is known to be missing."""
    notes = [("; " if text == "  " else text, style) for text, style in note_spans(snapshot)]
    return f'<p class="small">May be incomplete: {spans(notes)}</p>' if notes else ""


# -- tables


def _table(columns: Sequence[Column[Row]], rows: Sequence[Row]) -> str:
    if not rows:
        return ""
    heads = "".join(
        f"<th{classes('n' if column.right else '')}>{html.escape(column.name)}</th>"
        for column in columns
    )
    lines = "".join(_line(columns, row) for row in rows[:MAX_ROWS])
    more = len(rows) - MAX_ROWS
    note = f"<p>… and {more:,} more: kvmtrace top has all</p>" if more > 0 else ""
    return f"<table><thead><tr>{heads}</tr></thead><tbody>{lines}</tbody></table>{note}"


def _line(columns: Iterable[Column[Row]], row: Row) -> str:
    level = row.urgency.level if isinstance(row, IncidentRow) else ""
    return f"<tr{classes(level)}>{''.join(_cell(column, row) for column in columns)}</tr>"


def _cell(column: Column[Row], row: Row) -> str:
    value = column.text(row, None)
    text, style, css = html.escape(value), column.style(row), _CSS.get(column.name, "")
    if isinstance(row, IncidentRow):
        if column.name == "STATE":
            return f"<td>{badge(value, style)}</td>"
        if column.name == "VM":
            text = f'<a href="{path_of(row.incident)}">{text}</a>'
        if column is _VERDICT and value == row.urgency:
            css = "same"
    if css in ("name", "do"):
        return f"<td{classes(css, style)}>{text}</td>"
    none = "none" if value in ("0", UNKNOWN) else ""
    css = classes(css, none, "n" if column.right else "", style)
    return f'<td data-head="{html.escape(column.name)}"{css}>{text}</td>'


# -- what is watched


def _watched(snapshot: Snapshot) -> str:
    lines = [
        header.probe_spans(snapshot),
        header.memory_spans(snapshot),
        header.clock_spans(snapshot),
    ]
    text = "".join(f"<p>{spans(line)}</p>" for line in lines if line)
    probes = [f"<li>{spans(line)}</li>" for line in header.probe_lines(snapshot)]
    return f"{text}<ul>{''.join(probes)}</ul>" if probes else text


def _folded(title: str, body: str, *, is_open: bool = False) -> str:
    """A section that opens by a touch."""
    opened = " open" if is_open else ""
    return f"<details{opened}><summary>{title}</summary>{body}</details>"
