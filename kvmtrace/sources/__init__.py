"""Sources: where events come from. Sources know nothing of views, nor views of sources.

A source is used from one thread: ``poll`` until done, then ``close`` (which may be called twice).
It keeps trying to attach what is missing (kvm not loaded yet), from within ``poll``.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Protocol

from kvmtrace.events import Event
from kvmtrace.model import Probe, ProbeRuns


class Source(Protocol):
    """What ``live.Session`` needs of a source."""

    name: str
    """``"bpf"``, ``"ftrace"`` or ``"recording"``."""

    why: str | None
    """Why this one was chosen, for people."""

    def poll(self, timeout: float) -> list[Event]:
        """Events since the last call, in order; waits at most ``timeout`` seconds for the first."""

    def probes(self) -> tuple[Probe, ...]:
        """The state of every probe, attached or not."""

    def probe_runs(self) -> Mapping[str, ProbeRuns]:
        """Runs and time by probe name, where the kernel counts them; else empty."""

    def close(self) -> None:
        """Detach everything."""
