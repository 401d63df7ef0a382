"""Counting errors behind reports: several of those may be of one error."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field

from kvmtrace.events import HwError, Mce
from kvmtrace.linux import mce

MCE = "mce:mce_record"
EDAC = "ras:mc_event"

# Reports of one error by several reporters come within this time of each other: registers are read
# at once, firmware reports when it has written its record.
TOGETHER_NS = 1_000_000_000

_MAX_UNITS = 16

Bank = tuple[str, int, int]
Unit = tuple[str, Bank | None]  # who reports, and the bank that it had it from


@dataclass(slots=True)
class ErrorCount:
    """Errors at one place.

    Every unit (a bank, or a reporter without one) sees an error once at most: their counts are not
    added up, the highest one counts. What a bank reports as corrected while another one reports an
    uncorrected error is the same error: each judges by what it had to do itself.
    ``exact``: what is reported here is of one page; elsewhere two reports are two errors.
    """

    exact: bool = True

    _units: dict[Unit, list[int]] = field(default_factory=dict)  # corrected, others
    _checked: tuple[Bank, int] | None = None  # the last machine check: bank, time
    _spoken: tuple[Bank, int] | None = None  # the one that EDAC spoke for last
    _corrected: dict[Unit, tuple[int, int]] = field(default_factory=dict)  # the last: time, count
    _others: dict[Unit, int] = field(default_factory=dict)  # the last: time

    @property
    def errors(self) -> tuple[int, int]:
        """Corrected ones, others."""
        corrected = max((unit[0] for unit in self._units.values()), default=0)
        return corrected, max((unit[1] for unit in self._units.values()), default=0)

    def by_reporter(self) -> Iterator[tuple[str, tuple[int, int]]]:
        """The same, unit by unit, with the name of the reporter."""
        for (via, _), (corrected, others) in self._units.items():
            yield via, (corrected, others)

    def add(self, event: Mce | HwError, severity: str | None, at: ErrorCount | None = None) -> None:
        """One more report. ``at``: knows of the machine checks at this place, if not this one."""
        unit = (at or self)._unit(event)
        if unit not in self._units and len(self._units) >= _MAX_UNITS:
            unit = ("others", None)
        counts = self._units.setdefault(unit, [0, 0])
        ts, count = event.ts, max(1, event.count)
        if not self.exact or severity is None:
            counts[severity != "corrected"] += count
            return
        if severity == "corrected":
            if any(_apart(unit, of) and together(ts, seen) for of, seen in self._others.items()):
                return
            counts[0] += count
            self._corrected[unit] = ts, count
            return
        last = self._others.get(unit)
        self._others[unit] = ts
        if self._speaks_again(unit, at or self) and last is not None and together(ts, last):
            return  # each bank that has it makes such a reporter speak
        counts[1] += count
        for of, (seen, some) in list(self._corrected.items()):
            if _apart(unit, of) and together(ts, seen):
                self._units[of][0] -= some
                del self._corrected[of]

    def _speaks_again(self, unit: Unit, at: ErrorCount) -> bool:
        """Whether a report is by nobody who has a bank of its own, or for the same check again."""
        again = unit[1] is None
        if unit[0] == EDAC:
            again = again or self._spoken == at._checked
            self._spoken = at._checked
        return again

    def absorb(self, other: ErrorCount) -> None:
        """What another one counted is of the same."""
        for unit, counts in other._units.items():
            mine = self._units.setdefault(unit, [0, 0])
            mine[0] += counts[0]
            mine[1] += counts[1]

    def _unit(self, event: Mce | HwError) -> Unit:
        if isinstance(event, Mce):
            at_memory = mce.at_memory(event.status, event.vendor, event.bank, event.ipid)
            # A controller's bank is its socket's, whichever CPU reads it; others are of one CPU.
            whose = ("socket", event.socket) if at_memory else ("cpu", event.cpu)
            bank = (*whose, event.bank)
            self._checked = bank, event.ts
            return MCE, bank
        # EDAC speaks for the machine check that it is handed.
        if event.via == EDAC and self._checked and together(event.ts, self._checked[1]):
            return event.via, self._checked[0]
        return event.via, None


def _apart(one: Unit, other: Unit) -> bool:
    """Whether two units report on their own: not one, nor EDAC for the other."""
    return one != other and (one[1] is None or one[1] != other[1])


def together(ts: int, other: int) -> bool:
    """Whether two reports may be of one error."""
    return abs(ts - other) <= TOGETHER_NS
