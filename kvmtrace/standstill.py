"""Whether a thread hangs, or is only slow.

On a busy or emulated machine an orderly end takes seconds; a thread that hangs in the kernel
sleeps, uses no CPU time and executes no instruction of Python.
"""

from __future__ import annotations

import sys
import threading
import time


class Standstill:
    """Looks at a thread of Python now and then."""

    def __init__(self, thread: threading.Thread) -> None:
        self._thread = thread
        self._at: tuple[object, ...] | None = None
        self._since = time.monotonic()

    def seconds(self) -> float:
        """How long it has been seen asleep at one instruction, without CPU time in between."""
        frame = sys._current_frames().get(self._thread.ident or 0)
        state, *cpu_time = _state(self._thread.native_id)
        at = (id(frame), frame.f_lasti if frame is not None else None, *cpu_time)
        if at != self._at or state not in "SD":
            self._at, self._since = at, time.monotonic()
        return time.monotonic() - self._since


def _state(native_id: int | None) -> tuple[str, ...]:
    """State letter, and user and system time in ticks (proc(5), stat).

    Where that cannot be read (no file descriptor), the thread is taken for one that sleeps.
    """
    try:
        with open(f"/proc/self/task/{native_id}/stat", "rb") as file:
            fields = file.read().rpartition(b")")[2].decode().split()
    except OSError:
        return ("S",)
    return (fields[0], *fields[11:13])
