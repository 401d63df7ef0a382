"""Measure whether a thread hangs, computes endlessly, or is only slow.

On a busy or emulated machine an orderly end takes seconds, most of them in short waits for the
kernel. A thread that hangs in the kernel sleeps, uses no CPU time and executes no Python
instruction. A thread that computes does not sleep.
"""

from __future__ import annotations

import sys
import threading
import time

from kvmtrace.linux import task_stat


class Standstill:
    """Measures for how long a Python thread has made no progress."""

    def __init__(self, thread: threading.Thread) -> None:
        self._thread = thread
        self._at: tuple[object, ...] | None = None
        self._since = self._looked = time.monotonic()
        self.awake = 0.0
        """Seconds in which it computed or waited for a CPU, as of the last call of ``seconds``."""

    def seconds(self) -> float:
        """Return for how long it has slept at one instruction, without CPU time in between."""
        frame = sys._current_frames().get(self._thread.ident or 0)
        # Without file descriptors it cannot be read: the thread counts as asleep.
        path = f"/proc/self/task/{self._thread.native_id}/stat"
        state, *cpu_time = task_stat.read_state(path, if_unreadable="S")
        at = (id(frame), frame.f_lasti if frame is not None else None, *cpu_time)
        before, self._looked = self._looked, time.monotonic()
        if state not in "SD":
            self.awake += self._looked - before
        if at != self._at or state not in "SD":
            self._at, self._since = at, self._looked
        return self._looked - self._since
