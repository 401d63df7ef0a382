"""The bytes of one connection, plain or over TLS, for asyncio.

Plain sockets are used without asyncio's transports: the reader of events has to wait for Python's
lock at each of their system calls.
"""

from __future__ import annotations

import asyncio
import contextlib
import socket
import ssl
from typing import Protocol

LINGER_SECONDS = 1.0

_CHUNK = 1 << 16


class Connection(Protocol):
    """A connection that was accepted. All methods raise OSError if the client has left."""

    async def receive(self, most: int = _CHUNK) -> bytes:
        """Some bytes; b"" at the end."""

    async def send(self, data: bytes) -> None:
        """Return once the data are handed to the kernel."""

    async def finish(self) -> None:
        """Send no more, and read what comes until the client closes, for a second at most.

        Closing with unread data would reset the connection and lose the answer.
        """

    async def close(self) -> None:
        """Close it once the client has all."""

    def abort(self) -> None:
        """Close it now; nothing if it is closed."""


class PlainConnection:
    """A socket, which it owns; it does not block."""

    def __init__(self, client: socket.socket) -> None:
        self._client = client
        self._loop = asyncio.get_running_loop()

    async def receive(self, most: int = _CHUNK) -> bytes:
        return await self._loop.sock_recv(self._client, most)

    async def send(self, data: bytes) -> None:
        await self._loop.sock_sendall(self._client, data)

    async def finish(self) -> None:
        self._client.shutdown(socket.SHUT_WR)
        await _read_to_the_end(self)

    async def close(self) -> None:
        self.abort()

    def abort(self) -> None:
        self._client.close()


class TlsConnection:
    """A socket with TLS; made by ``accept``."""

    def __init__(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self._reader, self._writer = reader, writer

    @classmethod
    async def accept(cls, client: socket.socket, context: ssl.SSLContext) -> TlsConnection:
        """Shake hands. If that fails (OSError) or is cancelled, the socket is closed."""
        loop = asyncio.get_running_loop()
        reader = asyncio.StreamReader(loop=loop)
        protocol = asyncio.StreamReaderProtocol(reader, loop=loop)
        transport, _ = await loop.connect_accepted_socket(
            lambda: protocol,
            client,
            ssl=context,
            ssl_shutdown_timeout=LINGER_SECONDS,
        )
        # What was sent is with the kernel once ``drain`` returns.
        transport.set_write_buffer_limits(high=1, low=0)
        return cls(reader, asyncio.StreamWriter(transport, protocol, reader, loop))

    @property
    def alternative_names(self) -> list[str]:
        """The subjectAltNames of the client's certificate."""
        certificate = self._writer.get_extra_info("peercert") or {}
        return [value for _, value in certificate.get("subjectAltName", ())]

    async def receive(self, most: int = _CHUNK) -> bytes:
        return await self._reader.read(most)

    async def send(self, data: bytes) -> None:
        self._writer.write(data)
        await self._writer.drain()

    async def finish(self) -> None:
        await _read_to_the_end(self)

    async def close(self) -> None:
        self._writer.close()
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(LINGER_SECONDS):
                await self._writer.wait_closed()

    def abort(self) -> None:
        self._writer.transport.abort()


async def _read_to_the_end(connection: Connection) -> None:
    with contextlib.suppress(TimeoutError):
        async with asyncio.timeout(LINGER_SECONDS):
            while await connection.receive():
                pass
