"""``hist`` files: what hist triggers counted (Documentation/trace/histogram.rst).

A trigger counts hits by key and adds up values. Text in, rows out.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import NamedTuple

READINGS = 4  # of one file, at most, until two agree on its values

_Row = tuple[str, str, tuple[str, ...]]  # the trigger's keys and condition, and the row's key

_BLOCK = re.compile(r"^# trigger info: hist:(?P<spec>.*)$", re.MULTILINE)
_ROW = re.compile(
    r"^\{ (?P<key>[^}\n]*) \} hitcount: +(?P<count>\d{1,20})(?P<values>.*)$", re.MULTILINE
)
_VALUE = re.compile(r"\b(\w+): +(\d{1,20})\b")


class Block(NamedTuple):
    """One trigger's part of a ``hist`` file.

    ``valued``: it adds up values. ``dropped``: hits that it had no entry for. ``rows``: (parts of
    the key, hits, {value: mean}).
    """

    valued: bool
    keys: str
    condition: str
    dropped: int
    rows: list[tuple[tuple[str, ...], int, dict[str, int]]]

    def with_means(self, means: Mapping[_Row, dict[str, int]]) -> Block:
        """The same block, with means that were accepted."""
        rows = [
            (parts, count, means.get((self.keys, self.condition, parts), {}))
            for parts, count, _ in self.rows
        ]
        return self._replace(rows=rows)


class HistogramReader:
    """Reads ``hist`` files, more than once if a row may have been printed during a hit.

    A row has the number of hits, and the sum of each value. sum/hits is the value if it was equal
    in all hits. The kernel prints the two separately, so a hit in between makes the mean wrong. A
    mean is accepted when two readings agree.
    """

    def __init__(self) -> None:
        self._known: dict[str, dict[_Row, dict[str, int]]] = {}

    def read(self, event: str, read: Callable[[], str]) -> list[Block]:
        """The event's triggers and their counts; ``read`` returns the file's text as of now."""
        blocks = list(_blocks(read()))
        accepted = dict(_means(blocks))
        known = self._known.get(event, {})
        # Rows of this reading only, not those that later readings add.
        doubtful = {
            row: [means, *([known[row]] if row in known else [])]
            for row, means in accepted.items()
            if means != known.get(row)
        }
        for _ in range(READINGS - 1):
            if not doubtful:
                break
            again = dict(_means(_blocks(read())))
            for row, before in list(doubtful.items()):
                means = again.get(row, {})
                if means in before:
                    accepted[row] = means
                    del doubtful[row]
                before.append(means)
        accepted |= {row: {} for row in doubtful}
        self._known[event] = accepted
        return [block.with_means(accepted) for block in blocks]


def _means(blocks: Iterable[Block]) -> Iterator[tuple[_Row, dict[str, int]]]:
    """The means of all rows that have values."""
    for block in blocks:
        for parts, _count, means in block.rows if block.valued else ():
            yield (block.keys, block.condition, parts), means


def _blocks(text: str) -> Iterator[Block]:
    blocks = list(_BLOCK.finditer(text))
    for index, block in enumerate(blocks):
        end = blocks[index + 1].start() if index + 1 < len(blocks) else len(text)
        body = text[block.end() : end]
        rows = []
        for row in _ROW.finditer(body):
            parts = tuple(part.partition(":")[2].strip() for part in row["key"].split(","))
            count = int(row["count"])
            sums = {name: int(total) for name, total in _VALUE.findall(row["values"])}
            # No value is ever 0: a sum of 0 is a first hit that is not complete.
            means = {
                name: total // count
                for name, total in sums.items()
                if count and total and not total % count
            }
            rows.append((parts, count, means))
        dropped = re.search(r"^ +Dropped: (\d{1,20})", body, re.MULTILINE)
        keys, _, values = block["spec"].partition(":vals=")
        condition = block["spec"].partition(" if ")[2]
        valued = values.startswith("hitcount,")
        yield Block(valued, keys, condition, int(dropped[1]) if dropped else 0, rows)


def signed(number: int) -> int:
    """A key that the kernel printed without its sign."""
    return number - (1 << 64) if number >> 63 else number
