"""From this host, a recording or a running serve to a session or a log."""

from __future__ import annotations

import contextlib
import dataclasses
import io
import tempfile
import time
from collections.abc import Iterator

from kvmtrace import door, sources
from kvmtrace.cli.ending import stop
from kvmtrace.correlate import Correlator
from kvmtrace.events import Event
from kvmtrace.live import Session, host_of
from kvmtrace.model import Host, Probe, Snapshot
from kvmtrace.observe import Observed, Reactions
from kvmtrace.sources.recording import RecordingSource, Writer

POLL_SECONDS = 0.25


def attach(kind: str) -> sources.Source:
    """This host's kernel, with what only looking tells added to what it says by itself."""
    return Reactions(Observed(sources.open_source(kind)))


@contextlib.contextmanager
def session_on(kind: str) -> Iterator[Session]:
    """A session on this host's kernel, detached on every way out."""
    session = Session(attach(kind))
    try:
        yield session
    finally:
        session.close()


@contextlib.contextmanager
def open_door(session: Session) -> Iterator[None]:
    """Let other commands ask what this session saw; without it where another serve answers."""

    def answer() -> str:
        snapshot = session.snapshot()
        log = io.StringIO()
        if snapshot.host is not None:
            Writer(log, snapshot.host).write(session.history(), snapshot.probes)
        return log.getvalue()

    try:
        answering = door.Door(answer)
    except OSError:
        yield
        return
    try:
        yield
    finally:
        answering.close()


def events_of(
    recording: str | None, source: str, duration: float
) -> tuple[list[Event], Host, tuple[Probe, ...]]:
    """All events of a recording, of a running serve, or else what this host says in a while."""
    batch: list[Event] = []
    with contextlib.ExitStack() as kept:
        if recording is None and (known := door.ask()) is not None:
            file = kept.enter_context(tempfile.NamedTemporaryFile("w", encoding="utf-8"))
            file.write(known)
            file.flush()
            recording = file.name
        replayed = RecordingSource(recording) if recording is not None else None
    if replayed is not None:
        try:
            while not replayed.done and not stop.asked:
                batch += replayed.poll(0)
            return batch, replayed.host, replayed.probes()
        finally:
            replayed.close()
    attached = attach(source)
    try:
        deadline = time.monotonic() + duration
        while not stop.asked and (left := deadline - time.monotonic()) > 0:
            batch += attached.poll(min(left, POLL_SECONDS))
        return batch + attached.poll(0), host_of(attached), attached.probes()
    finally:
        attached.close()


def model_of(events: list[Event], host: Host, probes: tuple[Probe, ...]) -> Snapshot:
    """What a log says when it is read from its beginning."""
    correlator = Correlator()
    for event in events:
        correlator.feed(event)
    return dataclasses.replace(correlator.snapshot(), host=host, probes=probes)
