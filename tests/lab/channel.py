"""The host's end of the agent's port: jobs in the machine, their output and exit status."""

from __future__ import annotations

import base64
import json
import re
import signal
import socket
import threading
import time
from collections.abc import Callable
from typing import Literal

from tests.lab.errors import LabError, LabTimeout

Stream = Literal["stdout", "stderr"]
POLL = 0.2


class Channel:
    """A connection to the agent. A thread reads from it; `changed` wakes waiting threads."""

    def __init__(self, connection: socket.socket, alive: Callable[[], None]) -> None:
        self.connection = connection
        self.alive = alive
        self.changed = threading.Condition()
        self.ready = ""
        self.closed = False
        self.jobs: dict[int, Job] = {}
        self._sending = threading.Lock()
        threading.Thread(target=self._read, name="lab-agent", daemon=True).start()

    def _read(self) -> None:
        with self.connection.makefile("rb") as lines:
            try:
                for line in lines:
                    self._take(json.loads(line))
            except (OSError, ValueError):
                pass
        with self.changed:
            self.closed = True
            self.changed.notify_all()

    def _take(self, message: dict[str, object]) -> None:
        with self.changed:
            if "ready" in message:
                self.ready = str(message["ready"])
            else:
                self.jobs[int(str(message["id"]))].take(message)
            self.changed.notify_all()

    def send(self, **message: object) -> None:
        """Send one line to the agent; LabError if the machine is gone."""
        data = json.dumps(message).encode() + b"\n"
        try:
            with self._sending:
                self.connection.sendall(data)
        except OSError as error:
            self.alive()
            raise LabError(f"the machine closed its connection: {error}") from error

    def wait(self, done: Callable[[], bool], timeout: float, what: str) -> None:
        """Wait until `done()`; raise LabTimeout in time, or LabError if the machine has died."""
        deadline = time.monotonic() + timeout
        with self.changed:
            while not done():
                self.alive()
                if self.closed:
                    time.sleep(1)  # QEMU closes the port a moment before it ends
                    self.alive()
                    raise LabError(f"the machine is gone while waiting for {what}")
                if time.monotonic() >= deadline:
                    raise LabTimeout(f"no {what} in {timeout:g} s")
                self.changed.wait(POLL)

    def start(
        self,
        command: str | list[str],
        *,
        pty: tuple[int, int] | None = None,
        env: dict[str, str] | None = None,
        on_output: Callable[[bytes], None] | None = None,
    ) -> Job:
        """Start a program in the machine; a string goes through the shell."""
        with self.changed:
            identity = len(self.jobs) + 1
            job = self.jobs[identity] = Job(self, identity, command, on_output)
        self.send(op="start", id=identity, command=command, pty=pty, env=env or {})
        return job

    def close(self) -> None:
        """Close the connection; the agent then powers the machine off."""
        self.connection.close()


class Job:
    """A program in the machine."""

    def __init__(
        self,
        channel: Channel,
        identity: int,
        command: str | list[str],
        on_output: Callable[[bytes], None] | None,
    ) -> None:
        self.channel = channel
        self.identity = identity
        self.command = command if isinstance(command, str) else " ".join(command)
        self.status: int | None = None
        self.output: dict[str, bytearray] = {"out": bytearray(), "err": bytearray()}
        self.on_output = on_output

    def take(self, message: dict[str, object]) -> None:
        """Take in a message of the agent about this job."""
        if "exit" in message:
            self.status = int(str(message["exit"]))
        for stream in self.output.keys() & message.keys():
            data = base64.b64decode(str(message[stream]))
            self.output[stream] += data
            if self.on_output is not None:
                self.on_output(data)

    @property
    def stdout(self) -> str:
        """Its standard output so far (with a pty: everything)."""
        return self.output["out"].decode(errors="replace")

    @property
    def stderr(self) -> str:
        """Its standard error so far."""
        return self.output["err"].decode(errors="replace")

    def poll(self) -> int | None:
        """Its exit status, None while it runs; -N if signal N ended it."""
        return self.status

    def send(self, text: str | bytes) -> None:
        """Write to its standard input."""
        data = text.encode() if isinstance(text, str) else text
        self._request("stdin", data=base64.b64encode(data).decode())

    def close_stdin(self) -> None:
        """Close its standard input."""
        self._request("stdin", eof=True)

    def signal(self, number: int) -> None:
        """Send a signal to it and to the programs that it started."""
        self._request("signal", signal=int(number))

    def resize(self, rows: int, columns: int) -> None:
        """Change the size of its terminal."""
        self._request("resize", size=[rows, columns])

    def _request(self, operation: str, **more: object) -> None:
        self.channel.send(op=operation, id=self.identity, **more)

    def wait(self, timeout: float = 60) -> int:
        """Wait for its exit status; LabTimeout if it does not end in time."""
        self.channel.wait(lambda: self.status is not None, timeout, f"end of `{self.command}`")
        assert self.status is not None
        return self.status

    def wait_for(
        self,
        wanted: str | Callable[[str], object],
        timeout: float = 60,
        stream: Stream = "stdout",
    ) -> str:
        """Wait until its output matches a regular expression or a callable; return the output."""

        def text() -> str:
            return self.stdout if stream == "stdout" else self.stderr

        def found() -> bool:
            if callable(wanted):
                return bool(wanted(text()))
            return re.search(wanted, text(), re.MULTILINE) is not None

        ended = False

        def done() -> bool:
            nonlocal ended
            ended = self.status is not None
            return found() or ended

        try:
            self.channel.wait(done, timeout, f"{wanted!r} from `{self.command}`")
        except LabTimeout as error:
            raise LabTimeout(f"{error}; {self.tail()}") from None
        if not found():
            raise LabError(
                f"`{self.command}` ended ({self.status}) without {wanted!r}; {self.tail()}"
            )
        return text()

    def tail(self) -> str:
        """The end of its output, for messages."""
        return f"stdout ends {self.stdout[-500:]!r}, stderr ends {self.stderr[-500:]!r}"

    def kill(self) -> None:
        """Send it SIGKILL unless it has ended."""
        if self.status is None:
            self.signal(signal.SIGKILL)
