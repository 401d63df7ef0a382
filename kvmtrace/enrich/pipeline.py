"""A source around a source: what all that look things up have in common."""

from __future__ import annotations

from collections.abc import Callable, Mapping

from kvmtrace.events import Event
from kvmtrace.linux import clock
from kvmtrace.probes import Probe, ProbeRuns
from kvmtrace.sources import Source


class EnrichedSource:
    """Pass on what ``inner`` reports of itself; ``poll`` is left to what adds to its events."""

    def __init__(self, inner: Source, now: Callable[[], int] = clock.now_ns) -> None:
        """``now``: ns since the epoch."""
        self.inner = inner
        self._now = now
        self._read_ns = 0
        self.name = inner.name
        self.why = inner.why

    def poll(self, timeout: float) -> list[Event]:
        """Events, as ``Source.poll``."""
        return self.inner.poll(timeout)

    def read(self, timeout: float) -> list[Event]:
        """The inner source's events.

        What is looked up after that is stamped with ``_read_ns``, when the kernel was read: time
        must not go on for the model by looking up alone, or a loop would seem to be over.
        """
        events = self.inner.poll(timeout)
        self._read_ns = (
            self.inner._read_ns if isinstance(self.inner, EnrichedSource) else self._now()
        )
        return events

    def probes(self) -> tuple[Probe, ...]:
        """The inner source's."""
        return self.inner.probes()

    def probe_runs(self) -> Mapping[str, ProbeRuns]:
        """The inner source's."""
        return self.inner.probe_runs()

    def close(self) -> None:
        """Close the inner source."""
        self.inner.close()
