"""A client of the HTTP server, and sessions for it to serve."""

from __future__ import annotations

import http.client
import socket
from collections.abc import Callable

from kvmtrace.model import Snapshot
from kvmtrace.views.web.server import Server


class Fake:
    """The least of a session that ``serve`` needs."""

    def __init__(self, snapshot: Callable[[], Snapshot]) -> None:
        self.snapshot = snapshot


def ask(
    server: Server, path: str, method: str = "GET", **headers: str
) -> tuple[http.client.HTTPResponse, bytes]:
    """The response to one request on a connection of its own, and its body."""
    connection = http.client.HTTPConnection(*server.address, timeout=20)
    try:
        connection.request(method, path, headers=headers)
        response = connection.getresponse()
        return response, response.read()
    finally:
        connection.close()


def connect(server: Server, peer: str = "127.0.0.1") -> socket.socket:
    """Connect from ``peer``, an address on loopback."""
    return socket.create_connection(server.address, timeout=20, source_address=(peer, 0))


def is_open(client: socket.socket) -> bool:
    """Whether the server has not closed the connection."""
    client.setblocking(False)
    try:
        return client.recv(1) != b""
    except BlockingIOError:
        return True
    except ConnectionError:
        return False
    finally:
        client.settimeout(20)


class Beating:
    """A session with a heartbeat, whose snapshots are counted."""

    def __init__(self, age: float = 0.0) -> None:
        self.snapshots = 0
        self._age = age

    def age(self) -> float:
        return self._age

    def snapshot(self) -> Snapshot:
        self.snapshots += 1
        return Snapshot()
