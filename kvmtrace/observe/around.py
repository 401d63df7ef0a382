"""A source around a source: what all that look things up have in common."""

from __future__ import annotations

from collections.abc import Mapping

from kvmtrace.events import Event
from kvmtrace.model import Probe, ProbeRuns
from kvmtrace.sources import Source


class Around:
    """Pass on what ``inner`` reports of itself; ``poll`` is left to what adds to its events."""

    def __init__(self, inner: Source) -> None:
        self.inner = inner
        self.name = inner.name
        self.why = inner.why

    def poll(self, timeout: float) -> list[Event]:
        """Events, as ``Source.poll``."""
        return self.inner.poll(timeout)

    def probes(self) -> tuple[Probe, ...]:
        """The inner source's."""
        return self.inner.probes()

    def probe_runs(self) -> Mapping[str, ProbeRuns]:
        """The inner source's."""
        return self.inner.probe_runs()

    def close(self) -> None:
        """Close the inner source."""
        self.inner.close()
