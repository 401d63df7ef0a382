"""A small HTTP server: loopback by default, and bounded for any client.

One thread with asyncio, so that a connection costs a descriptor and some kilobytes, not a thread.
Each request has a deadline and a limited size. If there is no room for a connection, the oldest
idle one is closed, so a client that sends its request at once is always answered. Sockets are used
without asyncio's streams: the reader has to wait for Python's lock at each of their system calls.

``prometheus_client.start_http_server`` starts a thread for every connection and waits for its
request without a limit. uvicorn has no deadline for a request either (0.32: 128 clients that send
a byte now and then lock out all others), and would need most of this module.
"""

from __future__ import annotations

import asyncio
import contextlib
import errno
import ipaddress
import re
import resource
import socket
import threading
import time
from collections import Counter
from collections.abc import Callable, Hashable, Iterable, Mapping
from dataclasses import dataclass
from http import HTTPStatus
from typing import TypeVar

from kvmtrace.errors import KvmtraceError, UsageError

# Prometheus' list of ports has no free one below 10000. This one is Core Lightning's, which hardly
# runs on a host of VMs.
LOOPBACK = "127.0.0.1"
DEFAULT_LISTEN = f"{LOOPBACK}:9750"

# Seconds: for the head of a request, and from then on until the client has its answer.
HEAD_SECONDS = 5.0
ANSWER_SECONDS = 20.0
HEAD_BYTES = 8192

# Connections at a time, at most a quarter of the descriptors that this process may have; of one
# peer, half of that.
MAX_CLIENTS = 128

# How long one costly answer is sent to all clients: long enough that making answers takes at most a
# fiftieth of the time, which the reader lacks (one Python thread runs at a time).
KEEP_SECONDS = 1.0
MAX_KEEP_SECONDS = 5.0
_KEEP_PER_COST = 50

# Of a ``Tree``: answers that are kept, and names that wait for theirs.
KEPT_NAMES = 16
WAITING_NAMES = 8

_CHUNK = 1 << 16
_QUEUE = 128
_RETRY = 0.1
_LINGER = 1.0

# What a connection is doing; those with the lowest stage are dropped first.
_READING, _WRITING, _ANSWERING = range(3)

Headers = Mapping[str, str]
"""Values of headers by their names in lower case."""


@dataclass(frozen=True)
class Answer:
    """An HTTP response. ``kind`` and ``encoding``: Content-Type and Content-Encoding."""

    status: HTTPStatus
    body: bytes
    kind: str = "text/plain; charset=utf-8"
    encoding: str | None = None

    def head(self) -> bytes:
        """Status line and headers."""
        lines = [
            f"HTTP/1.0 {self.status.value} {self.status.phrase}",
            f"Content-Type: {self.kind}",
            f"Content-Length: {len(self.body)}",
            "Connection: close",
            "X-Content-Type-Options: nosniff",
            "Content-Security-Policy: default-src 'none'; style-src 'unsafe-inline'",
        ]
        if self.encoding:
            lines.append(f"Content-Encoding: {self.encoding}")
        if self.status == HTTPStatus.METHOD_NOT_ALLOWED:
            lines.append("Allow: GET, HEAD")
        return "\r\n".join([*lines, "", ""]).encode("latin-1")


def text(status: HTTPStatus, body: str, kind: str = "text/plain") -> Answer:
    """An answer in UTF-8."""
    return Answer(status, body.encode("utf-8", "replace"), f"{kind}; charset=utf-8")


Asked = TypeVar("Asked")


def _made(make: Callable[[Asked], Answer], asked: Asked) -> tuple[Answer, float]:
    """The answer, or what failed, and the seconds of CPU time that it took."""
    began = time.thread_time()
    try:
        answer = make(asked)
    except Exception as error:
        answer = text(HTTPStatus.INTERNAL_SERVER_ERROR, f"internal error: {type(error).__name__}\n")
    return answer, time.thread_time() - began


class Shared:
    """A route with costly answers: one is sent to all clients that ask within a second.

    ``variant``: the part of the headers that the answer depends on. ``make``: makes the answer for
    it, in a thread of its own.
    """

    def __init__(
        self,
        make: Callable[[Hashable], Answer],
        variant: Callable[[Headers], Hashable] = lambda headers: None,
    ) -> None:
        self._make = make
        self._variant = variant
        self._kept: dict[Hashable, tuple[asyncio.Future[Answer], float]] = {}

    async def answer(self, headers: Headers) -> Answer:
        """The answer that is cached or being made, else a new one."""
        variant = self._variant(headers)
        kept = self._kept.get(variant)
        if kept is None or (kept[0].done() and time.monotonic() >= kept[1]):
            future: asyncio.Future[Answer] = asyncio.get_running_loop().create_future()
            work = threading.Thread(
                target=self._work, args=(variant, future), name="kvmtrace-answer", daemon=True
            )
            try:
                work.start()
            except RuntimeError:  # no thread can be started (TasksMax)
                return text(HTTPStatus.SERVICE_UNAVAILABLE, "no thread to answer with\n")
            kept = self._kept[variant] = future, 0.0
        # A client that leaves must not cancel the answer for the others.
        return await asyncio.shield(kept[0])

    def _work(self, variant: Hashable, future: asyncio.Future[Answer]) -> None:
        began = time.monotonic()
        answer, cost = _made(self._make, variant)
        until = began + min(MAX_KEEP_SECONDS, max(KEEP_SECONDS, _KEEP_PER_COST * cost))

        def done() -> None:
            self._kept[variant] = future, until
            future.set_result(answer)

        with contextlib.suppress(RuntimeError):  # the server was closed meanwhile
            future.get_loop().call_soon_threadsafe(done)


class Tree:
    """The paths below a route, with costly answers: ``make(name)``, in a thread of its own.

    Clients choose the names. One answer is made at a time, and after each nothing is made for fifty
    times as long, so that a client with many names costs the reader no more than one with a single
    name. An answer is kept as in ``Shared``.
    """

    def __init__(self, make: Callable[[str], Answer]) -> None:
        self._make = make
        self._kept: dict[str, tuple[Answer, float]] = {}
        self._waiting: dict[str, asyncio.Future[Answer]] = {}
        self._busy = False

    async def answer(self, name: str) -> Answer:
        """The answer that is kept or being made, else a new one; 503 if too many names wait."""
        kept = self._kept.get(name)
        if kept is not None and time.monotonic() < kept[1]:
            return kept[0]
        future = self._waiting.get(name)
        if future is None:
            if len(self._waiting) >= WAITING_NAMES:
                return text(HTTPStatus.SERVICE_UNAVAILABLE, "busy: try again in some seconds\n")
            future = self._waiting[name] = asyncio.get_running_loop().create_future()
            self._next()
        # A client that leaves must not cancel the answer for the others.
        return await asyncio.shield(future)

    def _next(self) -> None:
        """Begin with the answer that was asked for first, unless one is being made."""
        if self._busy or not self._waiting:
            return
        name, future = next(iter(self._waiting.items()))
        work = threading.Thread(
            target=self._work, args=(name, future), name="kvmtrace-answer", daemon=True
        )
        self._busy = True
        try:
            work.start()
        except RuntimeError:  # no thread can be started (TasksMax)
            answer = text(HTTPStatus.SERVICE_UNAVAILABLE, "no thread to answer with\n")
            self._done(name, future, answer, pause=0.0)

    def _work(self, name: str, future: asyncio.Future[Answer]) -> None:
        answer, cost = _made(self._make, name)
        pause = min(MAX_KEEP_SECONDS, _KEEP_PER_COST * cost)
        with contextlib.suppress(RuntimeError):  # the server was closed meanwhile
            future.get_loop().call_soon_threadsafe(self._done, name, future, answer, pause)

    def _done(
        self, name: str, future: asyncio.Future[Answer], answer: Answer, pause: float
    ) -> None:
        del self._waiting[name]
        self._kept.pop(name, None)
        while len(self._kept) >= KEPT_NAMES:
            del self._kept[next(iter(self._kept))]
        self._kept[name] = answer, time.monotonic() + max(KEEP_SECONDS, pause)
        future.set_result(answer)
        future.get_loop().call_later(pause, self._rested)

    def _rested(self) -> None:
        self._busy = False
        self._next()


Route = Shared | Tree | Callable[[Headers], Answer]
"""A plain function answers at once, in the server's only thread.

A ``Tree`` stands at a path that ends in a slash, and answers for all paths directly below it.
"""


def parse_listen(listen: str) -> tuple[str, int]:
    """``HOST:PORT``, ``[V6]:PORT``, ``:PORT`` (every address) or ``PORT`` (loopback).

    → (host, port); 0: any free port. Raises UsageError for anything else.
    """
    host, colon, port = listen.rpartition(":")
    if not colon:
        host = LOOPBACK
    if host.startswith("[") and host.endswith("]"):
        host = host[1:-1]
        valid = ":" in host
    else:
        valid = not set(host) & set("[]:/ @")
    # isdecimal alone takes digits of other scripts, and int() would then agree.
    if not (valid and port.isascii() and port.isdecimal() and int(port) < 65536):
        raise UsageError(
            f"cannot listen on {listen!r}: not [HOST:]PORT",
            "examples: 9750, 127.0.0.1:9750, [::1]:9750, or :9750 for every address",
        )
    return host, int(port)


@dataclass(eq=False)
class _Client:
    peer: str
    since: float
    stage: int = _READING
    task: asyncio.Task[None] | None = None


class Server:
    """A running server; ``address`` is (host, port) as bound. End it with ``close``.

    ``dropped``: connections closed early, by reason: ``crowded`` (for a newer one), ``deadline``,
    and ``descriptors`` (none was left to accept one with).
    """

    def __init__(
        self,
        listening: socket.socket,
        routes: Mapping[str, Route],
        names: Iterable[str] = (),
        *,
        started: bool = True,
    ) -> None:
        """``names``: further host names for which it answers on loopback.

        Not ``started``: it listens, and answers from its ``start()`` on.
        """
        self.address: tuple[str, int] = listening.getsockname()[:2]
        self.dropped = Counter(crowded=0, deadline=0, descriptors=0)
        self._listening = listening
        self._routes = routes
        self._names: frozenset[str] | None = None
        if _is_loopback(self.address[0]):
            own = ("localhost", socket.gethostname(), *names)
            self._names = frozenset(name.lower().rstrip(".") for name in own)
        self._clients: set[_Client] = set()
        soft, _ = resource.getrlimit(resource.RLIMIT_NOFILE)
        if soft == resource.RLIM_INFINITY:
            self._room = MAX_CLIENTS
        else:
            self._room = min(MAX_CLIENTS, max(4, soft // 4))
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
    def url(self) -> str:
        """``http://HOST:PORT``, for people and tests."""
        host, port = self.address
        return f"http://[{host}]:{port}" if ":" in host else f"http://{host}:{port}"

    def close(self) -> None:
        """Stop listening and cut answers under way. May be called twice."""
        if self._thread.is_alive():
            with contextlib.suppress(RuntimeError):
                self._loop.call_soon_threadsafe(self._loop.stop)
            self._thread.join(_LINGER)
        elif self._thread.ident is None:
            self._loop.close()
        self._listening.close()

    def _run(self) -> None:
        loop = self._loop
        asyncio.set_event_loop(loop)
        self._listen()
        loop.run_forever()
        loop.remove_reader(self._listening)
        tasks = [client.task for client in self._clients if client.task is not None]
        for task in tasks:
            task.cancel()
        loop.run_until_complete(asyncio.gather(*tasks, return_exceptions=True))
        loop.close()

    # -- connections

    def _listen(self) -> None:
        self._loop.add_reader(self._listening, self._accept)

    def _accept(self) -> None:
        try:
            connection, address = self._listening.accept()
        except (BlockingIOError, ConnectionAbortedError):
            return
        except OSError:
            # No descriptors, or no memory: try again soon, with one connection less.
            self.dropped["descriptors"] += 1
            self._drop(self._clients)
            self._loop.remove_reader(self._listening)
            self._loop.call_later(_RETRY, self._listen)
            return
        connection.setblocking(False)
        client = _Client(str(address[0]), self._loop.time())
        of_peer = {one for one in self._clients if one.peer == client.peer}
        for crowd, room in ((of_peer, max(1, self._room // 2)), (self._clients, self._room)):
            if len(crowd) >= room:
                self.dropped["crowded"] += 1
                self._drop(crowd)
        self._clients.add(client)
        client.task = self._loop.create_task(self._talk(client, connection))

    def _drop(self, crowd: set[_Client]) -> None:
        """Close the oldest connection of those at the lowest stage."""
        if crowd:
            client = min(crowd, key=lambda one: (one.stage, one.since))
            self._clients.discard(client)
            if client.task is not None:
                client.task.cancel()

    async def _talk(self, client: _Client, connection: socket.socket) -> None:
        with connection:
            try:
                async with asyncio.timeout(HEAD_SECONDS):
                    head = await self._head(connection)
                async with asyncio.timeout(ANSWER_SECONDS):
                    client.stage = _ANSWERING
                    answer, with_body = await self._answer(head)
                    client.stage = _WRITING
                    await self._loop.sock_sendall(connection, answer.head())
                    if with_body:
                        await self._loop.sock_sendall(connection, answer.body)
                    if answer.status >= HTTPStatus.BAD_REQUEST:
                        # Closing with unread data would reset the connection and lose the answer.
                        await self._linger(connection)
            except TimeoutError:
                self.dropped["deadline"] += 1
            except (OSError, EOFError, asyncio.CancelledError):
                pass  # the client left, or was dropped
            finally:
                self._clients.discard(client)

    async def _head(self, connection: socket.socket) -> bytes | None:
        """Read a request up to its empty line; None if it is longer than ``HEAD_BYTES``."""
        head = b""
        while b"\r\n\r\n" not in head and b"\n\n" not in head:
            if len(head) > HEAD_BYTES:
                return None
            more = await self._loop.sock_recv(connection, HEAD_BYTES)
            if not more:
                raise EOFError
            head += more
        return head.lstrip(b"\r\n")

    async def _linger(self, connection: socket.socket) -> None:
        connection.shutdown(socket.SHUT_WR)
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(_LINGER):
                while await self._loop.sock_recv(connection, _CHUNK):
                    pass

    async def _answer(self, head: bytes | None) -> tuple[Answer, bool]:
        """The answer, and whether to send its body."""
        if head is None:
            answer = text(HTTPStatus.REQUEST_HEADER_FIELDS_TOO_LARGE, "too many headers\n")
            return answer, True
        request, *lines = head.decode("latin-1").split("\n")
        try:
            method, target, _ = request.split()
        except ValueError:
            return text(HTTPStatus.BAD_REQUEST, "not HTTP\n"), True
        if method not in ("GET", "HEAD"):
            return text(HTTPStatus.METHOD_NOT_ALLOWED, "only GET and HEAD\n"), True
        split = (line.partition(":") for line in lines)
        pairs = [(name.strip().lower(), value.strip()) for name, _, value in split]
        if not all(self._is_own_name(value) for name, value in pairs if name == "host"):
            return text(HTTPStatus.MISDIRECTED_REQUEST, _OTHER_NAME), method == "GET"
        path = target.partition("?")[0]
        directory, slash, name = path.rpartition("/")
        route = self._routes.get(path) or self._routes.get(directory + slash)
        if isinstance(route, Tree):
            return await route.answer(name), method == "GET"
        if route is None or path not in self._routes:
            return text(HTTPStatus.NOT_FOUND, "not here\n"), method == "GET"
        headers = dict(pairs)
        if isinstance(route, Shared):
            return await route.answer(headers), method == "GET"
        return route(headers), method == "GET"

    def _is_own_name(self, host: str) -> bool:
        """Whether to answer a request with this Host header.

        A web page can have its own name resolve to 127.0.0.1, and read the answers in a browser on
        this host (DNS rebinding). It cannot do so with addresses or with the names known here.
        """
        if self._names is None or not host:
            return True  # not on loopback: any name will do
        name = re.sub(r":[0-9]*$", "", host).lower().rstrip(".")
        return name in self._names or name.endswith(".localhost") or _is_address(name)


_OTHER_NAME = (
    "not served under this host name: use an address or localhost, or serve --allow-host NAME\n"
)


def _is_address(name: str) -> bool:
    try:
        ipaddress.ip_address(name.removeprefix("[").removesuffix("]"))
    except ValueError:
        return False
    return True


def _is_loopback(address: str) -> bool:
    found = ipaddress.ip_address(address.partition("%")[0])
    mapped = found.ipv4_mapped if isinstance(found, ipaddress.IPv6Address) else None
    return (mapped or found).is_loopback


def start(
    listen: str, routes: Mapping[str, Route], names: Iterable[str] = (), *, started: bool = True
) -> Server:
    """Serve ``routes`` (by path, asked with GET and HEAD only) on ``listen``.

    ``names``, ``started``: see ``Server``; the name in ``listen`` need not be among them.
    """
    return Server(_listening(listen), routes, (parse_listen(listen)[0], *names), started=started)


def check_listen(listen: str) -> None:
    """Raise the error that ``start`` would raise, before there is anything to serve."""
    _listening(listen).close()


def _listening(listen: str) -> socket.socket:
    host, port = parse_listen(listen)
    both_families = not host and socket.has_dualstack_ipv6()
    try:
        (family, _, _, _, address), *_ = socket.getaddrinfo(
            "::" if both_families else host or None,
            port,
            type=socket.SOCK_STREAM,
            flags=socket.AI_PASSIVE,
        )
        listening = socket.create_server(
            address,
            family=family,
            backlog=_QUEUE,
            dualstack_ipv6=both_families,
        )
    except OSError as error:
        raise _cannot_listen(listen, error) from None
    listening.setblocking(False)
    return listening


def _cannot_listen(listen: str, error: OSError) -> KvmtraceError:
    reasons: dict[int | None, tuple[str, str]] = {
        errno.EADDRINUSE: (
            "port in use",
            "is another kvmtrace serve running? name another port with --listen HOST:PORT",
        ),
        errno.EACCES: ("not permitted", "ports below 1024 need root; take a higher one"),
        errno.EADDRNOTAVAIL: ("not an address of this host", "ip address lists them"),
    }
    if isinstance(error, socket.gaierror):
        why, hint = "unknown host", "give an address of this host, for example 127.0.0.1"
    elif error.errno in reasons:
        why, hint = reasons[error.errno]
    else:
        why, hint = error.strerror or str(error), ""
    return KvmtraceError(f"cannot listen on {listen}: {why}", hint)
