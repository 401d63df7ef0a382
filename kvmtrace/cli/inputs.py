"""From this host, a recording or a running serve to a session or a log."""

from __future__ import annotations

import contextlib
import functools
import os
import time
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace

from kvmtrace import __version__, sources
from kvmtrace.cli.errors import always, nobody_writes, stop, tell
from kvmtrace.correlate import Correlator
from kvmtrace.enrich.pipeline import EnrichedSource
from kvmtrace.errors import KvmtraceError
from kvmtrace.events import Event, Host
from kvmtrace.linux import privileges
from kvmtrace.linux.proc_reader import READER
from kvmtrace.linux.tracefs import mount
from kvmtrace.model import Snapshot
from kvmtrace.probes import Probe
from kvmtrace.session import feed
from kvmtrace.session.session import Session
from kvmtrace.sources.recording import RecordingSource
from kvmtrace.sources.remote import RemoteSource

POLL_SECONDS = 0.25


class _Attached(EnrichedSource):
    """Says when it begins to detach, which may take long."""

    def close(self) -> None:
        """Detach."""
        stop.detaching = True
        super().close()


def attach(kind: str) -> sources.Source:
    """This host's kernel: what its probes report, and what only /proc and page tables show."""
    READER.prepare()
    stop.clean_up.append(sources.close_opening)
    source = sources.open_source(kind)
    stop.clean_up.append(source.close)
    for note in sources.notes():
        tell(f"kvmtrace: {note}")
    return _Attached(source)


def here(kind: str) -> sources.Source:
    """What this host's kernel reports: through the serve that runs here, unless a way is asked for.

    A second set of probes would cost every VM exit once more, and know nothing of what was before.
    """
    joined = RemoteSource.connect() if kind == "auto" else None
    return joined or attach(kind)


def give_up_privileges() -> None:
    """Keep what watching takes (``privileges.WATCHING``); print what cannot be given up.

    For commands that run long, when they have attached, listen and have opened their files, and
    before they start threads: a thread keeps what it was started with.
    """
    if not stop.owns_process:
        return
    for refused in privileges.give_up(privileges.WATCHING | _to_detach()):
        tell(f"kvmtrace: privileges that are not needed any more stay: {refused}")
    stop.watch_anew()


def _to_detach() -> set[str]:
    tracefs = mount.tracefs()
    with contextlib.suppress(OSError):
        if tracefs is None or os.stat(tracefs).st_uid == os.geteuid():
            return set()
    return {privileges.WRITING_ELSEWHERE}


@contextlib.contextmanager
def session_on(source: sources.Source) -> Iterator[Session]:
    """A session, detached on every way out. Raises KvmtraceError if its reader goes on then."""
    session = Session(source)
    try:
        yield session
    finally:
        if not session.close():
            stop.hung = True
            raise KvmtraceError(
                f"the reader {session.left}, and was left there",
                "`cat /proc/PID/task/*/stack` shows where, while it runs",
            )


@contextlib.contextmanager
def open_door(session: Session, *, started: bool = True) -> Iterator[feed.FeedServer | None]:
    """Let other commands know what this session sees; None where another serve answers.

    Not ``started``: from its ``start()`` on.
    """
    try:
        answering = feed.FeedServer(functools.partial(feed.send_log, session), started=started)
    except OSError as error:
        where = f"{error.filename}: " if error.filename else ""
        tell(f"kvmtrace: other commands will not find this one: {where}{error.strerror or error}")
        yield None
        return
    stop.clean_up.append(answering.close)
    try:
        yield answering
    finally:
        answering.close()


Batch = tuple[list[Event], tuple[Probe, ...]]
"""Events, and the state of the probes after them."""


class Story(ABC):
    """What a host reported, by which source and by which kvmtrace (None: not known)."""

    host: Host
    version: str | None

    @abstractmethod
    def batches(self) -> Iterator[Batch]:
        """All of it; each time from the beginning."""

    def whole(self) -> bool:
        """Whether nothing is missing at the end, once all batches were read."""
        return True

    def model(self, look: Callable[[Batch], None] | None = None) -> Snapshot:
        """What it says when it is read from its beginning; ``look`` sees each batch, too."""
        correlator = Correlator(page_shift=self.host.page_shift)
        probes: tuple[Probe, ...] = ()
        for events, probes in self.batches():
            if look is not None:
                look((events, probes))
            for event in events:
                correlator.feed(event)
        return correlator.snapshot().of_log(self.host, probes)


@dataclass(frozen=True)
class Log(Story):
    """What was seen in a while, in memory."""

    events: list[Event]
    host: Host
    probes: tuple[Probe, ...]
    version: str | None = __version__

    def batches(self) -> Iterator[Batch]:
        """One."""
        yield self.events, self.probes


class RecordedLog(Story):
    """A recording, which is read when it is asked for: it may be longer than memory."""

    def __init__(self, source: RecordingSource) -> None:
        self.host, self.version = source.recorded, source.version
        self._source = source
        self._is_read = False

    def batches(self) -> Iterator[Batch]:
        """As the file is read; a signal ends it early."""
        if self._is_read:
            self._source.rewind()
        self._is_read = True
        while not self._source.done and not stop.asked:
            with reading(self._source):
                events = self._source.poll(0)
            yield events, self._source.probes()

    def whole(self) -> bool:
        """Whether the end of the file was read, and is the recording's."""
        return self._source.whole


@contextlib.contextmanager
def replaying(path: str, *, twice: bool = False) -> Iterator[RecordingSource]:
    """A recording; that it was cut off or damaged is printed after all that it has."""
    with stop.waiting(always):
        source = RecordingSource(path, twice=twice)
    try:
        try:
            yield source
        except KvmtraceError:
            for one in filter(None, (source.damage, source.doubt)):
                tell(f"kvmtrace: {one.message}")
            raise
        finally:
            if source.truncated:
                tell(f"kvmtrace: {path}: the last line is cut off; left out")
        if source.damage and source.doubt:
            tell(f"kvmtrace: {source.doubt.message}")
        if fault := source.damage or source.doubt:
            raise fault
    finally:
        source.close()


def reading(source: RecordingSource) -> contextlib.AbstractContextManager[None]:
    """For what reads a recording: a signal ends it if nobody writes (a pipe)."""
    return stop.waiting(lambda: nobody_writes(source.file))


@contextlib.contextmanager
def log_of(
    recording: str | None, kind: str, duration: float, *, twice: bool = False
) -> Iterator[Story]:
    """All events of a recording, of a running serve, or else what this host says in a while.

    ``twice``: the batches will be asked for a second time.
    """
    if recording is None:
        yield _log_here(kind, duration)
        return
    with replaying(recording, twice=twice) as source:
        yield RecordedLog(source)


def _log_here(kind: str, duration: float) -> Log:
    batch: list[Event] = []
    source = here(kind)
    with session_on(source) as session:
        if isinstance(source, RemoteSource):
            tell(f"kvmtrace: as seen by {source.name} ({source.why})")
        else:
            deadline = time.monotonic() + duration
            while not stop.asked and (left := deadline - time.monotonic()) > 0:
                batch += session.poll(min(left, POLL_SECONDS))
        batch += session.poll(0)
        log = Log(batch, session.host(), session.probes())
        return replace(log, version=source.version) if isinstance(source, RemoteSource) else log
