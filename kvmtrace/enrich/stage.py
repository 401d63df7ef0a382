"""What every stage of the pipeline has."""

from __future__ import annotations

import math
from abc import ABC, abstractmethod

from kvmtrace.events import Event


class Stage(ABC):
    """A step of the pipeline (``pipeline.all_stages``): events in, events out, at each poll."""

    def max_wait(self) -> float:
        """Return after how many seconds the stage has work to do, with or without an event."""
        return math.inf

    def before_read(self, now: int) -> None:  # noqa: B027 (most stages read nothing)
        """Look up what has to be read before events are. ``now``: ns since the epoch."""

    @abstractmethod
    def process(self, events: list[Event], now: int, *, last: bool = False) -> list[Event]:
        """Return ``events`` with what the stage adds to them.

        ``now``: when the source was read, ns since the epoch; the time of everything that is added.
        ``last``: no events may follow, so nothing is kept for later.
        """
