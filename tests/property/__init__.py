"""Laws that hold for any input and any order of events. ``make fuzz`` tries them for minutes."""

from __future__ import annotations

import contextlib
import os
import signal
from collections.abc import Iterator
from types import FrameType

from _pytest.outcomes import Failed
from hypothesis import settings

CPU_SECONDS = 10.0

_FACTOR = int(os.environ.get("KVMTRACE_FUZZ", "1"))


def examples(count: int) -> settings:
    """So many examples for a test; with KVMTRACE_FUZZ=n, at most n times as many."""
    return settings(max_examples=count * _FACTOR)


class TooSlow(Failed):
    """No Exception, which the command line would turn into a message."""


@contextlib.contextmanager
def bounded() -> Iterator[None]:
    """Fail what takes ``CPU_SECONDS``: its work grows with the square of its input, or has no end.

    CPU time, so that a busy machine changes nothing.
    """

    def end(_number: int, _frame: FrameType | None) -> None:
        raise TooSlow(f"one example took {CPU_SECONDS} s of CPU time")

    previous = signal.signal(signal.SIGVTALRM, end)
    signal.setitimer(signal.ITIMER_VIRTUAL, CPU_SECONDS)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_VIRTUAL, 0)
        signal.signal(signal.SIGVTALRM, previous)
