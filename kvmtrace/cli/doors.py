"""Where ``serve`` answers: the Unix socket for commands of this host, and TCP."""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Iterable, Iterator

from kvmtrace.cli.console import print_status
from kvmtrace.cli.signals import stop
from kvmtrace.linux.socket_file import SocketFile
from kvmtrace.session import feed
from kvmtrace.session.session import Session
from kvmtrace.views.web.listening import listening_at, parse_listen
from kvmtrace.views.web.local_pages import local_routes
from kvmtrace.views.web.metrics import DEFAULT_MAX_VMS, FALLBACK_KINDS, Kinds
from kvmtrace.views.web.pages import Pages
from kvmtrace.views.web.server import Listener, Server, no_drops, tcp_listener


@contextlib.contextmanager
def open_server(
    session: Session,
    listen: str | None,
    *,
    names: Iterable[str] = (),
    kinds: Kinds = lambda: FALLBACK_KINDS,
    max_vms: int = DEFAULT_MAX_VMS,
    started: bool = True,
) -> Iterator[tuple[Server, Pages]]:
    """A server for a session, on the Unix socket and on ``listen``, until the block ends.

    Not ``started``: it listens, and answers from its ``start()`` on. Without a Unix socket there is
    a status line. Raises UsageError if ``listen`` is malformed, KvmtraceError if it cannot listen.
    """
    dropped = no_drops()
    pages = Pages(session, dropped, kinds=kinds, max_vms=max_vms, now=session.now)
    listeners = []
    with contextlib.ExitStack() as ending:
        if listen is not None:
            listening = listening_at(listen)
            ending.callback(listening.close)
            names = (*names, parse_listen(listen)[0])
            listeners.append(tcp_listener(listening, pages.routes(), names))
        if (local := _local_socket()) is not None:
            stop.clean_up.append(local.remove)
            ending.callback(local.close)
            send = functools.partial(feed.send_log, session)
            listeners.append(Listener(local.listening, local_routes(pages, send)))
        server = Server(listeners, dropped, started=started)
        ending.callback(server.close)
        if local is not None:
            ending.callback(local.remove)
        yield server, pages


def _local_socket() -> SocketFile | None:
    try:
        return SocketFile()
    except OSError as error:
        where = f"{error.filename}: " if error.filename else ""
        print_status(
            f"kvmtrace: other commands will not find this one: {where}{error.strerror or error}"
        )
        return None
