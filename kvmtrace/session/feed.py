"""A session's log as a stream for other commands: a recording that does not end.

The backlog comes first, then a mark, and then new events. Each client has a thread, so that one
that stops reading does not block the others; what it misses meanwhile is added up for it
(``subscriber``).
"""

from __future__ import annotations

from typing import IO, Protocol

from kvmtrace.session.session import Session
from kvmtrace.sources.recording import Writer

_READ_SECONDS = 1.0


class Outlet(Protocol):
    """A client's end: a text file, and whether the client has left."""

    @property
    def file(self) -> IO[str]: ...

    def is_closed(self) -> bool: ...


def send_log(session: Session, client: Outlet) -> None:
    """Send a client the session's backlog and then its events, until the client closes.

    Raises OSError if it closes meanwhile.
    """
    subscriber = session.subscribe()
    try:
        writer = Writer(client.file, session.host())
        writer.write(subscriber.backlog, session.probes())
        subscriber.backlog = []
        writer.mark()
        while not client.is_closed():
            client.file.flush()
            writer.write(subscriber.read(_READ_SECONDS), session.probes())
    finally:
        session.unsubscribe(subscriber)
