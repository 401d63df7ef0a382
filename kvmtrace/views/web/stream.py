"""An answer that does not end: a thread for each client writes it, as fast as that client reads."""

from __future__ import annotations

import asyncio
import contextlib
import errno
import io
import os
import socket
import threading
from collections.abc import Callable
from typing import IO

from kvmtrace import local_socket

MAX_STREAMS = 16
"""Further clients are refused; commands attach on their own then."""

_CHUNK = 1 << 16

Frame = Callable[[bytes], bytes]
"""Data as they go over the connection; of b"", their end."""


class Client:
    """The client of a stream, for the thread that writes to it."""

    def __init__(self, connection: socket.socket, frame: Frame) -> None:
        self._connection = connection
        self._framed = _Framed(connection, frame)
        self.file: IO[str] = io.TextIOWrapper(
            io.BufferedWriter(self._framed, _CHUNK),  # type: ignore[type-var]
            "utf-8",
        )

    def is_closed(self) -> bool:
        """Whether the client has closed its end."""
        return local_socket.is_closed(self._connection)

    def drop(self) -> None:
        """Forget what was not written: the file would write it when it is collected."""
        self._framed.is_over = True
        self.file.close()


class _Framed(io.RawIOBase):
    def __init__(self, connection: socket.socket, frame: Frame) -> None:
        self._connection, self._frame = connection, frame
        self.is_over = False

    def writable(self) -> bool:
        return True

    def write(self, data: bytes | bytearray | memoryview) -> int:  # type: ignore[override]
        if not self.is_over:
            self._connection.sendall(self._frame(bytes(data)))
        return len(data)


class StreamRoute:
    """A route whose answer is what ``write(client)`` writes, in a thread of its own.

    On plain connections only. ``kind``: its Content-Type.
    """

    def __init__(self, write: Callable[[Client], None], kind: str) -> None:
        self._write = write
        self.kind = kind
        self._clients: set[socket.socket] = set()

    def headers(self) -> dict[str, str]:
        return {
            "Content-Type": self.kind,
            "Cache-Control": "no-store",
            local_socket.PID_HEADER: str(os.getpid()),
        }

    def has_room(self) -> bool:
        """Whether another client may be served.

        A client that closed its end does not count, though its thread may not have ended yet.
        """
        if len(self._clients) >= 4 * MAX_STREAMS:
            return False
        return sum(not local_socket.is_closed(one) for one in self._clients) < MAX_STREAMS

    async def run(self, connection: socket.socket, head: bytes, frame: Frame) -> None:
        """Write to a client until it leaves; if this is cancelled, disconnect it.

        ``head``: what goes before. Raises OSError if no thread can be started (TasksMax).
        """
        loop = asyncio.get_running_loop()
        done: asyncio.Future[None] = loop.create_future()
        self._clients.add(connection)

        def work() -> None:
            # A client that closed, or a source that failed, must not affect other clients.
            with connection, contextlib.suppress(Exception):
                connection.setblocking(True)
                connection.sendall(head)
                client = Client(connection, frame)
                try:
                    self._write(client)
                    client.file.flush()
                finally:
                    client.drop()
                connection.sendall(frame(b""))
            with contextlib.suppress(RuntimeError):  # the server was closed meanwhile
                loop.call_soon_threadsafe(ended)

        def ended() -> None:
            self._clients.discard(connection)
            if not done.done():
                done.set_result(None)

        try:
            threading.Thread(target=work, name="kvmtrace-client", daemon=True).start()
        except RuntimeError as error:
            self._clients.discard(connection)
            connection.close()
            raise OSError(errno.EAGAIN, str(error)) from error
        try:
            # The thread has the socket until it ends.
            await asyncio.shield(done)
        except asyncio.CancelledError:
            with contextlib.suppress(OSError):
                connection.shutdown(socket.SHUT_RDWR)
            raise
