"""One clock: the kernel's stamps (CLOCK_MONOTONIC, as BPF and tracefs give them) to UTC."""

from __future__ import annotations

import functools
import time


@functools.cache
def epoch_offset_ns() -> int:
    """What to add to CLOCK_MONOTONIC nanoseconds to get nanoseconds since the epoch.

    Measured once per process: a wall clock that is stepped must not reorder events, nor set what is
    looked up apart from what the kernel says.
    """
    before = time.monotonic_ns()
    wall = time.time_ns()
    return wall - (before + time.monotonic_ns()) // 2


def now_ns() -> int:
    """Now, as events are stamped."""
    return time.monotonic_ns() + epoch_offset_ns()
