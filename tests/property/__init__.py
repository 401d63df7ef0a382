"""Properties that hold for any input and any order of events; see also ``make fuzz``."""

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
    """Settings for ``count`` examples; with KVMTRACE_FUZZ=n, at most n times as many."""
    return settings(max_examples=count * _FACTOR)


class TooSlow(Failed):
    """An example took too long. Not an Exception: the command line would handle that."""


@contextlib.contextmanager
def bounded() -> Iterator[None]:
    """Fail if the block takes ``CPU_SECONDS``: its work is quadratic or endless.

    CPU time does not depend on how busy the machine is.
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
