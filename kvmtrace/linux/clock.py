"""One clock: the kernel's stamps (CLOCK_MONOTONIC, as BPF and tracefs give them) to UTC."""

from __future__ import annotations

import functools
import time

from kvmtrace.events import ClockStep

# What is less is noise: the wall clock differs from CLOCK_MONOTONIC by a constant that only a step
# changes (NTP slews both), but a thread can be preempted between reading the one and the other.
MIN_STEP_NS = 10_000_000


@functools.cache
def epoch_offset_ns() -> int:
    """What to add to CLOCK_MONOTONIC nanoseconds to get nanoseconds since the epoch.

    Measured once per process: a wall clock that is stepped must not reorder events, nor set what is
    looked up apart from what the kernel says. ``Steps`` follows what became of it since.
    """
    return _start()[0]


@functools.cache
def _start() -> tuple[int, int]:
    """The offset at the start, and when that was (CLOCK_MONOTONIC)."""
    offset, _ = min((_offset() for _ in range(5)), key=lambda measured: measured[1])
    return offset, time.monotonic_ns()


def _offset() -> tuple[int, int]:
    """The offset now, and by how much it may be wrong."""
    before = time.monotonic_ns()
    wall = time.time_ns()
    after = time.monotonic_ns()
    return wall - (before + after) // 2, after - before


def now_ns() -> int:
    """Now, as events are stamped."""
    return time.monotonic_ns() + epoch_offset_ns()


def wall_ns() -> int:
    """What the wall clock says now, in nanoseconds since the epoch."""
    return time.time_ns()


class Steps:
    """Notices when the wall clock was stepped: clock_settime, NTP, resume of a suspended host."""

    def __init__(self) -> None:
        self._offset = epoch_offset_ns()
        self._suspended = _suspended_ns()
        self._looked = sum(_start())

    def look(self) -> ClockStep | None:
        """The step since the last look; events since then count as later than it.

        None without one. Exact to 0.1 ms. Costs about 2 µs.
        """
        now = now_ns()
        offset, doubt = _offset()
        if doubt >= MIN_STEP_NS:
            return None
        since, self._looked = self._looked, now
        step = round(offset - self._offset, -5)  # two clocks are not read at one moment
        if abs(step) < MIN_STEP_NS:
            return None
        suspended = _suspended_ns() - self._suspended
        self._offset += step
        self._suspended += suspended
        in_all = self._offset - epoch_offset_ns()
        return ClockStep(since, step, in_all, suspended if suspended >= MIN_STEP_NS else None)


def _suspended_ns() -> int:
    """For how long the host was suspended since it booted (clock_gettime(2), CLOCK_BOOTTIME)."""
    return time.clock_gettime_ns(time.CLOCK_BOOTTIME) - time.monotonic_ns()
