"""How other commands ask a running ``kvmtrace serve`` what happened before they came.

An abstract Unix socket: nothing is written to any file system, and both ends check who the other
one is. A log holds addresses of other people's guests, so it is for root and for nobody else on the
host; that is why it is not a path of the exporter, which any user may ask.
"""

from __future__ import annotations

import contextlib
import os
import socket
import struct
import threading
from collections.abc import Callable

NAME = "\0kvmtrace"
TIMEOUT = 10.0


class Door:
    """Answers whoever may know with ``answer()`` until ``close``.

    Raises OSError where another one has the name.
    """

    def __init__(self, answer: Callable[[], str], name: str | None = None) -> None:
        self._answer = answer
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
                return
            # A client that went away, a source that died: neither is the next client's fault.
            with client, contextlib.suppress(Exception):
                client.settimeout(TIMEOUT)
                if _trusted(client):
                    client.sendall(self._answer().encode())

    def close(self) -> None:
        """Answer no more."""
        with contextlib.suppress(OSError):
            self._socket.shutdown(socket.SHUT_RDWR)
        self._socket.close()
        self._thread.join()


def ask(name: str | None = None) -> str | None:
    """What the ``kvmtrace serve`` of this host knows; None if none runs that may be believed."""
    with socket.socket(socket.AF_UNIX) as client, contextlib.suppress(OSError):
        client.settimeout(TIMEOUT)
        client.connect(name or NAME)
        if not _trusted(client):
            return None
        parts = []
        while part := client.recv(1 << 16):
            parts.append(part)
        return b"".join(parts).decode("utf-8", "replace") or None
    return None


def _trusted(peer: socket.socket) -> bool:
    size = struct.calcsize("3i")
    _, uid, _ = struct.unpack("3i", peer.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, size))
    return uid in (0, os.geteuid())
