"""From this host, a recording or a running serve to a session or a log."""

from __future__ import annotations

import contextlib
import os
import socket
import time
from collections.abc import Iterator
from dataclasses import dataclass, replace

from kvmtrace import __version__, door, host, privileges, sources
from kvmtrace.cli.ending import always, nobody_writes, stop, tell
from kvmtrace.correlate import Correlator
from kvmtrace.errors import KvmtraceError
from kvmtrace.events import Event
from kvmtrace.live import Session, host_of
from kvmtrace.model import Host, Probe, Snapshot
from kvmtrace.observe import Observed, Quiet, Reactions, Releases
from kvmtrace.proc_reader import READER
from kvmtrace.sources.joined import JoinedSource
from kvmtrace.sources.recording import RecordingSource, Writer

POLL_SECONDS = 0.25
LISTEN_SECONDS = 1.0


def attach(kind: str) -> sources.Source:
    """This host's kernel: what its probes report, and what only /proc and page tables show."""
    READER.prepare()
    source = sources.open_source(kind)
    stop.clean_up.append(source.close)
    return Quiet(Reactions(Releases(Observed(source))))


def here(kind: str) -> sources.Source:
    """What this host's kernel reports: through the serve that runs here, unless a way is asked for.

    A second set of probes would cost every VM exit once more, and know nothing of what was before.
    """
    joined = JoinedSource.join() if kind == "auto" else None
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
    tracefs = host.tracefs()
    with contextlib.suppress(OSError):
        if tracefs is None or os.stat(tracefs).st_uid == os.geteuid():
            return set()
    return {privileges.WRITING_ELSEWHERE}


@contextlib.contextmanager
def session_on(source: sources.Source) -> Iterator[Session]:
    """A session, detached on every way out. Raises KvmtraceError if its reader hangs then."""
    session = Session(source)
    try:
        yield session
    finally:
        if not session.close():
            stop.hung = True
            raise KvmtraceError(
                "the reader hangs in the kernel, and was left there",
                "`cat /proc/PID/task/*/stack` shows where, while it runs",
            )


@contextlib.contextmanager
def open_door(session: Session, *, started: bool = True) -> Iterator[door.Door | None]:
    """Let other commands know what this session sees; None where another serve answers.

    Not ``started``: from its ``start()`` on.
    """

    def answer(client: socket.socket) -> None:
        follower = session.follow()
        try:
            with client.makefile("w", encoding="utf-8") as file:
                writer = Writer(file, session.host())
                writer.write(follower.past, session.probes())
                follower.past = []
                writer.mark()
                while not door.has_left(client):
                    file.flush()
                    writer.write(follower.take(LISTEN_SECONDS), session.probes())
        finally:
            session.unfollow(follower)

    try:
        answering = door.Door(answer, started=started)
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


@dataclass(frozen=True)
class Log:
    """What a host reported, by which source and by which kvmtrace (None: not known)."""

    events: list[Event]
    host: Host
    probes: tuple[Probe, ...]
    version: str | None = __version__

    def model(self) -> Snapshot:
        """What it says when it is read from its beginning."""
        correlator = Correlator(page_shift=self.host.page_shift)
        for event in self.events:
            correlator.feed(event)
        return correlator.snapshot().of_log(self.host, self.probes)


@contextlib.contextmanager
def replaying(path: str) -> Iterator[RecordingSource]:
    """A recording; that it was cut off or damaged is printed after all that it has."""
    with stop.waiting(always):
        source = RecordingSource(path)
    try:
        try:
            yield source
        except KvmtraceError:
            if source.damage:
                tell(f"kvmtrace: {source.damage.message}")
            raise
        finally:
            if source.truncated:
                tell(f"kvmtrace: {path}: the last line is cut off; left out")
        if source.damage:
            raise source.damage
    finally:
        source.close()


def reading(source: RecordingSource) -> contextlib.AbstractContextManager[None]:
    """For what reads a recording: a signal ends it if nobody writes (a pipe)."""
    return stop.waiting(lambda: nobody_writes(source.file))


@contextlib.contextmanager
def log_of(recording: str | None, kind: str, duration: float) -> Iterator[Log]:
    """All events of a recording, of a running serve, or else what this host says in a while."""
    if recording is None:
        yield _log_here(kind, duration)
        return
    with replaying(recording) as source:
        batch: list[Event] = []
        while not source.done and not stop.asked:
            with reading(source):
                batch += source.poll(0)
        yield Log(batch, source.recorded, source.probes(), source.version)


def _log_here(kind: str, duration: float) -> Log:
    batch: list[Event] = []
    source = here(kind)
    try:
        if isinstance(source, JoinedSource):
            tell(f"kvmtrace: as seen by {source.name} ({source.why})")
        else:
            deadline = time.monotonic() + duration
            while not stop.asked and (left := deadline - time.monotonic()) > 0:
                batch += source.poll(min(left, POLL_SECONDS))
        batch += source.poll(0)
        log = Log(batch, host_of(source), source.probes())
        return replace(log, version=source.version) if isinstance(source, JoinedSource) else log
    finally:
        source.close()
