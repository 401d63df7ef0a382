"""Sources of events. Sources and views do not import each other.

One thread uses a source: it calls ``poll`` until done, then ``close`` (which may be called twice).
``poll`` also attaches probes that could not be attached before (kvm not loaded yet).
"""

from __future__ import annotations

import contextlib
import ctypes
import importlib
from collections.abc import Iterator, Mapping
from typing import Protocol, cast

from kvmtrace.errors import KvmtraceError
from kvmtrace.events import Event
from kvmtrace.linux import host
from kvmtrace.probes import Probe, ProbeRuns
from kvmtrace.source_choice import Attempt, choose


class Source(Protocol):
    """What ``session.Session`` needs of a source."""

    name: str
    """``"bpf"``, ``"ftrace"`` or ``"recording"``."""

    why: str | None
    """Why this one was chosen, as text for the user."""

    def poll(self, timeout: float) -> list[Event]:
        """Return events since the last call, waiting up to ``timeout`` seconds for the first."""

    def probes(self) -> tuple[Probe, ...]:
        """Return the state of every probe, attached or not."""

    def probe_runs(self) -> Mapping[str, ProbeRuns]:
        """Return runs and time by probe name, if the kernel counts them; else empty."""

    def close(self) -> None:
        """Detach all probes."""


class WrappedSource:
    """A source around ``inner``, which has everything but the events of ``poll``."""

    def __init__(self, inner: Source) -> None:
        self.inner, self.name, self.why = inner, inner.name, inner.why

    def probes(self) -> tuple[Probe, ...]:
        return self.inner.probes()

    def probe_runs(self) -> Mapping[str, ProbeRuns]:
        return self.inner.probe_runs()

    def close(self) -> None:
        self.inner.close()


CHOICES = ("auto", "bpf", "ftrace")

# By name: users of one source must not need the libraries of the other.
_CLASSES = {
    "bpf": ("kvmtrace.sources.bpf.source", "BpfSource"),
    "ftrace": ("kvmtrace.sources.ftrace.source", "FtraceSource"),
}


def open_source(kind: str = "auto") -> Source:
    """Attach to this host by one of ``CHOICES``. Raises KvmtraceError with the reason and the fix.

    ``auto``: bpf if it attaches every probe, else the source that sees more (``source_choice``).
    """
    if not host.privilege().may_trace:
        raise KvmtraceError("tracing the kernel needs root", "run it with sudo")
    try:
        if kind != "auto":
            source = _open(kind)
            source.why = "asked for"
            return source
        return _best_of("bpf", "ftrace")
    finally:
        _return_free_memory()


def _return_free_memory() -> None:
    """Give back what was needed to attach: the kernel's types and symbols take some 20 MiB."""
    with contextlib.suppress(AttributeError):  # a libc without it
        ctypes.CDLL(None).malloc_trim(0)


def _best_of(*kinds: str) -> Source:
    opened: dict[str, Source] = {}
    attempts: list[Attempt] = []
    try:
        for kind in kinds:
            attempts.append(_attempt(kind, opened))
            if attempts[-1].refused is None and not attempts[-1].missing:
                break
        chosen = choose(attempts)
        if chosen is None:
            reasons = "; ".join(f"{one.kind}: {one.refused}" for one in attempts)
            hints = [one.hint for one in attempts if one.hint]
            raise KvmtraceError(
                f"no source works here: {reasons}",
                ", or ".join(hints) or "`kvmtrace doctor` shows what is missing",
            )
        best, why = chosen
        source = opened.pop(best.kind)
        source.why = why
        return source
    finally:
        for source in opened.values():
            source.close()


def _attempt(kind: str, opened: dict[str, Source]) -> Attempt:
    """Try to open a source, and put it into ``opened``."""
    try:
        opened[kind] = _open(kind)
    except KvmtraceError as error:
        return Attempt(kind, refused=error.message, hint=error.hint, detail=error.detail or None)
    except OSError as error:
        return Attempt(kind, refused=str(error))
    return Attempt(kind, opened[kind].probes())


_notes: list[str] = []


def note(text: str) -> None:
    """Let people know something that a source found while it was opened, once."""
    if text not in _notes:
        _notes.append(text)


def notes() -> tuple[str, ...]:
    """What ``note`` was called with."""
    return tuple(_notes)


_stage = ""


def stage() -> str:
    """What is being done to open a source, as text for the user; "" before and after."""
    return _stage


@contextlib.contextmanager
def in_stage(text: str) -> Iterator[None]:
    """Around a part of opening a source that may take long: ``stage`` returns its name."""
    global _stage  # one source is opened at a time, and another thread looks
    before, _stage = _stage, text
    try:
        yield
    finally:
        _stage = before


_opening: list[Source] = []


def _open(kind: str) -> Source:
    module, name = _CLASSES[kind]
    class_ = getattr(importlib.import_module(module), name)
    source = cast(Source, class_.__new__(class_))
    _opening.append(source)
    try:
        with in_stage(f"attaching probes by {kind}"):
            class_.__init__(source)
    finally:
        _opening.remove(source)
    return source


def close_opening() -> None:
    """Detach a source that is still being opened, before the process ends."""
    for source in _opening[:]:
        source.close()
