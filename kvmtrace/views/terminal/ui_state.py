"""The choices of the user of the live table, and what keys do to them, without a terminal."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any, Generic, TypeVar

from kvmtrace.model import Snapshot
from kvmtrace.views.tables.columns import INCIDENT_COLUMNS, VM_COLUMNS
from kvmtrace.views.tables.grid import Column
from kvmtrace.views.tables.rows import IncidentRow, VmRow, incident_rows, owner_name, vm_rows

Row = TypeVar("Row", VmRow, IncidentRow)


@dataclass
class Table(Generic[Row]):
    """One table: its rows as sorted and filtered, the selected row, and the part on the screen.

    The selection is the id of a row, not its position: rows move when counts change.
    """

    title: str
    nothing: str
    columns: tuple[Column[Row], ...]
    rows: list[Row] = field(default_factory=list)
    total: int = 0
    sort: int | None = None
    reverse: bool = False
    chosen: Any = None
    top: int = 0
    page: int = 1

    def take(self, rows: Sequence[Row], keep: Callable[[Row], bool]) -> None:
        """Take new rows, in order of urgency; filter and sort them."""
        self.total = len(rows)
        self.rows = [row for row in rows if keep(row)]
        if self.sort is not None:
            # Stable in both directions: equal rows stay in the order of urgency.
            self.rows.sort(key=self.by.sort, reverse=self.falling)
        elif self.reverse:
            self.rows.reverse()

    @property
    def by(self) -> Column[Row]:
        """The column that sorts, if one does."""
        return self.columns[self.sort or 0]

    @property
    def falling(self) -> bool:
        """Whether it sorts from high to low; the most urgent counts as high."""
        return (self.sort is None or self.by.falling) != self.reverse

    @property
    def position(self) -> int:
        """The position of the selected row; 0 if it is no longer there."""
        return next((n for n, row in enumerate(self.rows) if row.id == self.chosen), 0)

    @property
    def selected(self) -> Row | None:
        return self.rows[self.position] if self.rows else None

    def move(self, by: int) -> None:
        if self.rows:
            self.chosen = self.rows[max(0, min(self.position + by, len(self.rows) - 1))].id

    def next_sort(self) -> None:
        """Sort by the next column; after the last one, by urgency again."""
        number = 0 if self.sort is None else self.sort + 1
        self.sort = None if number == len(self.columns) else number
        self.reverse = False

    def visible(self, height: int) -> list[Row]:
        """The rows that ``height`` lines can show, the selected one among them."""
        self.page = max(1, height)
        self.top = max(self.position - self.page + 1, min(self.top, self.position))
        self.top = max(0, min(self.top, len(self.rows) - self.page))
        return self.rows[self.top : self.top + self.page] if height > 0 else []


@dataclass
class UiState:
    """The state of the display. ``page``: "main", "vm", "incident", "probes" or "help"."""

    snapshot: Snapshot = field(default_factory=Snapshot)
    now: int = 0
    paused: bool = False
    filter: str = ""
    typing: bool = False
    page: str = "main"
    shown: Any = None
    scroll: int = 0
    on_incidents: bool = False
    vms: Table[VmRow] = field(default_factory=lambda: Table("VMs", "no VMs seen", VM_COLUMNS))
    incidents: Table[IncidentRow] = field(
        default_factory=lambda: Table("incidents", "no incidents", INCIDENT_COLUMNS)
    )
    rates: dict[int, float] = field(default_factory=dict)

    def take(self, snapshot: Snapshot, now: int, rates: dict[int, float]) -> None:
        """Take a new snapshot."""
        self.snapshot, self.now, self.rates = snapshot, now, rates
        self._arrange()

    def _arrange(self) -> None:
        vms = self.snapshot.vms
        self.vms.take(
            vm_rows(self.snapshot, self.now, self.rates),
            lambda row: self._matches(f"{row.vm.label} {row.vm.pid}"),
        )
        self.incidents.take(
            incident_rows(self.snapshot, self.now),
            lambda row: (
                not self.filter
                or any(self._matches(owner_name(vms, o.vm)) for o in row.incident.owners)
            ),
        )

    def _matches(self, text: str) -> bool:
        return self.filter.casefold() in text.casefold()

    @property
    def table(self) -> Table[VmRow] | Table[IncidentRow]:
        """The table that keys act on."""
        return self.incidents if self.on_incidents else self.vms

    def press(self, key: str, character: str | None) -> bool:
        """Handle a key (by Textual's name); False: quit."""
        if key == "ctrl+c":
            return False
        if self.typing:
            self._type(key, character)
        elif self.page == "main":
            if key == "q":
                return False
            self._press_main(key)
        elif key in ("q", "escape", "enter", "backspace", "left") or key == self._opener():
            self.page, self.scroll = "main", 0
        else:
            # ``screen`` limits it to the length of the page.
            self.scroll = max(0, self.scroll + _STEPS.get(key, 0) * (10 if "page" in key else 1))
        if key == "p" and not self.typing:
            self.paused = not self.paused
        self._arrange()
        return True

    def _opener(self) -> str:
        return {"help": "question_mark", "probes": "i"}.get(self.page, "")

    def _press_main(self, key: str) -> None:
        table = self.table
        match key:
            case "tab" | "shift+tab" | "left" | "right":
                self.on_incidents = not self.on_incidents
            case "s":
                table.next_sort()
            case "S" | "upper_s":
                table.reverse = not table.reverse
            case "slash":
                self.typing = True
            case "escape":
                self.filter = ""
            case "enter" if table.selected is not None:
                self.page = "incident" if self.on_incidents else "vm"
                self.shown = table.selected.id
            case "question_mark" | "h":
                self.page = "help"
            case "i":
                self.page = "probes"
            case _ if key in _STEPS:
                table.move(_STEPS[key] * (table.page if "page" in key else 1))

    def _type(self, key: str, character: str | None) -> None:
        match key:
            case "enter":
                self.typing = False
            case "escape":
                self.typing, self.filter = False, ""
            case "backspace":
                self.filter = self.filter[:-1]
            case "ctrl+u":
                self.filter = ""
            case _ if character and character.isprintable():
                self.filter += character


_STEPS = {
    "up": -1,
    "k": -1,
    "down": 1,
    "j": 1,
    "pageup": -1,
    "pagedown": 1,
    "home": -1_000_000,
    "end": 1_000_000,
}
