"""The program that ``serve`` runs when an incident changes, in a queue and a thread of its own.

Whatever it does (hang, fail, print without end, not read) holds up nothing but the queue, which is
bounded. It has no capabilities, and a session of its own, which is killed when its time is over.
"""

from __future__ import annotations

import contextlib
import os
import queue
import selectors
import shlex
import signal
import stat
import subprocess
import threading
import time
from collections import deque
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field

import click

from kvmtrace.cli.signals import stop
from kvmtrace.linux import privileges
from kvmtrace.linux.writers import others_may_write
from kvmtrace.sanitize import clean

QUEUE = 64
"""So many changes wait at most; further ones are counted and left out."""

# Seconds. The first two are together below the watchdog's limit for the thread that ends.
_GRACE = 1.0
_AFTER_KILL = 1.0
_LOOK = 0.25
_SAY_DROPPED = 10.0

_CHUNK = 1 << 16
_MAX_OUTPUT = 1 << 20
_TAIL = 4096
_LINE = 512
# Programs that not even SIGKILL ended: with so many, no further one is run.
_MAX_LEFT = 4
# What a program needs of the service's environment. NOTIFY_SOCKET, for instance, is not for it.
_PASSED_ON = ("PATH", "HOME", "LANG", "LC_ALL", "TZ")


def program(value: str | tuple[str, ...]) -> tuple[str, ...]:
    """A program with its arguments, as a shell reads them: ``/usr/local/bin/page --team memory``.

    Raises click.BadParameter, also if it cannot be run, or others than root may replace it.
    """
    if isinstance(value, tuple):
        return value
    try:
        words = tuple(shlex.split(value))
    except ValueError as error:
        raise click.BadParameter(f"{value!r}: {error}") from None
    if not words or not os.path.isabs(words[0]):
        raise click.BadParameter(f"{value!r} does not begin with the full path of a program")
    path = words[0]
    try:
        mode = os.stat(path).st_mode
        if not stat.S_ISREG(mode) or not mode & 0o111:
            raise click.BadParameter(f"{path} is not an executable file (chmod +x)")
        if os.geteuid() == 0 and (part := others_may_write(path)) is not None:
            raise click.BadParameter(f"{path}: others than root may write to {part}")
    except OSError as error:
        raise click.BadParameter(f"{path}: {error.strerror}") from None
    return words


@dataclass(frozen=True, slots=True)
class HookRun:
    """What a program gets: bytes on stdin, and variables. ``about``: for the log."""

    about: str
    stdin: bytes
    variables: Mapping[str, str] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class HookNote:
    """A line for the log: what went wrong with a run."""

    about: str
    text: str


@contextlib.contextmanager
def open_hooks(command: tuple[str, ...] | None, seconds: float) -> Iterator[Hooks | None]:
    """Hooks that are closed on every way out; None without a command."""
    if command is None:
        yield None
        return
    hooks = Hooks(command, seconds)
    stop.clean_up.insert(0, hooks.abandon)  # the last to be called: detaching is more urgent
    try:
        yield hooks
    finally:
        hooks.close()


class Hooks:
    """Runs ``command`` for each change, one after the other, for ``seconds`` each at most.

    ``counts``: runs by how they ended ("ok", "failed", "timeout"), and changes left out
    ("dropped"). ``add`` and ``notes`` are called from one thread; they never wait.
    """

    def __init__(self, command: tuple[str, ...], seconds: float) -> None:
        self._command, self._seconds = command, seconds
        self._queue: queue.Queue[HookRun | None] = queue.Queue(QUEUE)
        self._notes: deque[HookNote] = deque(maxlen=QUEUE)
        self._left: list[subprocess.Popen[bytes]] = []
        self._ending = self._closed = False
        self._said, self._say_next = 0, 0.0
        self.counts = {"ok": 0, "failed": 0, "timeout": 0, "dropped": 0}
        self._thread = threading.Thread(target=self._work, name="kvmtrace-hooks", daemon=True)

    def start(self) -> None:
        """Begin to run programs, with no more than the privileges of the calling thread."""
        self._thread.start()

    def add(self, run: HookRun) -> None:
        """Run the program for a change, after those that wait; count the change if too many do."""
        try:
            self._queue.put_nowait(run)
        except queue.Full:
            self.counts["dropped"] += 1

    def notes(self) -> Iterator[HookNote]:
        """What went wrong since the last call."""
        while self._notes:
            yield self._notes.popleft()
        now, dropped = time.monotonic(), self.counts["dropped"]
        if dropped > self._said and (now >= self._say_next or self._closed):
            left_out, self._said, self._say_next = dropped - self._said, dropped, now + _SAY_DROPPED
            why = "kvmtrace ends" if self._closed else f"{QUEUE} were waiting already"
            yield HookNote("", f"not run for {left_out} changes of incidents: {why}")

    def close(self) -> None:
        """End within seconds: what does not run by then is left out, and counted."""
        if self._closed:
            return
        self._closed = True
        with contextlib.suppress(queue.Full):
            self._queue.put_nowait(None)
        is_started = self._thread.ident is not None
        if is_started:
            self._thread.join(_GRACE)
        self._ending = True
        with contextlib.suppress(queue.Empty):
            while True:
                self.counts["dropped"] += self._queue.get_nowait() is not None
        self._queue.put(None)
        if is_started:
            self._thread.join(_LOOK + _AFTER_KILL)

    def abandon(self) -> None:
        """Have a program that runs killed, and run no other: the command ends by force."""
        self._closed = self._ending = True
        if self._thread.ident is not None:
            self._thread.join(2 * _LOOK)

    def _work(self) -> None:
        if stop.owns_process:
            # Of this thread, and so of all programs: they need none of kvmtrace's privileges.
            for refused in privileges.give_up(()):
                self._notes.append(HookNote("", f"cannot give up privileges: {refused}"))
        while (run := self._queue.get()) is not None:
            if self._ending:
                self.counts["dropped"] += 1
                continue
            self._left = [one for one in self._left if one.poll() is None]
            if len(self._left) >= _MAX_LEFT:
                self._note("failed", run, f"not run: {_MAX_LEFT} earlier ones cannot be killed")
                continue
            try:
                result, why = self._run(run)
            except OSError as error:
                result, why = "failed", f"cannot be run: {error.strerror}"
            except Exception as error:  # the next change may fare better
                result, why = "failed", f"cannot be run: {type(error).__name__}: {error}"
            self._note(result, run, why)

    def _note(self, result: str, run: HookRun, why: str) -> None:
        self.counts[result] += 1
        if why:
            self._notes.append(HookNote(run.about, clean(why, 2 * _LINE)))

    def _run(self, run: HookRun) -> tuple[str, str]:
        """How a program ended, and why that is worth a line. Raises OSError."""
        environment = {name: os.environ[name] for name in _PASSED_ON if name in os.environ}
        process = subprocess.Popen(
            self._command,
            stdin=subprocess.PIPE,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.PIPE,
            bufsize=0,
            cwd="/",
            env=environment | dict(run.variables),
            start_new_session=True,
            # Has Python fork. By vfork it would hold its lock, and with it all threads, until the
            # program is loaded, which takes for ever from a file system that does not answer.
            group=os.getegid(),
        )
        output = _Output()
        try:
            ended = self._talk(process, run.stdin, output)
        finally:
            # Before the program is waited for: until then, its group's number is nobody else's.
            with contextlib.suppress(ProcessLookupError, PermissionError):
                os.killpg(process.pid, signal.SIGKILL)
            for pipe in (process.stdin, process.stderr):
                if pipe is not None:
                    pipe.close()
        with contextlib.suppress(subprocess.TimeoutExpired):
            process.wait(_AFTER_KILL)
        if process.returncode is None:
            self._left.append(process)
            return "timeout", f"took longer than {self._seconds:g} s and cannot be killed"
        if not ended:
            if self._ending:
                return "failed", "was killed: kvmtrace ends"
            limit = f"took longer than {self._seconds:g} s"
            return "timeout", f"{limit} and was killed{output.last_line()}"
        if process.returncode == 0:
            return "ok", ""
        return "failed", f"{_ending(process.returncode)}{output.last_line()}"

    def _talk(self, process: subprocess.Popen[bytes], data: bytes, output: _Output) -> bool:
        """Write ``data``, read what the program complains of; whether it ended in time."""
        end = time.monotonic() + self._seconds
        assert process.stdin is not None
        assert process.stderr is not None
        stdin, stderr = process.stdin.fileno(), process.stderr.fileno()
        os.set_blocking(stdin, False)
        os.set_blocking(stderr, False)
        ends = os.pidfd_open(process.pid)
        try:
            with selectors.DefaultSelector() as selector:
                selector.register(ends, selectors.EVENT_READ)
                selector.register(stderr, selectors.EVENT_READ)
                selector.register(stdin, selectors.EVENT_WRITE)
                while not self._ending and (left := end - time.monotonic()) > 0:
                    ready = {key.fd for key, _ in selector.select(min(left, _LOOK))}
                    if stdin in ready and not (data := _write(stdin, data)):
                        selector.unregister(stdin)
                        process.stdin.close()
                    if stderr in ready and not output.read(stderr):
                        selector.unregister(stderr)
                        process.stderr.close()
                    if ends in ready:
                        if not process.stderr.closed:
                            output.read(stderr)  # what came while the others were looked at
                        return True
        finally:
            os.close(ends)
        return False


class _Output:
    """The end of what a program prints on stderr."""

    def __init__(self) -> None:
        self._tail, self._size = b"", 0

    def read(self, descriptor: int) -> bool:
        """Read what there is now; whether more is wanted."""
        try:
            while data := os.read(descriptor, _CHUNK):
                self._tail = (self._tail + data)[-_TAIL:]
                self._size += len(data)
                if self._size >= _MAX_OUTPUT:
                    return False
        except BlockingIOError:
            return True
        return False

    def last_line(self) -> str:
        """``: LINE``, fit for a log; empty if there is none."""
        lines = self._tail.decode(errors="replace").strip().split("\n")
        line = clean(lines[-1], _LINE)
        return f": {line}" if line else ""


def _write(descriptor: int, data: bytes) -> bytes:
    """Write what the program takes now; the rest. Nothing is left if it does not read."""
    try:
        return data[os.write(descriptor, data[:_CHUNK]) :]
    except BlockingIOError:
        return data
    except OSError:  # it has closed its stdin
        return b""


def _ending(status: int) -> str:
    if status > 0:
        return f"ended with status {status}"
    with contextlib.suppress(ValueError):
        return f"was ended by {signal.Signals(-status).name}"
    return f"was ended by signal {-status}"
