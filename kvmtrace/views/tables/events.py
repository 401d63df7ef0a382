"""The table of the last events, the newest first."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

from kvmtrace.model import CorrelatedEvent
from kvmtrace.views.event_lines import event_text
from kvmtrace.views.tables.grid import Column


@dataclass(frozen=True, slots=True)
class EventRow:
    """A row of the table of events; ``text``: the line of ``events``."""

    correlated: CorrelatedEvent
    text: str

    @property
    def id(self) -> int:
        # Events have no name of their own. The object lives as long as its row is shown.
        return id(self.correlated)


def event_rows(recent: Iterable[CorrelatedEvent]) -> list[EventRow]:
    """Those that ``events`` prints, the newest first. ``recent``: the oldest first."""
    lines = ((one, event_text(one)) for one in recent)
    return [EventRow(one, text) for one, text in lines if text is not None][::-1]


def _style(row: EventRow) -> str:
    match row.correlated.event.kind:
        case "poison":
            return "bad"
        case "lost":
            return "warn"
    return ""


EVENT_COLUMNS: tuple[Column[EventRow], ...] = (
    Column(
        "EVENT, NEWEST FIRST",
        lambda row, width: row.text,
        lambda row: row.correlated.event.ts,
        _style,
        right=False,
        least=10,
        key="t",
    ),
)
