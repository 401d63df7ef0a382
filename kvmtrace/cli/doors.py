"""Where ``serve`` answers: the Unix socket for commands of this host, and TCP.

Either may be passed by the service manager (socket activation) in place of the one that ``serve``
would make.
"""

from __future__ import annotations

import contextlib
import functools
import socket
from collections.abc import Iterable, Iterator, Mapping

from kvmtrace.cli.console import print_status
from kvmtrace.cli.signals import stop
from kvmtrace.errors import UsageError
from kvmtrace.linux import service_manager
from kvmtrace.linux.socket_file import SocketFile
from kvmtrace.session import feed
from kvmtrace.session.session import Session
from kvmtrace.views.web.listening import DEFAULT_LISTEN, check_listen, listening_at, parse_listen
from kvmtrace.views.web.local_pages import local_routes
from kvmtrace.views.web.metrics import DEFAULT_MAX_VMS, FALLBACK_KINDS, Kinds
from kvmtrace.views.web.pages import Pages
from kvmtrace.views.web.server import Listener, Server, no_drops, tcp_listener


class Doors:
    """The sockets of a serve, and who may ask on TCP; nothing of its own listens yet.

    ``listen``: where on TCP; None: the default. ``web_config``: a file (``views.web.web_config``).
    Raises UsageError and KvmtraceError for what would fail later.
    """

    def __init__(
        self, listen: str | None, web_config: str | None = None, names: Iterable[str] = ()
    ) -> None:
        passed = service_manager.passed_sockets()
        self.local = [one for one in passed if one.family == socket.AF_UNIX]
        self.tcp = [one for one in passed if one.family in (socket.AF_INET, socket.AF_INET6)]
        if self.tcp and listen is not None:
            raise UsageError(
                f"--listen {listen}: the service manager passed a TCP socket",
                "its unit sets where to listen (ListenStream=); leave --listen out",
            )
        self.names = tuple(names)
        self.listen = None if self.tcp else (listen or DEFAULT_LISTEN)
        if self.listen is not None:
            check_listen(self.listen)
        self.security = None
        if web_config is not None:
            # Loads YAML and bcrypt.
            from kvmtrace.views.web.security import Security  # noqa: PLC0415

            self.security = Security(web_config, print_status)


@contextlib.contextmanager
def open_server(
    session: Session,
    doors: Doors | None,
    *,
    kinds: Kinds = lambda: FALLBACK_KINDS,
    max_vms: int = DEFAULT_MAX_VMS,
    hooks: Mapping[str, int] | None = None,
    started: bool = True,
) -> Iterator[tuple[Server, Pages]]:
    """A server for a session until the block ends; without ``doors`` on its Unix socket only.

    Not ``started``: it listens, and answers from its ``start()`` on. Without a Unix socket there is
    a status line. Raises KvmtraceError if it cannot listen on TCP.
    """
    dropped = no_drops()
    pages = Pages(session, dropped, kinds=kinds, max_vms=max_vms, now=session.now, hooks=hooks)
    listeners = []
    with contextlib.ExitStack() as ending:
        tcp = list(doors.tcp) if doors is not None else []
        names: tuple[str, ...] = doors.names if doors is not None else ()
        if doors is not None and doors.listen is not None:
            tcp.append(listening_at(doors.listen))
            names = (*names, parse_listen(doors.listen)[0])
        routes = pages.routes()
        for one in tcp:
            ending.callback(one.close)
            security = doors.security if doors is not None else None
            listeners.append(tcp_listener(one, routes, names, security))
        file = None
        unix = list(doors.local) if doors is not None else []
        if not unix and (file := _socket_file()) is not None:
            stop.clean_up.append(file.remove)
            ending.callback(file.close)
            unix.append(file.listening)
        here = local_routes(pages, routes, functools.partial(feed.send_log, session))
        listeners += [Listener(one, here) for one in unix]
        server = Server(listeners, dropped, started=started)
        ending.callback(server.close)
        if file is not None:
            ending.callback(file.remove)  # while we listen
        yield server, pages


def _socket_file() -> SocketFile | None:
    try:
        return SocketFile()
    except OSError as error:
        where = f"{error.filename}: " if error.filename else ""
        print_status(
            f"kvmtrace: other commands will not find this one: {where}{error.strerror or error}"
        )
        return None
