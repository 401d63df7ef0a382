"""The live table as the lines of a screen of a given size."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TypeVar

from kvmtrace.views.format import Line, Span, clip_line, clock_of
from kvmtrace.views.tables import header
from kvmtrace.views.tables.grid import fit
from kvmtrace.views.tables.rows import IncidentRow, VmRow
from kvmtrace.views.terminal import pages
from kvmtrace.views.terminal.ui_state import Table, UiState

Row = TypeVar("Row", VmRow, IncidentRow)

_KEYS = "enter details  tab switch  s/S sort  / filter  p pause  i probes  ? help  q quit"
_BACK = "q back  ↑↓ scroll  p pause  ctrl+c quit"


@dataclass(frozen=True, slots=True)
class Drawn:
    """One line of the screen; ``selected``: highlighted as a whole."""

    line: Line = ()
    selected: bool = False


def frame(state: UiState, width: int, height: int) -> list[Drawn]:
    """The whole screen: exactly ``height`` lines of at most ``width`` cells."""
    head = [
        _clock_line(state),
        header.probe_spans(state.snapshot),
        header.memory_spans(state.snapshot),
    ]
    rare = (header.kernel_spans(state.snapshot), header.clock_spans(state.snapshot))
    head += [line for line in rare if line is not None]
    room = max(0, height - len(head) - 1)
    if state.page == "main":
        body = _tables(state, width, room)
        foot = _main_foot(state)
    else:
        body = _page(state, width, room)
        foot = ((_BACK, "dim"),)
    lines = [*map(Drawn, head), *body[:room]]
    lines += [Drawn()] * (height - 1 - len(lines))
    lines = [*lines[: max(0, height - 1)], Drawn(foot)]
    return [Drawn(clip_line(d.line, width), d.selected) for d in lines][:height]


def _clock_line(state: UiState) -> Line:
    # The clock comes first, because a line is redrawn from its start to its last change.
    clock: Span = (clock_of(state.snapshot.wall(state.now)) + "  ", "dim")
    pause: Line = (("PAUSED  ", "warn"),) if state.paused else ()
    return (clock, *pause, *header.host_spans(state.snapshot))


def _main_foot(state: UiState) -> Line:
    if state.typing:
        return (("filter by VM: ", "head"), (state.filter, ""), ("▏", ""), ("  enter, esc", "dim"))
    return ((_KEYS, "dim"),)


def _tables(state: UiState, width: int, room: int) -> list[Drawn]:
    # Two lines of titles each and one between. Each table may use what the other leaves.
    rows = room - 5
    if rows < 4:  # no room for two: show the one that keys act on
        room = max(0, room - 2)
        if state.on_incidents:
            return _table(state, state.incidents, width, room)
        return _table(state, state.vms, width, room)
    wanted = max(1, len(state.incidents.rows))
    above = min(max(1, len(state.vms.rows)), max(rows - rows // 2, rows - wanted))
    return [
        *_table(state, state.vms, width, above),
        Drawn(),
        *_table(state, state.incidents, width, rows - above),
    ]


def _table(state: UiState, table: Table[Row], width: int, height: int) -> list[Drawn]:
    active = state.table is table
    visible = table.visible(height)
    lines = [Drawn(_title(state, table, active, len(visible)))]
    if not table.rows:
        nothing = f"nothing matches {state.filter!r}" if table.total else table.nothing
        lines.append(Drawn(((f"  {nothing}", "dim"),)))
    else:
        # Fitted to all rows, so that widths do not change while scrolling.
        fitted = fit(table.columns, table.rows, width)
        lines.append(Drawn(fitted.head(None if table.sort is None else table.by.name)))
        for row in visible:
            chosen = active and table.selected is not None and row.id == table.selected.id
            lines.append(Drawn(fitted.row(row), chosen))
    lines += [Drawn()] * (height + 2 - len(lines))
    return lines[: height + 2]


def _title(state: UiState, table: Table[Row], active: bool, shown: int) -> Line:
    # The active table has a mark, not only a colour.
    mark = "▶ " if active else "  "
    spans: list[Span] = [(mark, "title"), (table.title, "title" if active else "head")]
    total = len(table.rows)
    if shown < total:
        spans.append((f"  {table.top + 1}-{table.top + shown} of {total}", ""))
    elif total:
        spans.append((f"  {total}", ""))
    if state.filter:
        spans.append((f"  filter {state.filter!r} (esc clears)", "warn"))
    if table.sort is not None or table.reverse:
        order = "urgency" if table.sort is None else table.by.name
        spans.append((f"  by {order} {'↓' if table.falling else '↑'}", "note"))
    return tuple(spans)


def _page(state: UiState, width: int, room: int) -> list[Drawn]:
    match state.page:
        case "vm":
            lines = pages.vm_page(state.snapshot, state.shown, state.now, state.rates)
        case "incident":
            lines = pages.incident_page(state.snapshot, state.shown, state.now)
        case "probes":
            lines = [
                *(header.host_spans(state.snapshot), header.memory_spans(state.snapshot), ()),
                *header.probe_lines(state.snapshot),
            ]
        case _:
            lines = pages.help_page()
    parts = [part for line in lines for part in pages.wrapped(line, width)]
    state.scroll = max(0, min(state.scroll, len(parts) - room))
    return [Drawn(line) for line in parts[state.scroll :]]
