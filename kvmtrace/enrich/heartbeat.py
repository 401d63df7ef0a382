"""That nothing happened is an event, too: the model has no clock but the events'.

A refusal that KVM_RUN has not delivered within seconds was swallowed; a loop without a delivery
for a while has ended. ``Heartbeat`` is a source around a source: after its last event it adds one
that says how late it is, at intervals that double, so that a quiet host stays quiet.
"""

from __future__ import annotations

from collections.abc import Callable

from kvmtrace.enrich.pipeline import EnrichedSource
from kvmtrace.events import Event, Tick
from kvmtrace.linux import clock
from kvmtrace.sources import Source

_SECOND = 1_000_000_000

# A little more than it takes until refusals without an exit count as undelivered.
FIRST_NS = 6 * _SECOND


class Heartbeat(EnrichedSource):
    """A source that also says when nothing happened. ``now``: ns since the epoch."""

    def __init__(self, inner: Source, now: Callable[[], int] = clock.now_ns) -> None:
        super().__init__(inner, now)
        self._since: int | None = None
        self._wait = FIRST_NS

    def poll(self, timeout: float) -> list[Event]:
        events = self.read(timeout)
        now = self._read_ns
        if events:
            self._since, self._wait = now, FIRST_NS
        elif self._since is not None and now - self._since >= self._wait:
            self._wait *= 2
            return [Tick(now)]
        return events
