"""Count errors from reports, of which several may be of one error."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field

from kvmtrace.events import HwError, Mce
from kvmtrace.linux import mce

MCE = "mce:mce_record"
EDAC = "ras:mc_event"

# Reports of one error come within this time of each other: registers are read at once, and firmware
# reports when it has written its record.
TOGETHER_NS = 1_000_000_000

_MAX_UNITS = 16

Bank = tuple[str, int, int]
Unit = tuple[str, Bank | None]  # the reporter, and the bank from which it has the error


@dataclass(slots=True)
class ErrorCount:
    """Errors at one place.

    Each unit (a bank, or a reporter without one) reports an error once at most, so the highest
    count of a unit is taken, not the sum. If one bank reports a corrected error while another
    reports an uncorrected one, it is the same error: each reports what it had to do itself.
    ``exact``: the place is one page; in a larger place, two reports are two errors.
    """

    exact: bool = True

    _units: dict[Unit, list[int]] = field(default_factory=dict)  # corrected, others
    _checked: tuple[Bank, int] | None = None  # last machine check: bank, time
    _edac_reported: tuple[Bank, int] | None = None  # the one that EDAC reported last
    _corrected: dict[Unit, tuple[int, int]] = field(
        default_factory=dict
    )  # last report: time, count
    _others: dict[Unit, int] = field(default_factory=dict)  # last report: time

    @property
    def errors(self) -> tuple[int, int]:
        """Corrected errors, other errors."""
        corrected = max((unit[0] for unit in self._units.values()), default=0)
        return corrected, max((unit[1] for unit in self._units.values()), default=0)

    def by_reporter(self) -> Iterator[tuple[str, tuple[int, int]]]:
        """(reporter, (corrected errors, other errors)) of each unit."""
        for (via, _), (corrected, others) in self._units.items():
            yield via, (corrected, others)

    def add(self, event: Mce | HwError, severity: str | None, at: ErrorCount | None = None) -> None:
        """Count a report. ``at``: the count with the machine checks at this place, if not this."""
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
        if self._reports_again(unit, at or self) and last is not None and together(ts, last):
            return  # such a reporter reports once for each bank that has the error
        counts[1] += count
        for of, (seen, some) in list(self._corrected.items()):
            if _apart(unit, of) and together(ts, seen):
                self._units[of][0] -= some
                del self._corrected[of]

    def _reports_again(self, unit: Unit, at: ErrorCount) -> bool:
        """Whether the reporter has no bank of its own, or reports the same check once more."""
        again = unit[1] is None
        if unit[0] == EDAC:
            again = again or self._edac_reported == at._checked
            self._edac_reported = at._checked
        return again

    def absorb(self, other: ErrorCount) -> None:
        """Add the counts of ``other``, which is of the same place."""
        for unit, counts in other._units.items():
            mine = self._units.setdefault(unit, [0, 0])
            mine[0] += counts[0]
            mine[1] += counts[1]

    def _unit(self, event: Mce | HwError) -> Unit:
        if isinstance(event, Mce):
            at_memory = mce.at_memory(event.status, event.vendor, event.bank, event.ipid)
            # A controller's bank is of its socket, whichever CPU reads it; others are of a CPU.
            whose = ("socket", event.socket) if at_memory else ("cpu", event.cpu)
            bank = (*whose, event.bank)
            self._checked = bank, event.ts
            return MCE, bank
        # EDAC reports the machine check that it is handed.
        if event.via == EDAC and self._checked and together(event.ts, self._checked[1]):
            return event.via, self._checked[0]
        return event.via, None


def _apart(one: Unit, other: Unit) -> bool:
    """Whether two units report independently: not the same unit, nor EDAC for the other."""
    return one != other and (one[1] is None or one[1] != other[1])


def together(ts: int, other: int) -> bool:
    """Whether two reports may be of one error."""
    return abs(ts - other) <= TOGETHER_NS
