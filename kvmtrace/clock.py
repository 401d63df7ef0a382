"""One clock: the kernel's stamps (CLOCK_MONOTONIC, as BPF and tracefs give them) to UTC."""

from __future__ import annotations

import time


def epoch_offset_ns() -> int:
    """What to add to CLOCK_MONOTONIC nanoseconds to get nanoseconds since the epoch.

    Measured once per source: a stepped wall clock must not reorder events.
    """
    before = time.monotonic_ns()
    wall = time.time_ns()
    return wall - (before + time.monotonic_ns()) // 2
