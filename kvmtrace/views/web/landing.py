"""The landing page: one snapshot as plain HTML, for people who open the exporter's port.

It has the lines, columns and rows of ``top``. It is self-contained (no scripts, no other files) and
readable on a phone. All text is escaped.
"""

from __future__ import annotations

import html
from collections.abc import Iterable, Sequence

from kvmtrace import __version__
from kvmtrace.model import Snapshot
from kvmtrace.views.format import Span
from kvmtrace.views.tables import header
from kvmtrace.views.tables.columns import INCIDENT_COLUMNS, LIVE_ONLY, VM_COLUMNS
from kvmtrace.views.tables.grid import Column, Row
from kvmtrace.views.tables.rows import incident_rows, vm_rows

MAX_ROWS = 200

_STYLE = """
:root { color-scheme: light dark; }
body { font: 16px/1.45 system-ui, sans-serif; margin: 0 auto; padding: 1rem; max-width: 96rem; }
h1 { font-size: 1.4rem; margin: 0 0 .5rem; } h2 { font-size: 1.1rem; margin: 1.6rem 0 .4rem; }
p { margin: 0; white-space: pre-wrap; overflow-wrap: anywhere; }
.scroll { overflow-x: auto; }
table { border-collapse: collapse; font-variant-numeric: tabular-nums; }
th, td { text-align: left; padding: .25rem 1rem .25rem 0; vertical-align: top; }
th { font-weight: 600; border-bottom: 1px solid; white-space: nowrap; }
td { border-bottom: 1px solid color-mix(in srgb, currentColor 15%, transparent); }
.n { text-align: right; }
.title { font-weight: 600; } .dim { opacity: .7; } .note { color: #06c; }
.bad { color: #c00; font-weight: 600; } .warn { color: #a50; }
@media (prefers-color-scheme: dark) {
.bad { color: #ff7b72; } .warn { color: #e3b341; } .note { color: #58a6ff; } }
"""


def render(snapshot: Snapshot, now: int) -> str:
    """The page for ``snapshot`` at ``now`` (nanoseconds since the epoch, by the events' clock)."""
    vm_columns = [column for column in VM_COLUMNS if column.name not in LIVE_ONLY]
    incident_columns = [column for column in INCIDENT_COLUMNS if column.name not in LIVE_ONLY]
    return _document(
        "".join(f"<p>{_spans(line)}</p>" for line in header.lines(snapshot))
        + _section("VMs", "no VMs seen", vm_columns, vm_rows(snapshot, now))
        + _section("Incidents", "no incidents", incident_columns, incident_rows(snapshot, now))
        + _probes(snapshot)
    )


def render_failure(reason: str) -> str:
    """The page when the source has ended."""
    return _document(f'<p class="bad">Not watching: {html.escape(reason)}</p>')


def _document(body: str) -> str:
    return (
        '<!doctype html><html lang="en"><head><meta charset="utf-8">'
        '<meta name="viewport" content="width=device-width, initial-scale=1">'
        f"<title>kvmtrace</title><style>{_STYLE}</style></head><body>"
        f'<h1>kvmtrace <span class="dim">{html.escape(__version__)}</span></h1>{body}'
        '<h2>More</h2><p><a href="/metrics">/metrics</a> · <a href="/-/healthy">/-/healthy</a></p>'
        "</body></html>\n"
    )


def _section(title: str, empty: str, columns: Sequence[Column[Row]], rows: Sequence[Row]) -> str:
    if not rows:
        return f"<h2>{title}</h2><p>{empty}</p>"
    heads = [
        f"<th{_class('n' if column.right else '')}>{html.escape(column.name)}</th>"
        for column in columns
    ]
    lines = ["".join(_cell(column, row) for column in columns) for row in rows[:MAX_ROWS]]
    more = len(rows) - MAX_ROWS
    note = f"<p>… and {more:,} more</p>" if more > 0 else ""
    return f"<h2>{title}</h2>{_table(lines, heads)}{note}"


def _cell(column: Column[Row], row: Row) -> str:
    text = column.text(row, None) if column.full is None else column.full(row)
    css = " ".join(filter(None, ("n" if column.right else "", column.style(row))))
    return f"<td{_class(css)}>{html.escape(text)}</td>"


def _probes(snapshot: Snapshot) -> str:
    lines = [
        f"<td>{_span(name)}</td><td>{_span(state)}</td><td>{_spans(rest)}</td>"
        for line in header.probe_lines(snapshot)
        for name, state, *rest in [line]
    ]
    return f"<h2>Probes</h2>{_table(lines) if lines else '<p>no probes</p>'}"


def _table(lines: Sequence[str], heads: Sequence[str] = ()) -> str:
    head = f"<thead><tr>{''.join(heads)}</tr></thead>" if heads else ""
    body = "".join(f"<tr>{line}</tr>" for line in lines)
    return f'<div class="scroll"><table>{head}<tbody>{body}</tbody></table></div>'


def _spans(line: Iterable[Span]) -> str:
    return "".join(map(_span, line))


def _span(span: Span) -> str:
    text, style = span
    text = html.escape(text)
    return f'<span class="{style}">{text}</span>' if style else text


def _class(css: str) -> str:
    return f' class="{css}"' if css else ""
