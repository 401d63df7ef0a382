"""CPU time of a function, and tables of it."""

from __future__ import annotations

import gc
import time
from collections.abc import Callable, Iterable

REPEATS = 5


def best(function: Callable[[], object], repeats: int = REPEATS) -> float:
    """Return the fewest CPU seconds of several calls: what others do at the time adds to them."""
    return min(_once(function) for _ in range(repeats))


def _once(function: Callable[[], object]) -> float:
    gc.collect()
    began = time.process_time()
    function()
    return time.process_time() - began


def table(head: tuple[str, ...], rows: Iterable[tuple[str, ...]]) -> list[str]:
    """Return the lines of a table in Markdown."""
    lines = [f"| {' | '.join(cells)} |" for cells in (head, *rows)]
    return [lines[0], "|---" * len(head) + "|", *lines[1:]]
