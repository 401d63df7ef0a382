"""The agent, process 1 of a machine: starts programs for the host and forwards their output.

It exchanges JSON lines with the host over a virtio-serial port. The host sends `start`, `stdin`,
`signal` and `resize`; the agent sends `out`, `err` and `exit` for each job. When the host closes
the port, the machine powers off, so that no machine outlives the process that booted it.

It needs Python 3.11 and the standard library only: every root of the lab has these.
"""

from __future__ import annotations

import base64
import fcntl
import json
import os
import pty
import selectors
import signal
import struct
import subprocess
import sys
import termios
import time
from pathlib import Path
from typing import IO, Any

PORT_NAME = "kvmtrace.lab"
CHUNK = 1 << 16
SUSPENDED = 0.5  # seconds; two clocks are never read at the same time
ENVIRONMENT = {
    "PATH": "/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin",
    "HOME": "/root",
    "LANG": "C.UTF-8",
    "TERM": "xterm-256color",
}


class Job:
    """A program: its process and the descriptors of its input and output."""

    def __init__(self, request: dict[str, Any]) -> None:
        command = request["command"]
        arguments = ["/bin/sh", "-c", command] if isinstance(command, str) else command
        environment = ENVIRONMENT | request.get("env", {})
        size = request.get("pty")
        if size:
            terminal, inside = pty.openpty()
            set_size(terminal, size)
            self.process = subprocess.Popen(
                arguments,
                stdin=inside,
                stdout=inside,
                stderr=inside,
                env=environment,
                cwd="/root",
                start_new_session=True,
                preexec_fn=take_terminal,  # noqa: PLW1509 (the agent has no threads)
            )
            os.close(inside)
            self.input = os.dup(terminal)
            self.outputs = {"out": terminal}
        else:
            self.process = subprocess.Popen(
                arguments,
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=subprocess.PIPE,
                env=environment,
                cwd="/root",
                start_new_session=True,
            )
            self.input = own(self.process.stdin)
            self.outputs = {"out": own(self.process.stdout), "err": own(self.process.stderr)}
        os.set_blocking(self.input, False)
        self.pending = b""
        self.eof = False

    def feed(self) -> None:
        """Write as much pending input as the program takes now; it may not be reading at all."""
        try:
            while self.pending:
                self.pending = self.pending[os.write(self.input, self.pending) :]
        except BlockingIOError:
            return
        except OSError:
            self.pending = b""
        if self.eof:
            self.close_input()
            self.eof = False

    def close_input(self) -> None:
        """Close the program's input."""
        if self.input >= 0:
            os.close(self.input)
            self.input = -1


def own(pipe: IO[bytes] | None) -> int:
    """Return a descriptor of the pipe that the caller has to close."""
    assert pipe is not None
    descriptor = os.dup(pipe.fileno())
    pipe.close()
    return descriptor


def take_terminal() -> None:
    """Make the terminal on stdin the controlling one (runs in the new program)."""
    fcntl.ioctl(0, termios.TIOCSCTTY, 0)


def set_size(terminal: int, size: list[int]) -> None:
    """Set the rows and columns of a terminal; its programs get SIGWINCH."""
    fcntl.ioctl(terminal, termios.TIOCSWINSZ, struct.pack("HHHH", size[0], size[1], 0, 0))


class Agent:
    """The loop between the port and the jobs."""

    def __init__(self, port: int) -> None:
        self.port = port
        self.jobs: dict[int, Job] = {}
        self.selector = selectors.DefaultSelector()

    def send(self, **message: object) -> None:
        """Send one line to the host."""
        data = json.dumps(message).encode() + b"\n"
        while data:
            data = data[os.write(self.port, data) :]

    def start(self, identity: int, request: dict[str, Any]) -> None:
        """Start a job; if that fails, report status 127 and the error, as a shell does."""
        try:
            job = Job(request)
        except OSError as error:
            self.send(id=identity, err=base64.b64encode(f"{error}\n".encode()).decode())
            self.send(id=identity, exit=127)
            return
        self.jobs[identity] = job
        for stream, descriptor in job.outputs.items():
            self.selector.register(descriptor, selectors.EVENT_READ, (identity, stream))

    def handle(self, request: dict[str, Any]) -> None:
        """Carry out one request of the host."""
        identity = request["id"]
        if request["op"] == "start":
            self.start(identity, request)
            return
        job = self.jobs.get(identity)
        if job is None:
            return
        try:
            if request["op"] == "stdin":
                job.pending += base64.b64decode(request.get("data", ""))
                job.eof = job.eof or request.get("eof", False)
            elif request["op"] == "signal":
                os.killpg(job.process.pid, request["signal"])
            elif request["op"] == "resize":
                set_size(job.outputs["out"], request["size"])
        except OSError:
            pass  # the program has just ended; its exit is on the way

    def pump(self, identity: int, stream: str, descriptor: int) -> None:
        """Forward output of a job."""
        try:
            data = os.read(descriptor, CHUNK)
        except OSError:  # a pty whose programs have ended
            data = b""
        if data:
            self.send(id=identity, **{stream: base64.b64encode(data).decode()})
        else:
            self.selector.unregister(descriptor)
            os.close(descriptor)
            del self.jobs[identity].outputs[stream]

    def drain(self, identity: int, job: Job) -> None:
        """Forward what is left in the pipes of a job that has ended."""
        for stream, descriptor in list(job.outputs.items()):
            os.set_blocking(descriptor, False)
            try:
                while data := os.read(descriptor, CHUNK):
                    self.send(id=identity, **{stream: base64.b64encode(data).decode()})
            except OSError:
                pass  # empty, or held open by a program left in the background
            self.selector.unregister(descriptor)
            os.close(descriptor)
        job.close_input()

    def reap(self) -> None:
        """Report the jobs that have ended."""
        for identity, job in list(self.jobs.items()):
            status = job.process.poll()
            if status is not None:
                self.drain(identity, job)
                del self.jobs[identity]
                self.send(id=identity, exit=status)

    def open_anew(self) -> None:
        """Probe the device anew and open its port: the old one is dead after a suspension."""
        self.selector.unregister(self.port)
        os.close(self.port)
        (port,) = found_ports()
        device = (port / "device").resolve()
        driver = (device / "driver").resolve()
        for change in ("unbind", "bind"):
            (driver / change).write_text(device.name)
        self.port = open_port()
        self.selector.register(self.port, selectors.EVENT_READ, None)

    def serve(self) -> None:
        """Handle requests and output until the host closes the port."""
        wake, woken = os.pipe()
        os.set_blocking(woken, False)
        signal.set_wakeup_fd(woken)
        signal.signal(signal.SIGCHLD, lambda *_: None)
        self.selector.register(self.port, selectors.EVENT_READ, None)
        self.selector.register(wake, selectors.EVENT_READ, None)
        self.send(ready=os.uname().release)
        pending = b""
        suspended = suspended_seconds()
        while True:
            waiting = any(job.pending or job.eof for job in self.jobs.values())
            ready = self.selector.select(timeout=0.02 if waiting else 1)
            if suspended_seconds() - suspended > SUSPENDED:
                suspended = suspended_seconds()
                self.open_anew()
                continue
            for key, _ in ready:
                if key.fd == self.port:
                    data = os.read(self.port, CHUNK)
                    if not data:
                        return
                    *lines, pending = (pending + data).split(b"\n")
                    for line in lines:
                        self.handle(json.loads(line))
                elif key.fd == wake:
                    os.read(wake, CHUNK)
                else:
                    identity, stream = key.data
                    self.pump(identity, stream, key.fd)
            for job in self.jobs.values():
                if job.input >= 0 and (job.pending or job.eof):
                    job.feed()
            self.reap()


def suspended_seconds() -> float:
    """Return how long this machine was suspended since it booted."""
    return time.clock_gettime(time.CLOCK_BOOTTIME) - time.monotonic()


def found_ports() -> list[Path]:
    """Find the port to the host by its name, as its number differs by machine."""
    names = Path("/sys/class/virtio-ports").glob("*/name")
    return [name.parent for name in names if name.read_text().strip() == PORT_NAME]


def open_port() -> int:
    """Open the port to the host, once it is there."""
    deadline = time.monotonic() + 30
    while time.monotonic() < deadline:
        for port in found_ports():
            return os.open(f"/dev/{port.name}", os.O_RDWR)
        time.sleep(0.05)
    sys.exit("agent: no port to the host")


def main() -> None:
    """Serve in a child; process 1 reaps orphans and powers off when the child ends."""
    child = os.fork()
    if child == 0:
        os.setsid()
        Agent(open_port()).serve()
        return
    while os.wait()[0] != child:
        pass
    os.sync()
    Path("/proc/sysrq-trigger").write_text("o")
    time.sleep(60)


if __name__ == "__main__":
    main()
