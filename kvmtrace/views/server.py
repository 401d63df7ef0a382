"""A small threaded HTTP server for WSGI routes: loopback by default, never blocked by one client.

Not ``prometheus_client.start_http_server``: that one binds every address, answers any path, and
lets a client that connects and says nothing hold things up.
"""

from __future__ import annotations

import errno
import socket
import threading
from collections.abc import Iterable, Mapping
from http import HTTPStatus
from socketserver import TCPServer, ThreadingMixIn
from typing import TYPE_CHECKING, Any
from wsgiref.headers import Headers
from wsgiref.simple_server import WSGIRequestHandler, WSGIServer

from kvmtrace.errors import KvmtraceError, UsageError

if TYPE_CHECKING:
    from wsgiref.types import StartResponse, WSGIApplication, WSGIEnvironment

# Core Lightning's on Prometheus' list of ports, which no longer has a free one below 10000: hardly
# what else runs on a host full of VMs.
LOOPBACK = "127.0.0.1"
DEFAULT_LISTEN = f"{LOOPBACK}:9750"

# A client that sends nothing (or reads nothing) for so long is gone; seconds.
CLIENT_TIMEOUT = 10.0

# Handlers at a time; more are refused at once. A scrape needs one, for milliseconds.
MAX_CLIENTS = 128


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


class Server:
    """A running server; ``address`` is (host, port) as bound. End it with ``close``."""

    def __init__(self, httpd: _Httpd) -> None:
        self._httpd = httpd
        self.address: tuple[str, int] = httpd.server_address[:2]  # type: ignore[assignment]
        self._thread = threading.Thread(
            target=httpd.serve_forever, name="kvmtrace-http", daemon=True
        )
        self._thread.start()

    @property
    def url(self) -> str:
        """``http://HOST:PORT``, for people and tests."""
        host, port = self.address
        return f"http://[{host}]:{port}" if ":" in host else f"http://{host}:{port}"

    def close(self) -> None:
        """Stop listening; what is being answered is cut when the process ends. Twice is fine."""
        self._httpd.shutdown()
        self._thread.join()
        self._httpd.server_close()


def start(listen: str, routes: Mapping[str, WSGIApplication]) -> Server:
    """Serve ``routes`` (path → WSGI application, asked with GET only) on ``listen``."""
    httpd = _bound(listen)
    httpd.set_app(_router(routes))
    return Server(httpd)


def check_listen(listen: str) -> None:
    """Raise what ``start`` would, before there is anything to serve."""
    _bound(listen).server_close()


def _bound(listen: str) -> _Httpd:
    host, port = parse_listen(listen)
    try:
        return _Httpd(host, port)
    except OSError as error:
        raise _cannot_listen(listen, error) from None


def text(status: HTTPStatus, body: str, kind: str = "text/plain") -> WSGIApplication:
    """An application that answers just this."""

    def app(environ: WSGIEnvironment, start_response: StartResponse) -> Iterable[bytes]:
        start_response(
            f"{status.value} {status.phrase}", [("Content-Type", f"{kind}; charset=utf-8")]
        )
        return [body.encode("utf-8", "replace")]

    return app


def _router(routes: Mapping[str, WSGIApplication]) -> WSGIApplication:
    def app(environ: WSGIEnvironment, start_response: StartResponse) -> Iterable[bytes]:
        method = environ["REQUEST_METHOD"]
        answer: list[tuple[str, list[tuple[str, str]]]] = []

        def remember(status: str, headers: list[tuple[str, str]], exc_info: Any = None) -> Any:
            answer.append((status, headers))

        if method not in ("GET", "HEAD"):
            inner = text(HTTPStatus.METHOD_NOT_ALLOWED, "only GET and HEAD\n")
        else:
            inner = routes.get(environ["PATH_INFO"]) or text(HTTPStatus.NOT_FOUND, "not here\n")
        body = b"".join(inner({**environ, "REQUEST_METHOD": "GET"}, remember))
        status, given = answer[-1]
        headers = Headers(given)
        headers["Content-Length"] = str(len(body))
        headers["X-Content-Type-Options"] = "nosniff"
        headers["Content-Security-Policy"] = "default-src 'none'; style-src 'unsafe-inline'"
        if method not in ("GET", "HEAD"):
            headers["Allow"] = "GET, HEAD"
        start_response(status, headers.items())
        return [] if method == "HEAD" else [body]

    return app


class _Handler(WSGIRequestHandler):
    timeout = CLIENT_TIMEOUT  # StreamRequestHandler sets it on the connection

    def log_message(self, format: str, *args: Any) -> None:
        """Scrapes are not news."""


class _Httpd(ThreadingMixIn, WSGIServer):
    daemon_threads = True
    request_queue_size = MAX_CLIENTS

    def __init__(self, host: str, port: int) -> None:
        self._room = threading.BoundedSemaphore(MAX_CLIENTS)
        self._both_families = not host and socket.has_dualstack_ipv6()
        if self._both_families:
            host = "::"
        info = socket.getaddrinfo(
            host or None, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE
        )
        self.address_family = info[0][0]
        super().__init__(info[0][4][:2], _Handler)  # type: ignore[arg-type]

    def server_bind(self) -> None:
        # Not HTTPServer's: it looks up the host's full name, which can take a resolver's timeout.
        if self._both_families:
            self.socket.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_V6ONLY, 0)
        TCPServer.server_bind(self)
        self.server_name, self.server_port = str(self.server_address[0]), self.server_address[1]
        self.setup_environ()

    def process_request(self, request: Any, client_address: Any) -> None:
        if not self._room.acquire(blocking=False):
            self.shutdown_request(request)
            return
        try:
            super().process_request(request, client_address)
        except BaseException:  # no thread was started, so none gives the place back
            self._room.release()
            raise

    def process_request_thread(self, request: Any, client_address: Any) -> None:
        try:
            super().process_request_thread(request, client_address)
        finally:
            self._room.release()

    def handle_error(self, request: Any, client_address: Any) -> None:
        """A client that went away or timed out is not worth a traceback on a terminal."""


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
