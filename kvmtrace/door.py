"""How other commands ask a running ``kvmtrace serve`` what happened before they came, and listen.

An abstract Unix socket: nothing is written to any file system, and both ends check who the other
one is. A log holds addresses of other people's guests, so it is for root and for nobody else on the
host; that is why it is not a path of the exporter, which any user may ask.

Whoever knocks is sent a recording that does not end: what happened so far, a mark, and then what
happens. Each has a thread, so that one who stops reading holds up nobody else.
"""

from __future__ import annotations

import contextlib
import os
import socket
import struct
import threading
import time
from collections.abc import Callable

NAME = "\0kvmtrace"
TIMEOUT = 10.0
_RETRY = 0.2
MAX_CLIENTS = 16
"""Beyond it the door stays shut: who knocks has to look for himself."""


class Door:
    """Lets ``answer(client)`` talk to whoever may know, until ``close``.

    Raises OSError where another one has the name.
    """

    def __init__(self, answer: Callable[[socket.socket], None], name: str | None = None) -> None:
        self._answer = answer
        self._lock = threading.Lock()
        self._clients: dict[socket.socket, threading.Thread] = {}
        self._closed = False
        self._socket = socket.socket(socket.AF_UNIX)
        try:
            self._socket.bind(name or NAME)
        except OSError:
            self._socket.close()
            raise
        self._socket.listen(4)
        self._thread = threading.Thread(target=self._serve, name="kvmtrace-door", daemon=True)
        self._thread.start()

    def _serve(self) -> None:
        while True:
            try:
                client, _ = self._socket.accept()
            except OSError:
                if self._closed:
                    return
                time.sleep(_RETRY)  # no file descriptors left, for instance
                continue
            with self._lock:
                if len(self._clients) >= MAX_CLIENTS or not _trusted(client):
                    client.close()
                    continue
                thread = threading.Thread(
                    target=self._talk, args=(client,), name="kvmtrace-client", daemon=True
                )
                try:
                    thread.start()
                except RuntimeError:  # no thread is to be had (TasksMax)
                    client.close()
                else:
                    self._clients[client] = thread

    def _talk(self, client: socket.socket) -> None:
        # A client that went away, a source that died: neither is another client's fault.
        with client, contextlib.suppress(Exception):
            self._answer(client)
        with self._lock:
            del self._clients[client]

    def close(self) -> None:
        """Answer no more, and end what is being told."""
        self._closed = True
        with contextlib.suppress(OSError):
            self._socket.shutdown(socket.SHUT_RDWR)
        self._socket.close()
        self._thread.join()
        with self._lock:
            clients = dict(self._clients)
            for client in clients:
                with contextlib.suppress(OSError):
                    client.shutdown(socket.SHUT_RDWR)
        for thread in clients.values():
            thread.join()


def has_left(client: socket.socket) -> bool:
    """Whether a client, which never says anything, has closed its end."""
    try:
        return client.recv(1, socket.MSG_PEEK | socket.MSG_DONTWAIT) == b""
    except BlockingIOError:
        return False
    except OSError:
        return True


def knock(name: str | None = None) -> tuple[socket.socket, int] | None:
    """A connection to the ``kvmtrace serve`` of this host, and its pid.

    None if none runs that may be believed.
    """
    client = socket.socket(socket.AF_UNIX)
    with contextlib.suppress(OSError):
        client.settimeout(TIMEOUT)
        client.connect(name or NAME)
        if _trusted(client):
            return client, _credentials(client)[0]
    client.close()
    return None


def _trusted(peer: socket.socket) -> bool:
    """Root or ourselves, and not of a container: one on the host's network shares such sockets."""
    pid, uid = _credentials(peer)
    return uid in (0, os.geteuid()) and _same_namespaces(pid)


def _same_namespaces(pid: int) -> bool:
    try:
        return all(
            os.stat(f"/proc/{pid}/ns/{kind}").st_ino == os.stat(f"/proc/self/ns/{kind}").st_ino
            for kind in ("pid", "user")
        )
    except OSError:
        return False


def _credentials(peer: socket.socket) -> tuple[int, int]:
    """Process and user id of who is at the other end, as the kernel says."""
    size = struct.calcsize("3i")
    pid, uid, _ = struct.unpack("3i", peer.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, size))
    return pid, uid
