"""Convert the kernel's timestamps (CLOCK_MONOTONIC, in BPF and tracefs) to UTC."""

from __future__ import annotations

import functools
import time

from kvmtrace.events import ClockStep

# Smaller differences are noise. The wall clock differs from CLOCK_MONOTONIC by a constant that only
# a step changes (NTP slews both), but a thread can be preempted between the two readings.
MIN_STEP_NS = 10_000_000


@functools.cache
def epoch_offset_ns() -> int:
    """Return what to add to CLOCK_MONOTONIC nanoseconds to get nanoseconds since the epoch.

    Measured once per process: a step of the wall clock must not reorder events, or separate events
    of lookups from those of the kernel. ``Steps`` follows later steps.
    """
    return _start()[0]


@functools.cache
def _start() -> tuple[int, int]:
    """Return the offset at the start, and when that was (CLOCK_MONOTONIC)."""
    offset, _ = min((_offset() for _ in range(5)), key=lambda measured: measured[1])
    return offset, time.monotonic_ns()


def _offset() -> tuple[int, int]:
    """Return the offset now, and its uncertainty."""
    before = time.monotonic_ns()
    wall = time.time_ns()
    after = time.monotonic_ns()
    return wall - (before + after) // 2, after - before


def now_ns() -> int:
    """Return the current time by the clock of all events."""
    return time.monotonic_ns() + epoch_offset_ns()


def wall_ns() -> int:
    """Return the time by the wall clock, in nanoseconds since the epoch."""
    return time.time_ns()


class Steps:
    """Detects steps of the wall clock: clock_settime, NTP, resume of a suspended host."""

    def __init__(self) -> None:
        self._offset = epoch_offset_ns()
        self._suspended = _suspended_ns()
        self._looked = sum(_start())

    def look(self) -> ClockStep | None:
        """Return the step since the last call, if any; events since then count as later than it.

        Exact to 0.1 ms. Costs about 2 µs.
        """
        now = now_ns()
        offset, doubt = _offset()
        if doubt >= MIN_STEP_NS:
            return None
        since, self._looked = self._looked, now
        step = round(offset - self._offset, -5)  # the clocks are read one after the other
        if abs(step) < MIN_STEP_NS:
            return None
        suspended = _suspended_ns() - self._suspended
        self._offset += step
        self._suspended += suspended
        in_all = self._offset - epoch_offset_ns()
        return ClockStep(since, step, in_all, suspended if suspended >= MIN_STEP_NS else None)


def _suspended_ns() -> int:
    """Return how long the host was suspended since boot (clock_gettime(2), CLOCK_BOOTTIME)."""
    return time.clock_gettime_ns(time.CLOCK_BOOTTIME) - time.monotonic_ns()
