"""What is wrong with a recording, and the errors that report it."""

from __future__ import annotations

from kvmtrace.errors import KvmtraceError
from kvmtrace.sources.checksums import Places
from kvmtrace.wording import counted

_ROUNDED = "a program rounded the numbers (jq before 1.7 does); times are exact to 256 ns"


class RecordingFaults:
    """What is wrong with a recording, by line of the file."""

    def __init__(self) -> None:
        self.first: tuple[int, str] | None = None
        self.unchecked = Places()
        self.kept = 0
        self.no_end = False
        self._left_out = Places()
        self._rest = ""
        self._missing = 0
        self._gaps = Places()
        self.passed = 0  # lines left out since the last good one: those are not missing

    def leave_out(self, number: int, what: str, is_last: bool) -> None:
        """Note a line that is left out. ``is_last``: so is everything after it."""
        self._rest = " and what follows" * is_last
        self.first = self.first or (number, what)
        self._left_out.add(number)
        self.passed += 1

    def miss(self, number: int, missing: int) -> None:
        """Note that lines before this one are missing, including those that were left out."""
        missing, self.passed = missing - self.passed, 0
        if missing > 0:
            self._missing += missing
            self._gaps.add(number)

    def error(self, path: str) -> KvmtraceError | None:
        gaps = f"{counted(self._missing, 'line')} missing before {self._gaps}"
        no_end = "the end is missing: it was cut off, or is still being written"
        facts = [gaps] * bool(self._missing) + [no_end] * self.no_end
        if self.first is not None:
            message = f"{path}, line {self.first[0]}: {self.first[1]}"
            if self._left_out.count:
                facts.insert(0, f"left out: {self._left_out}{self._rest}")
        elif facts:
            message = f"{path}: {facts.pop(0)}"
        else:
            return None
        return KvmtraceError(message, "; ".join([*facts, f"{counted(self.kept, 'event')} read"]))

    def doubt(self, path: str, is_rounded: bool) -> KvmtraceError | None:
        if not self.unchecked.count:
            return None
        return KvmtraceError(
            f"{path}: changed or added after it was recorded: {self.unchecked}",
            _ROUNDED if is_rounded else "without checksums, and read like the others",
        )
