"""A snapshot as plain text, for ``top --once`` and ``replay``."""

from __future__ import annotations

import shutil
import textwrap
from collections.abc import Mapping, Sequence

from kvmtrace.model import Snapshot
from kvmtrace.views.format import clip, plain
from kvmtrace.views.tables import grid, header, summary
from kvmtrace.views.tables.columns import INCIDENT_COLUMNS, LIVE_ONLY, VM_COLUMNS
from kvmtrace.views.tables.grid import Column, Row
from kvmtrace.views.tables.rows import incident_rows, vm_rows


def table_text(
    snapshot: Snapshot,
    *,
    now: int,
    width: int | None = None,
    rates: Mapping[int, float] | None = None,
) -> str:
    """What to do, the header and both tables, in lines of ``width`` cells (None: the terminal's).

    ``now``: nanoseconds since the epoch, for "12 s ago". ``rates``: from ``rows.rates``.
    """
    width = width or shutil.get_terminal_size().columns
    vms = vm_rows(snapshot, now, rates)
    incidents = incident_rows(snapshot, now)
    vm_columns = [c for c in VM_COLUMNS if rates is not None or c.name not in LIVE_ONLY]
    incident_columns = [c for c in INCIDENT_COLUMNS if c.name not in LIVE_ONLY]
    head = [summary.summary_spans(snapshot, now), *header.lines(snapshot)]
    lines = [
        *(part for line in head for part in _wrapped(plain(line), width)),
        "",
        *_table(incident_columns, incidents, width, "no incidents"),
        "",
        *_table(vm_columns, vms, width, "no VMs seen"),
    ]
    return "\n".join(lines)


def _table(
    columns: Sequence[Column[Row]], rows: Sequence[Row], width: int, nothing: str
) -> list[str]:
    if not rows:
        return [clip(nothing, width)]
    fitted = grid.fit(columns, rows, width)
    lines = [fitted.head(), *map(fitted.row, rows)]
    return [clip(plain(line).rstrip(), width) for line in lines]


def _wrapped(text: str, width: int) -> list[str]:
    # A reason must not be cut, nor wrapped by the terminal without an indent.
    indent = " " * min(4, max(width - 1, 0))
    lead = text[: len(text) - len(text.lstrip())]
    wrapped = textwrap.wrap(
        text.strip(), width, initial_indent=lead, subsequent_indent=indent, drop_whitespace=True
    )
    return [clip(line, width) for line in wrapped]
