"""A small HTTP server: bounded for any client, on TCP and on a Unix socket.

h11 parses requests and frames answers; asyncio has the sockets and TLS. One thread, so that a
connection costs a descriptor and some kilobytes, not a thread. Each request has a deadline and a
limited size, and each connection has one request. If there is no room for a connection, the oldest
idle one is closed, so a client that sends its request at once is always answered.

A whole server from a library was measured (docs/service.md). uvicorn has no deadline for a request:
with a limit of connections, 128 clients that send nothing lock out the scrape (503); without one,
they take the descriptors that the reader of events needs. It takes 2 MiB more, wakes up ten times a
second, and has one TLS configuration for all its sockets. ``prometheus_client.start_http_server``
starts a thread for every connection and waits for its request without a limit.
"""

from __future__ import annotations

import asyncio
import contextlib
import resource
import socket
import threading
from collections import Counter
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from http import HTTPStatus
from typing import TYPE_CHECKING

import h11

from kvmtrace import local_socket
from kvmtrace.views.web.answers import Answer, Headers, Shared, Tree, text
from kvmtrace.views.web.connection import Connection, PlainConnection, TlsConnection
from kvmtrace.views.web.host_names import OTHER_NAME, HostNames, is_loopback
from kvmtrace.views.web.stream import StreamRoute

if TYPE_CHECKING:
    # Loads YAML and bcrypt, which take memory and are seldom asked for.
    from kvmtrace.views.web.security import Security

# Seconds: for the head of a request (TLS included), and from then on until the client has its
# answer.
HEAD_SECONDS = 5.0
ANSWER_SECONDS = 20.0
HEAD_BYTES = 8192

# Connections at a time of each listener, of all together at most a quarter of the descriptors that
# this process may have; of one peer, half of that.
MAX_CLIENTS = 128

_RETRY = 0.1
_CLOSE_SECONDS = 1.0

# What a connection is doing; those with the lowest stage are dropped first.
_READING, _WRITING, _ANSWERING, _STREAMING = range(4)

Route = Shared | Tree | StreamRoute | Callable[[Headers], Answer]
"""A plain function answers at once, in the server's only thread.

A ``Tree`` at a path that ends in a slash answers for all paths directly below it.
"""


@dataclass(eq=False)
class Listener:
    """A socket that listens, and what is answered there (by path, asked with GET and HEAD only).

    ``names``: of a server on loopback; None: it answers under any name. ``security``: None: plain
    HTTP, for everybody who can connect.
    """

    listening: socket.socket
    routes: Mapping[str, Route]
    names: HostNames | None = None
    security: Security | None = None

    @property
    def is_local(self) -> bool:
        return self.listening.family == socket.AF_UNIX

    def peer(self, client: socket.socket, address: object) -> str:
        """Whose connection this is: an IP address, or a user of this host."""
        if self.is_local:
            return f"uid {local_socket.credentials(client)[1]}"
        return str(address[0]) if isinstance(address, tuple) else ""


def tcp_listener(
    listening: socket.socket,
    routes: Mapping[str, Route],
    names: Iterable[str] = (),
    security: Security | None = None,
) -> Listener:
    """Listen on TCP. On loopback it answers under ``names`` and its own names only."""
    is_own = is_loopback(listening.getsockname()[0])
    return Listener(listening, routes, HostNames(names) if is_own else None, security)


@dataclass(eq=False)
class _Client:
    listener: Listener
    peer: str
    since: float
    stage: int = _READING
    task: asyncio.Task[None] | None = None


@dataclass
class _Request:
    """``head_only``: it was a HEAD. ``target``: path and query; "" of what is no request."""

    target: str = ""
    headers: dict[str, str] = field(default_factory=dict)
    head_only: bool = False
    error: Answer | None = None


class Server:
    """A running server. End it with ``close``.

    ``dropped``: connections closed early, by reason: ``crowded`` (for a newer one), ``deadline``,
    and ``descriptors`` (none was left to accept one with).
    """

    def __init__(
        self,
        listeners: Iterable[Listener],
        dropped: Counter[str] | None = None,
        *,
        started: bool = True,
    ) -> None:
        """``dropped``: what to count in. Not ``started``: it answers from its ``start()`` on."""
        self.listeners = tuple(listeners)
        self.dropped = no_drops() if dropped is None else dropped
        self._addresses = [
            one.listening.getsockname() for one in self.listeners if not one.is_local
        ]
        self._clients: set[_Client] = set()
        soft, _ = resource.getrlimit(resource.RLIMIT_NOFILE)
        if soft == resource.RLIM_INFINITY:
            self._room = MAX_CLIENTS
        else:
            self._room = min(MAX_CLIENTS, max(4, soft // 4 // max(1, len(self.listeners))))
        self._loop = asyncio.new_event_loop()
        # Its default logs a traceback.
        self._loop.set_exception_handler(lambda loop, context: None)
        self._thread = threading.Thread(target=self._run, name="kvmtrace-http", daemon=True)
        if started:
            self.start()

    def start(self) -> None:
        """Begin to answer, with the privileges of the calling thread."""
        self._thread.start()

    @property
    def address(self) -> tuple[str, int]:
        """(host, port) of the first TCP listener, as bound."""
        host, port = self._addresses[0][:2]
        return host, port

    @property
    def url(self) -> str:
        """``http://HOST:PORT``, or https, for people and tests."""
        host, port = self.address
        security = next(one.security for one in self.listeners if not one.is_local)
        scheme = "https" if security is not None and security.context is not None else "http"
        return f"{scheme}://[{host}]:{port}" if ":" in host else f"{scheme}://{host}:{port}"

    def close(self) -> None:
        """Stop listening and cut answers under way. May be called twice."""
        if self._thread.is_alive():
            with contextlib.suppress(RuntimeError):
                self._loop.call_soon_threadsafe(self._loop.stop)
            self._thread.join(_CLOSE_SECONDS)
        elif self._thread.ident is None:
            self._loop.close()
        for one in self.listeners:
            one.listening.close()

    def _run(self) -> None:
        loop = self._loop
        asyncio.set_event_loop(loop)
        for listener in self.listeners:
            self._listen(listener)
        loop.run_forever()
        for listener in self.listeners:
            loop.remove_reader(listener.listening)
        tasks = [client.task for client in self._clients if client.task is not None]
        for task in tasks:
            task.cancel()
        loop.run_until_complete(asyncio.gather(*tasks, return_exceptions=True))
        loop.close()

    # -- connections

    def _listen(self, listener: Listener) -> None:
        self._loop.add_reader(listener.listening, self._accept, listener)

    def _accept(self, listener: Listener) -> None:
        try:
            connection, address = listener.listening.accept()
        except (BlockingIOError, ConnectionAbortedError):
            return
        except OSError:
            # No descriptors, or no memory: try again soon, with one connection less.
            self.dropped["descriptors"] += 1
            self._drop(self._clients)
            self._loop.remove_reader(listener.listening)
            self._loop.call_later(_RETRY, self._listen, listener)
            return
        connection.setblocking(False)
        if listener.security is not None:
            listener.security.look()
        client = _Client(listener, listener.peer(connection, address), self._loop.time())
        crowd = {one for one in self._clients if one.listener is listener}
        of_peer = {one for one in crowd if one.peer == client.peer}
        for some, room in ((of_peer, max(1, self._room // 2)), (crowd, self._room)):
            if len(some & self._clients) >= room:
                self.dropped["crowded"] += 1
                self._drop(some & self._clients)
        self._clients.add(client)
        client.task = self._loop.create_task(self._talk(client, connection))

    def _drop(self, crowd: set[_Client]) -> None:
        """Close the oldest connection of those at the lowest stage."""
        if crowd:
            client = min(crowd, key=lambda one: (one.stage, one.since))
            self._clients.discard(client)
            if client.task is not None:
                client.task.cancel()

    async def _talk(self, client: _Client, accepted: socket.socket) -> None:
        connection: Connection | None = None
        http = h11.Connection(h11.SERVER, max_incomplete_event_size=HEAD_BYTES)
        try:
            async with asyncio.timeout(HEAD_SECONDS):
                connection = await _opened(client.listener, accepted)
                request = await _request(connection, http)
            async with asyncio.timeout(ANSWER_SECONDS):
                client.stage = _ANSWERING
                answer = await _answer(client.listener, request)
                if isinstance(answer, Answer):
                    client.stage = _WRITING
                    await _send(connection, http, answer, request, client.listener)
                    if http.their_state is not h11.DONE:
                        await connection.finish()  # the client sent more than was read
                    await connection.close()
            if isinstance(answer, StreamRoute):
                client.stage = _STREAMING
                connection = None  # a thread has the socket from now on
                await answer.run(accepted, _head(http, answer.headers()), _frame(http))
        except TimeoutError:
            self.dropped["deadline"] += 1
        except (OSError, EOFError, h11.ProtocolError, asyncio.CancelledError):
            pass  # the client left, or was dropped
        finally:
            if connection is not None:
                connection.abort()
            self._clients.discard(client)


def no_drops() -> Counter[str]:
    """What a server counts, at 0."""
    return Counter(crowded=0, deadline=0, descriptors=0)


# -- requests


async def _opened(listener: Listener, accepted: socket.socket) -> Connection:
    """The connection, after its handshake. Raises OSError; the socket is closed then."""
    security = listener.security
    if security is None or security.context is None:
        return PlainConnection(accepted)
    connection = await TlsConnection.accept(accepted, security.context)
    if not security.allows(connection.alternative_names):
        connection.abort()
        raise ConnectionAbortedError("not one of client_allowed_sans")
    return connection


async def _request(connection: Connection, http: h11.Connection) -> _Request:
    """Read a request up to its empty line. Raises EOFError if the client leaves before that."""
    try:
        while (event := http.next_event()) is h11.NEED_DATA:
            data = await connection.receive(HEAD_BYTES)
            if not data:
                raise EOFError
            http.receive_data(data)
    except h11.RemoteProtocolError as error:
        if error.error_status_hint == HTTPStatus.REQUEST_HEADER_FIELDS_TOO_LARGE:
            return _refused(HTTPStatus.REQUEST_HEADER_FIELDS_TOO_LARGE, "too many headers\n")
        return _refused(HTTPStatus.BAD_REQUEST, "not HTTP\n")
    if not isinstance(event, h11.Request):
        raise EOFError
    if event.method not in (b"GET", b"HEAD"):
        return _refused(HTTPStatus.METHOD_NOT_ALLOWED, "only GET and HEAD\n")
    return _Request(
        event.target.decode("latin-1"),
        {name.decode("latin-1"): value.decode("latin-1") for name, value in event.headers},
        head_only=event.method == b"HEAD",
    )


def _refused(status: HTTPStatus, why: str) -> _Request:
    return _Request(error=text(status, why))


async def _answer(listener: Listener, request: _Request) -> Answer | StreamRoute:
    if request.error is not None:
        return request.error
    if listener.names is not None and not listener.names.has(request.headers.get("host", "")):
        return text(HTTPStatus.MISDIRECTED_REQUEST, OTHER_NAME)
    if listener.security is not None:
        refusal = await listener.security.refusal(request.headers)
        if refusal is not None:
            return refusal
    path, _, query = request.target.partition("?")
    route = listener.routes.get(path)
    if route is None:
        directory, slash, name = path.rpartition("/")
        route = listener.routes.get(directory + slash)
        if not isinstance(route, Tree):
            return text(HTTPStatus.NOT_FOUND, "not here\n")
        return await route.answer(name)
    match route:
        case Tree():
            return await route.answer("" if path.endswith("/") else query)
        case Shared():
            return await route.answer(request.headers)
        case StreamRoute() if request.head_only:
            return Answer(HTTPStatus.OK, b"", route.kind)
        case StreamRoute() if not route.has_room():
            return text(HTTPStatus.SERVICE_UNAVAILABLE, "too many readers: try again later\n")
        case StreamRoute():
            return route
    return route(request.headers)


# -- answers


async def _send(
    connection: Connection,
    http: h11.Connection,
    answer: Answer,
    request: _Request,
    listener: Listener,
) -> None:
    headers = answer.headers() | (listener.security.headers if listener.security else {})
    await connection.send(_head(http, headers, answer.status))
    if not request.head_only:
        await connection.send(http.send(h11.Data(data=answer.body)) or b"")
    http.send(h11.EndOfMessage())


def _head(
    http: h11.Connection, headers: Mapping[str, str], status: HTTPStatus = HTTPStatus.OK
) -> bytes:
    found = [*headers.items(), ("Connection", "close")]
    response = h11.Response(status_code=status, headers=found, reason=status.phrase.encode())
    return http.send(response) or b""


def _frame(http: h11.Connection) -> Callable[[bytes], bytes]:
    """How data go over the connection: in chunks, or as they are to a client of HTTP/1.0."""

    def frame(data: bytes) -> bytes:
        return http.send(h11.Data(data=data) if data else h11.EndOfMessage()) or b""

    return frame
