"""Measure whether a thread hangs, computes endlessly, or is only slow.

On a busy or emulated machine an orderly end takes seconds, most of them in short waits for the
kernel. A thread that hangs in the kernel sleeps, uses no CPU time and executes no Python
instruction. A thread that computes does not sleep.
"""

from __future__ import annotations

import os
import sys
import threading
import time

from kvmtrace.linux import task_stat


class Standstill:
    """Measures for how long a Python thread has made no progress."""

    def __init__(self, thread: threading.Thread) -> None:
        self._thread = thread
        self._at: tuple[object, ...] | None = None
        self._since = time.monotonic()
        self._began: int | None = None  # in ticks of CPU time
        self.computed = 0.0
        """Seconds of CPU time that it took from the first to the last call of ``seconds``.

        To wait for a CPU is no work: a busy host makes every orderly end last longer.
        """

    def seconds(self) -> float:
        """Return for how long it has slept at one instruction, without CPU time in between."""
        frame = sys._current_frames().get(self._thread.ident or 0)
        # Without file descriptors it cannot be read: the thread counts as asleep.
        path = f"/proc/self/task/{self._thread.native_id}/stat"
        state, *cpu_time = task_stat.read_state(path, if_unreadable="S")
        at = (id(frame), frame.f_lasti if frame is not None else None, *cpu_time)
        if cpu_time:
            ticks = sum(map(int, cpu_time))
            if self._began is None:
                self._began = ticks
            self.computed = (ticks - self._began) / os.sysconf("SC_CLK_TCK")
        now = time.monotonic()
        if at != self._at or state not in "SD":
            self._at, self._since = at, now
        return now - self._since
