"""Open what a command reads: this host, a running serve or a recording."""

from __future__ import annotations

import contextlib
import os
import time
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from typing import Protocol

from kvmtrace import __version__, sources
from kvmtrace.cli.console import busy, print_status
from kvmtrace.cli.signals import always, nobody_writes, stop
from kvmtrace.correlate import Correlator
from kvmtrace.enrich.pipeline import EnrichedSource
from kvmtrace.errors import KvmtraceError
from kvmtrace.events import Event, Host
from kvmtrace.linux import privileges
from kvmtrace.linux.proc_reader import READER
from kvmtrace.linux.tracefs import mount
from kvmtrace.model import Snapshot
from kvmtrace.probes import Probe
from kvmtrace.session.session import Session
from kvmtrace.sources.recording import RecordingSource
from kvmtrace.sources.remote import RemoteSource

POLL_SECONDS = 0.25


class _Attached(EnrichedSource):
    """Notes when it begins to detach, which may take long."""

    def close(self) -> None:
        stop.detaching = True
        super().close()


def open_host(kind: str) -> sources.Source:
    """Attach to this host's kernel; events from /proc and page tables are added."""
    READER.prepare()
    stop.clean_up.append(sources.close_opening)
    with busy(lambda: sources.stage() or "attaching probes"):
        source = sources.open_source(kind)
    stop.clean_up.append(source.close)
    for note in sources.notes():
        print_status(f"kvmtrace: {note}")
    return _Attached(source)


def open_host_or_remote(kind: str) -> sources.Source:
    """Connect to the serve that runs on this host, or attach; a ``kind`` asked for is attached.

    A second set of probes would slow down every VM exit again, and the serve has the history.
    """
    return (connect() if kind == "auto" else None) or open_host(kind)


def connect() -> RemoteSource | None:
    """Connect to the serve that runs on this host; None if there is none."""
    with busy("reading the history of kvmtrace serve"):
        return RemoteSource.connect()


def give_up_privileges() -> None:
    """Keep the privileges of ``privileges.WATCHING``; report those that cannot be given up.

    For commands that run long. Call it once they have attached, listen and have opened their
    files, and before they start threads: a thread keeps the privileges it was started with.
    """
    if not stop.owns_process:
        return
    for refused in privileges.give_up(privileges.WATCHING | _to_detach()):
        print_status(f"kvmtrace: cannot give up privileges: {refused}")
    stop.restart_watchdog()


def _to_detach() -> set[str]:
    tracefs = mount.tracefs()
    with contextlib.suppress(OSError):
        if tracefs is None or os.stat(tracefs).st_uid == os.geteuid():
            return set()
    return {privileges.WRITING_ELSEWHERE}


@contextlib.contextmanager
def open_session(source: sources.Source, *, recent: int = 0) -> Iterator[Session]:
    """A session that is closed on every way out. Raises KvmtraceError if its reader goes on."""
    session = Session(source, recent=recent)
    try:
        yield session
    finally:
        with busy("detaching probes"):
            is_closed = session.close()
        if not is_closed:
            stop.hung = True
            raise KvmtraceError(
                f"the reader {session.left}, and was left there",
                "`cat /proc/PID/task/*/stack` shows where, while it runs",
            )


def poll_timeouts(
    duration: float | None, is_over: Callable[[], bool] = lambda: False
) -> Iterator[float]:
    """How long to wait for events, until ``duration`` seconds are over, a signal, or ``is_over()``.

    The last one is 0: the kernel may have counted exits that were not emitted yet.
    """
    deadline = None if duration is None else time.monotonic() + duration
    timeout = POLL_SECONDS
    while not (stop.requested or is_over()):
        if deadline is not None:
            timeout = min(timeout, deadline - time.monotonic())
        if timeout <= 0:
            break
        yield timeout
    yield 0


Batch = tuple[list[Event], tuple[Probe, ...]]
"""Events, and the state of the probes after them."""


class EventLog(ABC):
    """Events of a host, with the host and the version of kvmtrace that recorded them, if known.

    ``began``: when watching did; None: with the first event. ``now``: the time by the clock of the
    events; None: that of the last one. ``via``: where they were read from, if not from this host's
    kernel.
    """

    host: Host
    version: str | None
    began: int | None = None
    now: int | None = None
    via: str | None = None

    @abstractmethod
    def batches(self) -> Iterator[Batch]:
        """All batches, each time from the beginning."""

    def is_complete(self) -> bool:
        """Whether the end is not missing; call it once all batches were read."""
        return True

    def model(self, on_batch: Callable[[Batch], None] | None = None) -> Snapshot:
        """The snapshot after all batches; ``on_batch`` is called with each."""
        correlator = Correlator(page_shift=self.host.page_shift)
        probes: tuple[Probe, ...] = ()
        since = self.began
        for events, probes in self.batches():
            if on_batch is not None:
                on_batch((events, probes))
            for event in events:
                since = event.ts if since is None else min(since, event.ts)
                correlator.feed(event)
        return correlator.snapshot().of_log(self.host, probes, since)


@dataclass(frozen=True)
class WatchedLog(EventLog):
    """Events of a time of watching, in memory."""

    events: list[Event]
    host: Host
    probes: tuple[Probe, ...]
    version: str | None = __version__
    began: int | None = None
    now: int | None = None
    via: str | None = None

    def batches(self) -> Iterator[Batch]:
        yield self.events, self.probes


class Replayed(Protocol):
    """What is read from a file, and from its beginning again: a recording, or serve's history."""

    recorded: Host
    host: Host
    version: str | None
    path: str
    done: bool
    whole: bool

    def poll(self, timeout: float) -> list[Event]: ...

    def rewind(self) -> None: ...

    def probes(self) -> tuple[Probe, ...]: ...


class RecordedLog(EventLog):
    """A recording, read batch by batch: it may not fit into memory."""

    def __init__(self, source: Replayed, via: str = "a recording") -> None:
        self.host, self.version = source.recorded, source.version
        self.via = via
        self._source = source
        self._is_read = False

    def batches(self) -> Iterator[Batch]:
        """Batches as the file is read; a signal ends them early."""
        if self._is_read:
            self._source.rewind()
        self._is_read = True
        with busy(f"reading {self._source.path}"):
            while not self._source.done and not stop.requested:
                with reading(self._source):
                    events = self._source.poll(0)
                yield events, self._source.probes()

    def is_complete(self) -> bool:
        """Whether the file was read to its end, and that is the recording's end."""
        return self._source.whole


@contextlib.contextmanager
def open_recording(path: str, *, twice: bool = False) -> Iterator[RecordingSource]:
    """A recording. If it was cut off or damaged, that is reported after all of its events.

    Raises KvmtraceError for a damaged one. ``twice``: it will be read a second time.
    """
    with stop.waiting(always):
        source = RecordingSource(path, twice=twice)
    try:
        try:
            yield source
        except KvmtraceError:
            for one in filter(None, (source.damage, source.doubt)):
                print_status(f"kvmtrace: {one.message}")
            raise
        finally:
            if source.truncated:
                print_status(f"kvmtrace: {path}: the last line is cut off; left out")
        if source.damage and source.doubt:
            print_status(f"kvmtrace: {source.doubt.message}")
        if fault := source.damage or source.doubt:
            raise fault
    finally:
        source.close()


def reading(source: Replayed) -> contextlib.AbstractContextManager[None]:
    """Around reads of a recording: a signal interrupts them if nobody writes (a pipe)."""
    if not isinstance(source, RecordingSource):
        return contextlib.nullcontext()
    return stop.waiting(lambda: nobody_writes(source.file))


@contextlib.contextmanager
def load_log(
    recording: str | None, kind: str, duration: float, *, twice: bool = False
) -> Iterator[EventLog]:
    """All events of a recording, of a running serve, or of this host for ``duration`` seconds.

    ``twice``: the batches will be read a second time.
    """
    if recording is None:
        yield _watch(open_host_or_remote(kind), duration)
        return
    with open_recording(recording, twice=twice) as source:
        yield RecordedLog(source)


def ask_serve() -> EventLog:
    """All events of the serve that runs on this host. Raises KvmtraceError if none answers."""
    source = RemoteSource.connect()
    if source is None:
        raise KvmtraceError(
            "no kvmtrace serve answers on this host",
            "start `kvmtrace serve`; root and members of its group may ask it",
        )
    return _watch(source, 0)


def _watch(source: sources.Source, duration: float) -> WatchedLog:
    with open_session(source) as session:
        began = session.now()
        timeouts = poll_timeouts(duration)
        if isinstance(source, RemoteSource):
            if duration:
                print_status(f"kvmtrace: as seen by {source.name} ({source.why})")
            timeouts = iter([0.0])  # it has the history
        with busy(f"watching this host for {duration:g} s"):
            batch = [event for timeout in timeouts for event in session.poll(timeout)]
        log = WatchedLog(batch, session.host(), session.probes(), began=began, now=session.now())
        if isinstance(source, RemoteSource):
            via = f"serve, pid {source.pid}"
            return replace(log, version=source.version, began=None, via=via)
        return log
