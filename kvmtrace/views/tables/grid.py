"""Tables of any rows: which columns fit into a width, and the lines of the table."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any, Generic, TypeVar

from kvmtrace.views.format import Line, Span, cells, pad

Row = TypeVar("Row")


@dataclass(frozen=True)
class Column(Generic[Row]):
    """A column: how its cells look, sort and shrink.

    ``text(row, width)``: the cell in ``width`` terminal cells, in its natural width for None.
    ``full``: the cell on the landing page, where it may be of any length; by default ``text``.
    ``floor``: the least natural width. ``least``: how far it may shrink; None: not at all. With
    ``brief`` it shrinks first, because that loses nothing. ``drop``: the column with the highest
    number goes first if the terminal is too narrow; 0 stays. ``falling``: sorts from high to low.
    ``key``: the key that sorts by it in ``top``. ``firm``: others are dropped before it is narrower
    than that.
    """

    name: str
    text: Callable[[Row, int | None], str]
    sort: Callable[[Row], Any]
    style: Callable[[Row], str] = lambda row: ""
    right: bool = True
    falling: bool = True
    least: int | None = None
    brief: bool = False
    drop: int = 0
    floor: int = 0
    full: Callable[[Row], str] | None = None
    key: str = ""
    firm: int = 0


def text_column(
    name: str,
    text: Callable[[Row, int | None], str],
    sort: Callable[[Row], Any],
    style: Callable[[Row], str] = lambda row: "",
    **options: Any,
) -> Column[Row]:
    """A column of words: aligned left, sorted from A to Z."""
    return Column(name, text, sort, style, right=False, falling=False, **options)


@dataclass(frozen=True)
class Fitted(Generic[Row]):
    """Columns with their widths, for one terminal width."""

    columns: tuple[tuple[Column[Row], int], ...]
    gap: int

    def head(self, sorted_by: str | None = None) -> Line:
        cells_ = [
            (column.name, "sorted" if column.name == sorted_by else "head")
            for column, _ in self.columns
        ]
        return self._line(cells_)

    def row(self, row: Row) -> Line:
        return self._line([(c.text(row, width), c.style(row)) for c, width in self.columns])

    def _line(self, texts: Sequence[Span]) -> Line:
        # The gap belongs to the cell before it: fewer changes of style, fewer bytes over ssh.
        gaps = [" " * self.gap] * (len(texts) - 1) + [""]
        return tuple(
            (pad(text, width, right=column.right) + gap, style)
            for (column, width), (text, style), gap in zip(self.columns, texts, gaps, strict=True)
        )


def fit(columns: Iterable[Column[Row]], rows: Sequence[Row], width: int) -> Fitted[Row]:
    """The columns that fit, and their widths. Columns are dropped before a number is cut."""
    chosen = list(columns)
    natural = {
        c.name: max([cells(c.name), c.floor, *(cells(c.text(row, None)) for row in rows)])
        for c in chosen
    }
    gap = 2 if sum(natural.values()) + 2 * (len(chosen) - 1) <= width else 1
    while True:
        room = width - gap * (len(chosen) - 1)
        droppable = any(c.drop for c in chosen)
        least = {
            c.name: natural[c.name]
            if c.least is None
            else min(natural[c.name], max(c.least, c.firm if droppable else 0))
            for c in chosen
        }
        if sum(least.values()) <= room or not droppable:
            break
        chosen.remove(max(chosen, key=lambda c: c.drop))
    widths = {c.name: natural[c.name] for c in chosen}
    # The widest of the least firm ones gives way first, so that short ones stay whole.
    while sum(widths.values()) > room:
        flexible = [c for c in chosen if widths[c.name] > least[c.name]]
        if not flexible:
            break
        widths[max(flexible, key=lambda c: (-c.firm, c.brief, widths[c.name])).name] -= 1
    return Fitted(tuple((column, widths[column.name]) for column in chosen), gap)
