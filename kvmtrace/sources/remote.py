"""A running ``kvmtrace serve`` as a source: its backlog, and then its new events.

No probe is attached a second time, and events from before the command was started are there. The
serve answers over HTTP on a Unix socket (``local_socket``). Its ``/events`` is a recording that
does not end (``session.feed``), which is checked like any other. It is asked for in HTTP/1.0, so
that no chunks have to be joined.
"""

from __future__ import annotations

import contextlib
import errno
import json
import re
import select
import socket
import time
from collections.abc import Mapping
from typing import IO, Any, Self, cast

from kvmtrace import local_socket
from kvmtrace.errors import KvmtraceError
from kvmtrace.events import Event, Host
from kvmtrace.probes import Probe, ProbeRuns
from kvmtrace.sources.checksums import Checker
from kvmtrace.sources.codec import DECODE_ERRORS, Decoder, dataclass_from, version_of
from kvmtrace.sources.recording import BACKLOG_END, FORMAT, MAX_LINE

_READ = 1 << 16
_MANY = 1 << 16


class ServeEnded(KvmtraceError):
    """The serve has ended, or closed the connection."""


class RemoteSource:
    """The events of a serve; made by ``connect``. The first ``poll`` returns the backlog alone."""

    def __init__(self, client: socket.socket, pid: int) -> None:
        """Ask for it, and read the header and the backlog. ``pid``: who made the socket.

        Raises OSError, EOFError or one of ``DECODE_ERRORS``.
        """
        self._client = client
        # Who connects to a service manager's socket may be the first one, and starts the service.
        is_manager = pid == local_socket.MANAGER
        client.settimeout(local_socket.START_TIMEOUT if is_manager else local_socket.TIMEOUT)
        self.pid = _ask(client) or pid
        client.settimeout(local_socket.TIMEOUT)
        self._buffer = bytearray()
        self._decoder = Decoder()
        self._checker = Checker()
        header = self._next()
        number = header["kvmtrace_recording"]
        if type(number) is not int or not 0 < number <= FORMAT:
            raise ValueError("a newer kvmtrace")
        host = dataclass_from(Host, header)
        self.name, self.epoch_offset_ns = host.source, host.epoch_offset_ns
        self.version = version_of(header)
        self.why: str | None = f"of kvmtrace serve, pid {self.pid}"
        self._backlog: list[Event] | None = []
        while (record := self._next()).get("kind") != BACKLOG_END:
            self._take(record, self._backlog)

    @classmethod
    def connect(cls) -> Self | None:
        """Connect to the serve of this host; None if there is none, or an incompatible one."""
        found = local_socket.connect()
        if found is None:
            return None
        try:
            return cls(*found)
        except (OSError, EOFError, *DECODE_ERRORS):
            found[0].close()
            return None

    def poll(self, timeout: float) -> list[Event]:
        """Events since the last call. Raises ServeEnded, or KvmtraceError for what is no event.

        With ``timeout`` 0, everything that the serve has sent by now.
        """
        if self._backlog is not None:
            backlog, self._backlog = self._backlog, None
            return backlog
        events: list[Event] = []
        deadline = time.monotonic() + timeout
        while True:
            try:
                # The last read may have left whole lines.
                for record in self._records():
                    self._take(record, events)
            except DECODE_ERRORS as error:
                raise KvmtraceError(
                    f"kvmtrace serve (pid {self.pid}) sent what is no event",
                    "is it another version? --source bpf or ftrace attaches without it",
                ) from error
            if len(events) >= (1 if timeout > 0 else _MANY):
                break
            left = max(0.0, deadline - time.monotonic())
            if not select.select([self._client], [], [], left)[0]:
                break
            try:
                self._receive()
            except (EOFError, OSError) as error:
                raise ServeEnded(
                    f"kvmtrace serve (pid {self.pid}) has ended",
                    "start it again, or run this again to attach without it",
                ) from error
        return events

    def probes(self) -> tuple[Probe, ...]:
        return self._decoder.probes

    def probe_runs(self) -> Mapping[str, ProbeRuns]:
        """Empty: a serve does not send them; its metrics have them."""
        return {}

    def close(self) -> None:
        with contextlib.suppress(OSError):
            self._client.close()

    def _take(self, record: dict[str, Any], events: list[Event]) -> None:
        event = self._decoder.event(record)
        if event is not None:
            events.append(event)

    def _next(self) -> dict[str, Any]:
        """Wait for the next line."""
        while (record := self._record()) is None:
            self._receive()
        return record

    def _records(self) -> list[dict[str, Any]]:
        """Return all complete lines."""
        records = []
        while (record := self._record()) is not None:
            records.append(record)
        return records

    def _record(self) -> dict[str, Any] | None:
        line, end, rest = self._buffer.partition(b"\n")
        if not end:
            return None
        self._buffer = rest
        record = json.loads(line)
        if not isinstance(record, dict):
            raise ValueError("not an object")
        if self._checker.missing_before(bytes(line), record):
            raise ValueError("lines are missing")
        return record

    def _receive(self) -> None:
        data = self._client.recv(_READ)
        if not data:
            raise EOFError
        self._buffer += data
        if len(self._buffer) > MAX_LINE + _READ and b"\n" not in self._buffer:
            raise ValueError("a line without an end")


class _Unbuffered:
    """A socket as ``http.client`` takes it, of which no more is read than the answer's head."""

    def __init__(self, client: socket.socket) -> None:
        self._client = client

    def makefile(self, mode: str) -> IO[bytes]:
        return cast("IO[bytes]", self._client.makefile("rb", buffering=0))


def _ask(client: socket.socket) -> int | None:
    """Ask for the events; the pid of the serve, if it gives one.

    Raises OSError if it does not answer with events.
    """
    client.sendall(b"GET /events HTTP/1.0\r\nHost: localhost\r\n\r\n")
    # After that, because it takes time, and the serve waits for a request only so long.
    import http.client  # noqa: PLC0415

    response = http.client.HTTPResponse(cast("socket.socket", _Unbuffered(client)))
    try:
        response.begin()
    except http.client.HTTPException as error:
        raise OSError(errno.EPROTO, f"no answer in HTTP: {error}") from error
    if response.status != http.HTTPStatus.OK:
        raise OSError(errno.EAGAIN, f"{response.status} {response.reason}")
    pid = response.getheader(local_socket.PID_HEADER, "")
    return int(pid) if re.fullmatch("[0-9]{1,10}", pid) else None
