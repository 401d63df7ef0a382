"""The live table as the lines of a screen of a given size."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from kvmtrace.events import Host
from kvmtrace.views.format import Line, Span, cells, clip_line, clock_of, plain, zone_of
from kvmtrace.views.tables import header, summary
from kvmtrace.views.tables.grid import fit
from kvmtrace.views.terminal import detail, pages
from kvmtrace.views.terminal.ui_state import Table, UiState

# Lines of the pane with details, its title among them, and how many a table keeps beside it.
_PANE, _TABLE = 7, 10

_KEYS = (
    "enter whole story",
    "b bundle",
    "y copy",
    "/ filter",
    "a all or open",
    "s sort",
    "tab next",
    "space pause",
)
_TAPE_KEYS = ("space play", "< > step", "+ - speed", *_KEYS[:-1])
_LAST_KEYS = ("? help", "q quit")
_BACK = ("q back", "↑↓ scroll", "y copy", "space pause", "ctrl+c quit")


@dataclass(frozen=True, slots=True)
class Drawn:
    """One line of the screen; ``selected``: highlighted as a whole."""

    line: Line = ()
    selected: bool = False


def frame(state: UiState, width: int, height: int) -> list[Drawn]:
    """The whole screen: exactly ``height`` lines of at most ``width`` cells."""
    head = _head(state, width)
    room = max(0, height - len(head) - 1)
    if state.page == "main":
        body = []
        if not state.empty:
            body = [Drawn(_tabs(state, width)), *_body(state, width, max(0, room - 1))]
        foot = _foot(state, width)
    else:
        body = _page(state, width, room)
        foot = _message(state) or _keys(_BACK, (), width)
    lines = [*map(Drawn, head), *body[:room]]
    lines += [Drawn()] * (height - 1 - len(lines))
    lines = [*lines[: max(0, height - 1)], Drawn(foot)]
    return [Drawn(clip_line(d.line, width), d.selected) for d in lines][:height]


# -- above the tables


def _head(state: UiState, width: int) -> list[Line]:
    lines = [_title(state, width)]
    if state.status:
        lines.append(((state.status, "warn"),))
    if state.empty:
        return lines
    summed_up = summary.summary_spans(state.snapshot, state.now)
    notes = summary.note_spans(state.snapshot)
    step = header.clock_spans(state.snapshot)
    if step is not None:
        notes = (*notes, ("  " if notes else "", ""), *step)
    if notes and _width(summed_up) + _width(notes) + 3 <= width:
        return [*lines, _apart(summed_up, notes, width)]
    if _width(summed_up) > width:
        # As it is wrapped, all of it has the colour of its urgency.
        summed_up = ((plain(summed_up), summed_up[0][1]),)
    return [*lines, *detail.wrapped(summed_up, width)[:3], *([notes] if notes else [])]


def _title(state: UiState, width: int) -> Line:
    # The clock comes first, because a line is redrawn from its start to its last change.
    shown = state.snapshot
    wall = shown.wall(state.now)
    spans: list[Span] = [(f"{clock_of(wall)} {zone_of(wall)}", "dim")] if state.now else []
    if state.tape:
        spans.append((f"  {state.tape}", "note"))
    elif state.paused:
        spans.append(("  PAUSED", "warn"))
    host = shown.host
    counts = summary.count_spans(shown)
    while counts and _width(spans) + _width(counts) + 2 > width:
        counts = counts[:-1]  # the least urgent ones
    if host is not None and _width(spans) + cells(host.name) + _width(counts) + 4 <= width:
        spans.append((f"  {host.name}" if spans else host.name, "title"))
        room = width - _width(spans) - _width(counts) - 3
        spans += _host_parts(host, room)
    return _apart(tuple(spans), counts, width)


def _host_parts(host: Host, room: int) -> list[Span]:
    """As much as there is room for, in whole parts: who watches matters more than the kernel."""
    parts = [f"  Linux {host.kernel}", f"  {host.source}"]
    if host.source_why:
        parts.append(f" ({host.source_why})")
    for left_out in ((), (0,), (2,), (0, 2)):
        chosen = [part for n, part in enumerate(parts) if n not in left_out]
        if sum(map(cells, chosen)) <= room:
            return [(part, "dim" if part.startswith(" (") else "") for part in chosen]
    return []


def _apart(left: Line, right: Line, width: int) -> Line:
    """One at the left edge, one at the right, at least two cells apart."""
    if not right:
        return left
    gap = max(2, width - _width(left) - _width(right))
    return (*left, (" " * gap, ""), *right)


def _width(line: Sequence[Span]) -> int:
    return sum(cells(text) for text, _ in line)


def _tabs(state: UiState, width: int) -> Line:
    shown = _shown(state)
    for right in (shown, shown[:1] if state.filter else ()):
        for names in (_names(state, counts=True, gap="  "), _names(state, counts=False, gap=" ")):
            if _width(names) + _width(right) + 2 * bool(right) <= width:
                return _apart(names, right, width)
    return (*shown[:1], ("  ", ""), *names) if state.filter else names


def _names(state: UiState, *, counts: bool, gap: str) -> Line:
    spans: list[Span] = []
    for table in state.tables:
        active = table is state.table
        number = _count(state, table) if counts or active else ""
        name = f"{table.title} {number}".rstrip()
        # The active one has brackets, not only a colour.
        spans.append((gap if spans else "", ""))
        spans.append((f"[{name}]", "title") if active else (name, "dim"))
    return tuple(spans)


def _count(state: UiState, table: Table[Any]) -> str:
    if table is state.events:
        return ""
    if table is state.probes:
        probes = state.snapshot.probes
        return f"{sum(one.attached for one in probes)}/{len(probes)}"
    return str(len(table.rows))


def _shown(state: UiState) -> Line:
    """Which rows are shown, and in which order."""
    table = state.table
    spans: list[Span] = []
    if state.filter:
        spans.append((f"filter {state.filter!r} (esc clears)", "warn"))
    if table.hidden:
        spans.append((f"{table.hidden} over (a)", "dim"))
    spans.append((f"by {table.order}", "dim" if table.sort is None else "note"))
    return tuple(
        (text + "  " * (n < len(spans)), style) for n, (text, style) in enumerate(spans, 1)
    )


# -- the tables


def _body(state: UiState, width: int, room: int) -> list[Drawn]:
    table = state.table
    wanted = max(1, len(table.rows)) + 1
    # A pane for the selected row, in what the table leaves or, on a high screen, in a third of it.
    pane = room - wanted
    if pane < _PANE:
        pane = room // 3 if room - room // 3 > _TABLE + 1 and room // 3 >= _PANE else 0
    lines = _table(state, table, width, room - pane)
    if pane and table.selected is not None:
        lines += [Drawn()] * (room - pane - len(lines))
        about = detail.lines(state, table.selected, width)
        lines += [Drawn(line) for line in _cut(about, pane)]
    return lines


def _cut(lines: list[Line], room: int) -> list[Line]:
    if len(lines) <= room:
        return lines
    more = len(lines) - room + 1
    return [*lines[: room - 1], ((f"  … {more} more lines: enter", "dim"),)]


def _table(state: UiState, table: Table[Any], width: int, height: int) -> list[Drawn]:
    if not table.rows:
        nothing = table.nothing
        if state.filter and table.total:
            nothing = f"nothing matches {state.filter!r}"
        elif table.hidden:
            nothing = f"none is open; {table.hidden} over (a shows them)"
        return [Drawn(((f"  {nothing}", "dim"),))]
    visible = table.visible(height - 1)
    # Fitted to all rows, so that widths do not change while scrolling.
    fitted = fit(table.columns, table.rows, width)
    lines = [Drawn(fitted.head(None if table.sort is None else table.by.name))]
    for row in visible:
        chosen = table.selected is not None and row.id == table.selected.id
        lines.append(Drawn(fitted.row(row), chosen))
    return lines


# -- the other pages, and the last line


def _page(state: UiState, width: int, room: int) -> list[Drawn]:
    lines = pages.help_page(state) if state.page == "help" else pages.story(state, width)
    parts = [part for line in lines for part in detail.wrapped(line, width)]
    state.scroll = max(0, min(state.scroll, len(parts) - room))
    shown = [Drawn(line) for line in parts[state.scroll :]]
    if len(shown) > room > 1:
        more = len(shown) - room + 1
        shown[room - 1 :] = [Drawn(((f"  … {more} more lines: ↓", "dim"),))]
    return shown


def _foot(state: UiState, width: int) -> Line:
    if state.typing:
        return (("filter: ", "head"), (state.filter, ""), ("▏", ""), ("  enter, esc", "dim"))
    table = state.table
    shown = min(table.page, len(table.rows))
    if shown < len(table.rows) and not state.message:
        place = f"{table.top + 1}-{table.top + shown} of {len(table.rows)}  "
        keys = _keys(_TAPE_KEYS if state.tape else _KEYS, _LAST_KEYS, width - len(place))
        return ((place, ""), *keys)
    return _message(state) or _keys(_TAPE_KEYS if state.tape else _KEYS, _LAST_KEYS, width)


def _message(state: UiState) -> Line:
    return ((state.message, "note"),) if state.message else ()


def _keys(keys: Sequence[str], last: Sequence[str], width: int) -> Line:
    """As many of the keys as there is room for, and the last ones in any case."""
    chosen = list(keys)
    while chosen and cells("  ".join([*chosen, *last])) > width:
        chosen.pop()
    return (("  ".join([*chosen, *last]), "dim"),)
