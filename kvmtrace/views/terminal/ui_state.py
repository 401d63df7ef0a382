"""The choices of the user of the live table, and what keys do to them, without a terminal."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from enum import StrEnum, auto
from typing import Any, Generic, TypeVar

from kvmtrace.model import CorrelatedEvent, IncidentStatus, Snapshot
from kvmtrace.views.format import hex_of
from kvmtrace.views.tables.columns import INCIDENT_COLUMNS, VM_COLUMNS
from kvmtrace.views.tables.dimms import DIMM_COLUMNS, DimmRow, dimm_rows
from kvmtrace.views.tables.events import EVENT_COLUMNS, EventRow, event_rows
from kvmtrace.views.tables.grid import Column
from kvmtrace.views.tables.probes import PROBE_COLUMNS, ProbeRow, probe_rows
from kvmtrace.views.tables.rows import IncidentRow, VmRow, incident_rows, vm_rows
from kvmtrace.views.terminal.trends import Trends

AnyRow = IncidentRow | VmRow | DimmRow | EventRow | ProbeRow
Row = TypeVar("Row", IncidentRow, VmRow, DimmRow, EventRow, ProbeRow)

_MESSAGE_TICKS = 8


class Wish(StrEnum):
    """What a key asks of the program, beyond another look at the same tables."""

    NOTHING = auto()
    QUIT = auto()
    BUNDLE = auto()
    COPY = auto()
    PLAY = auto()
    STEP_BACK = auto()
    STEP_ON = auto()
    SLOWER = auto()
    FASTER = auto()


@dataclass
class Table(Generic[Row]):
    """One table: its rows as sorted and filtered, the selected row, and the part on the screen.

    The selection is the id of a row, not its position: rows move when counts change. ``over``:
    which rows are over; ``hidden``: how many of them are not shown. ``more``: words of a row that
    the filter finds beside those in its columns.
    """

    title: str
    nothing: str
    columns: tuple[Column[Row], ...]
    first: str = "urgency"
    over: Callable[[Row], bool] = lambda row: False
    more: Callable[[Row], Sequence[str]] = lambda row: ()
    rows: list[Row] = field(default_factory=list)
    total: int = 0
    hidden: int = 0
    sort: int | None = None
    reverse: bool = False
    chosen: Any = None
    top: int = 0
    page: int = 1

    def take(self, rows: Sequence[Row], text: str = "", *, over: bool = True) -> None:
        """Take new rows, the first ones first; filter and sort them. ``over``: also those."""
        self.total = len(rows)
        shown = [row for row in rows if over or not self.over(row)]
        self.hidden = self.total - len(shown)
        self.rows = [row for row in shown if not text or self._has(row, text.casefold())]
        if self.sort is not None:
            # Stable in both directions: equal rows stay in their first order.
            self.rows.sort(key=self.by.sort, reverse=self.falling)
        elif self.reverse:
            self.rows.reverse()

    def _has(self, row: Row, text: str) -> bool:
        words: list[str] = [
            c.text(row, None) if c.full is None else c.full(row) for c in self.columns
        ]
        return any(text in word.casefold() for word in (*words, *self.more(row)))

    @property
    def by(self) -> Column[Row]:
        """The column that sorts, if one does."""
        return self.columns[self.sort or 0]

    @property
    def order(self) -> str:
        """By what it is sorted, and in which direction unless it is the first order."""
        if self.sort is None and not self.reverse:
            return self.first
        return f"{self.first if self.sort is None else self.by.name} {'↓' if self.falling else '↑'}"

    @property
    def falling(self) -> bool:
        """Whether it sorts from high to low; what comes first at first counts as high."""
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
        """Sort by the next column; after the last one, in the first order again."""
        number = 0 if self.sort is None else self.sort + 1
        self.sort = None if number == len(self.columns) else number
        self.reverse = False

    def sort_by_key(self, key: str) -> bool:
        """Sort by the column of this key, again: the other way round; False: no such key."""
        numbers = {column.key: n for n, column in enumerate(self.columns) if column.key}
        if key != "u" and key not in numbers:
            return False
        number = numbers.get(key)
        self.reverse = number == self.sort and not self.reverse
        self.sort = number
        return True

    def visible(self, height: int) -> list[Row]:
        """The rows that ``height`` lines can show, the selected one among them."""
        self.page = max(1, height)
        self.top = max(self.position - self.page + 1, min(self.top, self.position))
        self.top = max(0, min(self.top, len(self.rows) - self.page))
        return self.rows[self.top : self.top + self.page] if height > 0 else []


def _incidents() -> Table[IncidentRow]:
    return Table(
        "Incidents",
        "no poisoned page",
        INCIDENT_COLUMNS,
        over=lambda row: row.incident.state == IncidentStatus.CLOSED,
        more=lambda row: [
            hex_of(row.incident.pfn),
            *(hex_of(owner.gfn) for owner in row.incident.owners),
            *(one.uuid or "" for one in row.incident.vm_identities.values()),
        ],
    )


def _vms() -> Table[VmRow]:
    return Table(
        "VMs",
        "no VMs seen",
        VM_COLUMNS,
        over=lambda row: row.vm.gone,
        more=lambda row: [row.vm.uuid or "", f"pid {row.vm.pid}"],
    )


@dataclass
class UiState:
    """The state of the display.

    ``page``: "main" (tabs), "story" (of ``shown``: a tab and the id of a row) or "help".
    ``everything``: show what is over as well. ``status``: of the source; ``message``: about the
    last key. ``vm_trends``: of exits, by VM key; ``incident_trends``: of notifications, by id.
    ``tape``: where a recording is, "" if it is none. ``empty``: there is nothing to show yet.
    """

    snapshot: Snapshot = field(default_factory=Snapshot)
    now: int = 0
    recent: Sequence[CorrelatedEvent] = ()
    vm_trends: Trends[int] = field(default_factory=Trends)
    incident_trends: Trends[str] = field(default_factory=Trends)
    status: str = ""
    message: str = ""
    tape: str = ""
    empty: bool = False
    paused: bool = False
    everything: bool = False
    filter: str = ""
    typing: bool = False
    page: str = "main"
    shown: tuple[int, Any] = (0, None)
    scroll: int = 0
    tab: int = 0
    incidents: Table[IncidentRow] = field(default_factory=_incidents)
    vms: Table[VmRow] = field(default_factory=_vms)
    dimms: Table[DimmRow] = field(
        default_factory=lambda: Table("DIMMs", "no error reported by hardware", DIMM_COLUMNS)
    )
    events: Table[EventRow] = field(
        default_factory=lambda: Table("Events", "no events yet", EVENT_COLUMNS, first="time")
    )
    probes: Table[ProbeRow] = field(
        default_factory=lambda: Table("Probes", "no probes", PROBE_COLUMNS, first="state")
    )
    _message_left: int = 0
    _touched: bool = False

    def take(self, snapshot: Snapshot, now: int, recent: Sequence[CorrelatedEvent] = ()) -> None:
        """Take a new snapshot of ``now``, and the last events."""
        self.snapshot, self.now, self.recent = snapshot, now, recent
        self.vm_trends.add({key: sum(vm.exits.values()) for key, vm in snapshot.vms.items()}, now)
        self.incident_trends.add({i.id: i.exits + i.sigbus for i in snapshot.incidents}, now)
        self._arrange()
        if not self._touched:
            # Where there is no incident, VMs are more than an empty table.
            self.tab = 1 if self.vms.rows and not self.incidents.total else 0

    def say(self, message: str) -> None:
        """Show a message until the next key, or for some seconds."""
        self.message, self._message_left = message, _MESSAGE_TICKS

    def passed(self) -> None:
        """Note that a second, or whatever the interval is, is over."""
        self._message_left -= 1
        if self._message_left <= 0:
            self.message = ""

    def _arrange(self) -> None:
        shown, now = self.snapshot, self.now
        of_vms, of_incidents = self.vm_trends, self.incident_trends
        self._fill(self.incidents, incident_rows(shown, now, of_incidents.rates, of_incidents.bars))
        self._fill(self.vms, vm_rows(shown, now, of_vms.rates, of_vms.bars))
        self._fill(self.dimms, dimm_rows(shown, now))
        self._fill(self.probes, probe_rows(shown))
        # Hundreds of lines, whose number nobody has to know.
        if self.table is self.events:
            self._fill(self.events, event_rows(self.recent))

    def _fill(self, table: Table[Row], rows: list[Row]) -> None:
        table.take(rows, self.filter, over=self.everything)

    @property
    def tables(self) -> tuple[Table[Any], ...]:
        """One a tab, from left to right."""
        return self.incidents, self.vms, self.dimms, self.events, self.probes

    @property
    def table(self) -> Table[Any]:
        """The one that is shown, and that keys act on."""
        return self.tables[self.tab]

    def press(self, key: str, character: str | None) -> Wish:
        """Handle a key (by Textual's name)."""
        self.message, self._touched = "", True
        if key == "ctrl+c":
            return Wish.QUIT
        if self.typing:
            self._type(key, character)
            self._arrange()
            return Wish.NOTHING
        wish = _WISHES.get(character or key, Wish.NOTHING)
        if wish is Wish.NOTHING:
            wish = self._press(key, character or "")
        if wish is Wish.PLAY and not self.tape:
            self.paused = not self.paused
        self._arrange()
        return wish

    def _press(self, key: str, character: str) -> Wish:
        if self.page != "main":
            if key in ("q", "escape", "enter", "backspace", "left", "question_mark", "h"):
                self.page, self.scroll = "main", 0
            else:
                # ``screen`` limits it to the length of the page.
                step = _STEPS.get(key, 0) * (10 if "page" in key else 1)
                self.scroll = max(0, self.scroll + step)
            return Wish.NOTHING
        if key == "q":
            return Wish.QUIT
        self._press_main(key, character)
        return Wish.NOTHING

    def _press_main(self, key: str, character: str) -> None:
        table, tabs = self.table, len(self.tables)
        match key:
            case "tab" | "right":
                self.tab = (self.tab + 1) % tabs
            case "shift+tab" | "left":
                self.tab = (self.tab - 1) % tabs
            case _ if character.isascii() and character.isdecimal():
                if 1 <= int(character) <= tabs:
                    self.tab = int(character) - 1
            case "i":
                self.tab = tabs - 1
            case "a":
                self.everything = not self.everything
            case "s":
                table.next_sort()
            case "S" | "upper_s":
                table.reverse = not table.reverse
            case "slash":
                self.typing = True
            case "escape":
                self.filter = ""
            case "enter" if table.selected is not None:
                table.chosen = table.selected.id
                self.page, self.shown = "story", (self.tab, table.chosen)
                # The story of an event is that of its incident.
                event = table.selected.correlated if table is self.events else None
                if event is not None and event.incident is not None:
                    self.shown = self.tables.index(self.incidents), event.incident
            case "question_mark" | "h":
                self.page = "help"
            case _ if key in _STEPS:
                table.move(_STEPS[key] * (table.page if "page" in key else 1))
            case _ if table.sort_by_key(character):
                pass
            case _ if character.isprintable() and character:
                self.say(f"no function on {character!r}; ? lists the keys")

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


_WISHES = {
    "b": Wish.BUNDLE,
    "y": Wish.COPY,
    "p": Wish.PLAY,
    " ": Wish.PLAY,
    "<": Wish.STEP_BACK,
    ">": Wish.STEP_ON,
    "-": Wish.SLOWER,
    "+": Wish.FASTER,
}
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
