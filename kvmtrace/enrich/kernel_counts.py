"""Read the kernel's own counts of memory failures.

/sys/devices/system/node/nodeN/memory_failure (Linux 6.3) and HardwareCorrupted of /proc/meminfo.
"""

from __future__ import annotations

import time

from kvmtrace.enrich.stage import Stage
from kvmtrace.events import Event, KernelCounts
from kvmtrace.linux.page_flags import failure_counts, hardware_corrupted_bytes

COUNTS_SECONDS = 5.0


class KernelCountsReader(Stage):
    """Adds a KernelCounts when the counts have changed, in front of the events read after it.

    The kernel reports a page before it counts it (action_result). Counts are therefore read before
    events: a page that is counted and not among the events was missed.
    """

    def __init__(self, proc: str = "/proc", sys: str = "/sys") -> None:
        self._proc, self._sys = proc, sys
        self._last: tuple[tuple[tuple[str, int], ...], int | None] | None = None
        self._next = 0.0
        self._changed: list[Event] = []

    def before_read(self, now: int) -> None:
        if time.monotonic() < self._next:
            return
        self._next = time.monotonic() + COUNTS_SECONDS
        try:
            failures = failure_counts(self._sys)
        except OSError:
            return  # next time
        counts = failures, hardware_corrupted_bytes(f"{self._proc}/meminfo")
        if counts != self._last:
            self._changed.append(KernelCounts(now, *counts, at_start=self._last is None))
            self._last = counts

    def process(self, events: list[Event], now: int, *, last: bool = False) -> list[Event]:
        changed, self._changed = self._changed, []
        return changed + events
