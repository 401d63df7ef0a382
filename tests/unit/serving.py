"""Servers for tests: of a session's pages on TCP, of any routes, and of a stream on the socket."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any

from kvmtrace.cli.doors import open_server
from kvmtrace.linux.socket_file import SocketFile
from kvmtrace.session.session import Session
from kvmtrace.views.web.listening import listening_at, parse_listen
from kvmtrace.views.web.local_pages import NDJSON
from kvmtrace.views.web.metrics import Snapshots
from kvmtrace.views.web.pages import Pages
from kvmtrace.views.web.server import Listener, Route, Server, no_drops, tcp_listener
from kvmtrace.views.web.stream import Client, StreamRoute


def serve(listen: str, session: Snapshots, names: Iterable[str] = (), **options: Any) -> Server:
    """Serve the pages of a session on TCP."""
    dropped = no_drops()
    pages = Pages(session, dropped, **options)
    names = (*names, parse_listen(listen)[0])
    return Server([tcp_listener(listening_at(listen), pages.routes(), names)], dropped)


def start(listen: str, routes: Mapping[str, Route]) -> Server:
    """Serve these routes on TCP."""
    return Server([tcp_listener(listening_at(listen), routes)])


@contextlib.contextmanager
def open_door(session: Session) -> Iterator[None]:
    """Let commands of this host connect to a session."""
    with open_server(session, None):
        yield


class Answering:
    """A serve whose events are what ``write`` writes to each client."""

    def __init__(self, write: Callable[[Client], object], name: str | None = None) -> None:
        self._file = SocketFile(name)
        self.path = self._file.path
        self.stream = StreamRoute(lambda client: (write(client), None)[1], NDJSON)
        self.server = Server([Listener(self._file.listening, {"/events": self.stream})])

    def close(self) -> None:
        """End as a serve does."""
        self._file.remove()
        self.server.close()
        self._file.close()
