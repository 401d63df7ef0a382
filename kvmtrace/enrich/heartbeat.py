"""Report that time passed without an event: the model has no clock but the events'.

A refusal that KVM_RUN has not delivered within seconds was swallowed; a loop without a delivery for
a while has ended. Ticks come at intervals that double, so that a quiet host gives few of them.
"""

from __future__ import annotations

from kvmtrace.enrich.stage import Stage
from kvmtrace.events import Event, Tick

_SECOND = 1_000_000_000

# A little more than it takes until refusals without an exit count as undelivered.
FIRST_NS = 6 * _SECOND


class Heartbeat(Stage):
    """Adds a Tick where there has been no event for a while since the last one."""

    def __init__(self) -> None:
        self._since: int | None = None
        self._wait = FIRST_NS

    def process(self, events: list[Event], now: int, *, last: bool = False) -> list[Event]:
        """Return ``events``, or a Tick if there are none and one is due."""
        if events:
            self._since, self._wait = now, FIRST_NS
        elif self._since is not None and now - self._since >= self._wait:
            self._wait *= 2
            return [Tick(now)]
        return events
