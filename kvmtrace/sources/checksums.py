"""Checksums of a recording, which show that a line was changed, removed, added or moved.

Each line ends with its number and a CRC-32 of everything before the CRC, ``,"line":7,"crc":N}``.
Each line can be checked alone: lines that a filter such as grep leaves still match, and a bad
sector costs only the lines in it. Older readers ignore these fields.
"""

from __future__ import annotations

import json
import zlib
from collections.abc import Mapping
from dataclasses import dataclass, field
from decimal import Decimal
from typing import Any

LINE, CRC = "line", "crc"
EXACT, ODD = "exact", (1 << 53) + 1
"""In the header: the smallest integer that a double cannot hold, so that rounding shows."""

_BEFORE_CRC = f',"{CRC}":'.encode()

_NUMBERS = range(1 << 64)
_LAST = _NUMBERS[-1]

# Ranges that are listed; further ones are counted.
_NAMED = 8

_encode = json.JSONEncoder(separators=(",", ":")).encode


class Sealer:
    """Numbers the lines of one recording and adds their checksums."""

    def __init__(self) -> None:
        self._number = 0

    def seal(self, record: Mapping[str, Any]) -> str:
        """Return the line, with its newline."""
        self._number += 1
        body = _encode({**record, LINE: self._number})[:-1]
        return f'{body},"{CRC}":{zlib.crc32(body.encode())}}}\n'


class Broken(ValueError):
    """A line is not as or where it was written; the text is the reason."""


@dataclass
class Places:
    """Line numbers at which something was found in a file."""

    count: int = 0
    _ranges: list[list[int]] = field(default_factory=list)

    def add(self, first: int, last: int | None = None) -> None:
        """Add one line, or the lines ``first`` to ``last``."""
        last = first if last is None else last
        self.count += last - first + 1
        if self._ranges and self._ranges[-1][1] == first - 1:
            self._ranges[-1][1] = last
        elif len(self._ranges) < _NAMED:
            self._ranges.append([first, last])

    def __str__(self) -> str:
        """Return ``line 7``, or ``lines 7, 9-12 and 30 more``."""
        named = sum(last - first + 1 for first, last in self._ranges)
        more = [f"{self.count - named} more"] if self.count > named else []
        parts = [f"{first}" if first == last else f"{first}-{last}" for first, last in self._ranges]
        words = ", ".join(parts) + "".join(f" and {one}" for one in more)
        return f"{'line' if self.count == 1 else 'lines'} {words}"


class Checker:
    """Checks the lines of one recording, in the order of the file."""

    def __init__(self) -> None:
        self.sealed = False
        """Whether any line had a checksum; older recordings have none."""
        self.is_rounded = False
        """Whether a program rounded the numbers to doubles (jq before 1.7)."""
        self.is_checked = False
        """Whether the last line matched its checksum."""
        self.last = 0
        """The number of the last line in its place."""

    def missing_before(self, line: bytes, record: dict[str, Any]) -> int:
        """Return how many lines are missing before this one.

        Removes the checksum from ``record``. Raises Broken.
        """
        crc, number = record.pop(CRC, None), record.get(LINE)
        last = self.last
        if (
            type(number) is int
            and last < number <= _LAST
            and crc == zlib.crc32(line[: line.rfind(_BEFORE_CRC)])
            and EXACT not in record
        ):
            # As nearly all lines are.
            self.sealed = self.is_checked = True
            self.last = number
            return number - last - 1
        self.is_checked = False
        if crc is None:
            self.last += number == self.last + 1
            return 0
        self.sealed = True
        self.is_rounded |= record.get(EXACT, ODD) != ODD
        self.is_checked = _matches(line, record, crc)
        if type(number) is not int or number not in _NUMBERS:
            raise Broken("has no number")
        if not (self.is_checked or self._is_rounded(record)):
            raise Broken("does not match its checksum")
        if number <= self.last:
            raise Broken(f"line {number} of the recording, repeated or moved")
        missing, self.last = number - self.last - 1, number
        return missing

    def _is_rounded(self, record: dict[str, Any]) -> bool:
        """Whether rounding alone explains the line; times are then exact to 256 ns."""
        if not self.is_rounded:
            return False
        for name, one in record.items():
            if type(one) is float and one.is_integer():
                record[name] = int(one)
        large = [one for one in record.values() if type(one) is int and one >= ODD - 1]
        if not large or max(large) not in _NUMBERS:
            return False
        return all(int(Decimal(f"{one:.17g}")) == one for one in large)


def _matches(line: bytes, record: Mapping[str, Any], crc: object) -> bool:
    """Whether the line is as it was written, or the same in another encoding (jq writes UTF-8)."""
    if crc == zlib.crc32(line[: max(0, line.rfind(_BEFORE_CRC))]):
        return True
    try:
        return crc == zlib.crc32(_encode(record)[:-1].encode())
    except RecursionError:
        return False
