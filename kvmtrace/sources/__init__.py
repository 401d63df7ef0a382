"""Sources: where events come from. Sources know nothing of views, nor views of sources.

A source is used from one thread: ``poll`` until done, then ``close`` (which may be called twice).
It keeps trying to attach what is missing (kvm not loaded yet), from within ``poll``.
"""

from __future__ import annotations

import importlib
from collections.abc import Mapping
from typing import Protocol, cast

from kvmtrace import host
from kvmtrace.errors import KvmtraceError
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


CHOICES = ("auto", "bpf", "ftrace")

# Named rather than imported: whoever uses one source must not need what the other one needs.
_CLASSES = {
    "bpf": ("kvmtrace.sources.bpf", "BpfSource"),
    "ftrace": ("kvmtrace.sources.ftrace", "FtraceSource"),
}


def open_source(kind: str = "auto") -> Source:
    """Attach to this host: one of ``CHOICES``. Raises KvmtraceError with the reason and the fix."""
    if not host.privilege().may_trace:
        raise KvmtraceError("tracing the kernel needs root", "run it with sudo")
    if kind != "auto":
        source = _open(kind)
        source.why = "asked for"
        return source
    try:
        source = _open("bpf")
    except (KvmtraceError, OSError) as error:
        refused = error
    else:
        source.why = "bpf works here"
        return source
    try:
        source = _open("ftrace")
    except (KvmtraceError, OSError) as error:
        hints = [hint for e in (refused, error) if (hint := getattr(e, "hint", ""))]
        raise KvmtraceError(
            f"no source works here: bpf: {refused}; ftrace: {error}",
            ", or ".join(hints) or "`kvmtrace doctor` shows what is missing",
        ) from error
    source.why = f"bpf does not work here: {refused}"
    return source


def _open(kind: str) -> Source:
    module, name = _CLASSES[kind]
    return cast(Source, getattr(importlib.import_module(module), name)())
