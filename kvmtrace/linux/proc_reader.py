"""Read other processes with a time limit, so that no VMM can stop kvmtrace.

A process can make a read of its /proc/PID/cmdline, maps or pagemap wait forever: it does not handle
a page fault on its own FUSE file while another of its threads waits for mmap_lock. Worker processes
(``proc_worker``) do such reads. A worker without a result in time is killed and replaced. If even
the kill does not end it (the kernel waits for a FUSE server), it is left behind, up to
``MAX_WORKERS`` in all. The process whose read hung is not read for a while, longer each time. The
time that is spent waiting for hung reads is bounded for all processes together.
"""

from __future__ import annotations

import contextlib
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from multiprocessing import Pipe
from typing import Any

from kvmtrace.bounded import BoundedDict
from kvmtrace.linux import proc_worker, task_stat

TIMEOUT = 1.0
"""Seconds after which a read counts as hung if its worker sleeps; without a CPU it is only slow."""
SLOW_SECONDS = 10.0
STALL_SECONDS = 2.0
"""The same for a generator without an item; at work it sends several a second."""
START_SECONDS = 30.0
"""For a worker's start, which depends on this host alone."""

WAIT_SECONDS, WINDOW_SECONDS = 2.0, 10.0
"""Limit of the time spent in hung reads in any window, and then as much again in short waits: a
process that hangs must not keep others from being read."""
SHORT_TIMEOUT = 0.05
RETRY_SECONDS, MAX_RETRY_SECONDS = 10.0, 600.0
MAX_WORKERS = 16
SPARE = 2
"""Workers that are kept, so that after a hung read the next one need not wait for a start."""
_CHECK_SECONDS = 0.1
_MAX_HUNG = 4096
_PRELOADED = ("kvmtrace.vmm.processes", "kvmtrace.enrich.page_tables", "kvmtrace.enrich.vcpu_state")


class Unreadable(Exception):
    """A process could not be read; the text gives the reason for the user."""


class Starting(Unreadable):
    """The worker that reads /proc has not started yet: try again."""


class _Worker:
    """One worker process and the pipe to it. ``receive`` is for one thread at a time."""

    def __init__(self) -> None:
        self._pipe, theirs = Pipe()
        code = (
            "import sys; sys.path[:] = sys.argv[2:]\n"
            f"import {', '.join(_PRELOADED)}\n"
            "from kvmtrace.linux.proc_worker import main; main(int(sys.argv[1]))"
        )
        try:
            self.process = subprocess.Popen(
                [sys.executable, "-S", "-c", code, str(theirs.fileno()), *sys.path],
                pass_fds=[theirs.fileno()],
                stdin=subprocess.DEVNULL,
                stdout=subprocess.DEVNULL,
                stderr=subprocess.DEVNULL,
                start_new_session=True,  # not stopped by the terminal's Ctrl-C
            )
        except OSError:
            self._pipe.close()
            raise
        finally:
            theirs.close()
        self._started = time.monotonic()
        self._ready = False

    def send(self, function: Callable[..., object], arguments: tuple[object, ...]) -> None:
        """Call ``function`` in the worker. Raises OSError if the worker has ended."""
        self._pipe.send((function, arguments))

    def receive(self, timeout: float) -> tuple[str, Any] | None:
        """Return the next message; None if there is none within ``timeout`` seconds.

        Raises EOFError or OSError if it has ended.
        """
        if not self._pipe.poll(timeout):
            return None
        message: tuple[str, Any] = self._pipe.recv()
        return message

    @property
    def is_known_ready(self) -> bool:
        return self._ready

    def is_ready(self, timeout: float) -> bool:
        """Wait up to ``timeout`` seconds, or ``START_SECONDS`` in all, for the start."""
        if not self._ready:
            left = self._started + START_SECONDS - time.monotonic()
            self._ready = self.receive(max(0.0, min(timeout, left))) is not None
            if not self._ready and left <= 0:
                raise EOFError
        return self._ready

    def result(self, timeout: float) -> tuple[str, Any] | None:
        """As ``receive``, with more time for a worker that computes or waits for a CPU."""
        result = self.receive(timeout)
        until = time.monotonic() + SLOW_SECONDS
        while result is None and time.monotonic() < until and not self.sleeps():
            result = self.receive(_CHECK_SECONDS)
        return result

    def sleeps(self) -> bool:
        """Whether it sleeps, without CPU time for a moment."""
        before = self._state()
        if before[0] not in "SD" or self._pipe.poll(_CHECK_SECONDS):
            return False
        return self._state() == before

    def _state(self) -> tuple[str, ...]:
        return task_stat.read_state(f"/proc/{self.process.pid}/stat", if_unreadable="Z")

    def end(self) -> None:
        """Kill it, without waiting."""
        self._pipe.close()
        self.process.kill()


class ProcReader:
    """Calls functions in worker processes. Methods may be called from any thread.

    ``now``: monotonic seconds.
    """

    def __init__(self, now: Callable[[], float] = time.monotonic) -> None:
        self._now = now
        self._lock = threading.Lock()
        self._idle: list[_Worker] = []
        self._killed: list[_Worker] = []
        self._busy: set[_Worker] = set()
        self._ending = 0
        self._started = False  # whether a worker was ever ready
        # By pid: when it may be read again (monotonic seconds), and the next pause.
        self._hung: BoundedDict[int, tuple[float, float]] = BoundedDict(_MAX_HUNG)
        self._waits: list[tuple[float, float]] = []  # hung reads: when, and seconds waited
        self.hangs = 0
        """Reads that were given up so far."""

    # -- one read

    def call(self, pid: int, function: Callable[..., Any], *arguments: object) -> Any:
        """Return ``function(*arguments)``, which reads process ``pid``, called in a worker.

        Raises Unreadable if that takes too long or fails, or if a read of ``pid`` hung lately.
        """
        if self.hung_lately(pid):
            raise Unreadable(_timed_out(pid))
        if self._time_in_hung_reads() >= 2 * WAIT_SECONDS:
            raise Unreadable("reads of other processes hang: tried again in some seconds")
        timeout = max(SHORT_TIMEOUT, min(TIMEOUT, WAIT_SECONDS - self._time_in_hung_reads()))
        worker = self._take(timeout if self.hangs else START_SECONDS)
        try:
            worker.send(function, arguments)
            begun = time.monotonic()
            message = worker.result(timeout)
        except (EOFError, OSError) as error:
            self._drop(worker)
            raise Unreadable("the process that reads /proc has ended") from error
        except BaseException:  # Ctrl-C: the next call would get this result
            self._drop(worker)
            raise
        if message is None:
            self._drop(worker)
            raise self.hung(pid, time.monotonic() - begun)
        self._give_back(worker)
        with self._lock:
            self._hung.pop(pid, None)
        kind, result = message
        if kind == proc_worker.ERROR:
            raise Unreadable(result)
        return result

    def hung_lately(self, pid: int) -> bool:
        """Whether a read of this process hung lately, so that it is not tried again yet."""
        with self._lock:
            until, _ = self._hung.get(pid, (0.0, 0.0))
        return self._now() < until

    def hung(self, pid: int, waited: float = 0.0) -> Unreadable:
        """Note that a read of ``pid`` was given up; return the error to raise.

        ``waited``: seconds that the caller spent on it.
        """
        now = self._now()
        with self._lock:
            self.hangs += 1
            _, pause = self._hung.pop(pid, (0.0, RETRY_SECONDS))
            self._hung[pid] = now + pause, min(2 * pause, MAX_RETRY_SECONDS)
            if waited:
                self._waits.append((now, waited))
        return Unreadable(_timed_out(pid))

    def _time_in_hung_reads(self) -> float:
        """Return the seconds that hung reads took within the window."""
        now = self._now()
        with self._lock:
            self._waits = [one for one in self._waits if now - one[0] < WINDOW_SECONDS]
            return sum(seconds for _, seconds in self._waits)

    # -- many reads

    def stream(
        self, deadline: float, function: Callable[..., Iterator[Any]], *arguments: object
    ) -> Stream:
        """Run a generator in a worker and return its items.

        Raises Starting if no worker is ready by ``deadline`` (monotonic seconds), Unreadable if
        there is none. Only the very first worker is waited for without that limit.
        """
        worker = self._take(deadline - time.monotonic() if self._started else START_SECONDS)
        try:
            worker.send(function, arguments)
        except OSError as error:
            self._drop(worker)
            raise Unreadable("the process that reads /proc has ended") from error
        return Stream(self, worker)

    # -- workers

    def prepare(self) -> None:
        """Start the spare workers, without waiting for them."""
        with self._lock:
            self._keep_spare()

    def _keep_spare(self) -> None:
        """Start workers until there are ``SPARE``; call it with the lock held."""
        while len(self._idle) + len(self._busy) < SPARE and (worker := self._spawn()) is not None:
            self._idle.append(worker)

    def _spawn(self) -> _Worker | None:
        """Start a worker, unless there are too many; call it with the lock held."""
        self._killed = [one for one in self._killed if one.process.poll() is None]
        if len(self._idle) + len(self._busy) + len(self._killed) >= MAX_WORKERS:
            return None
        try:
            return _Worker()
        except OSError:
            return None

    def _take(self, timeout: float) -> _Worker:
        with self._lock:
            if self._ending:
                raise Unreadable("kvmtrace is ending")
            # The oldest one is ready first.
            worker = self._idle.pop(0) if self._idle else self._spawn()
            if worker is None:
                raise Unreadable(f"{len(self._killed)} reads of other processes hang for good")
            self._busy.add(worker)
        try:
            ready = worker.is_ready(timeout)
        except (EOFError, OSError) as error:
            self._drop(worker)
            raise Unreadable("the process that reads /proc has ended") from error
        except BaseException:
            self._drop(worker)
            raise
        if not ready:
            self._give_back(worker)
            raise Starting("the process that reads /proc is starting")
        self._started = True
        return worker

    def _give_back(self, worker: _Worker) -> None:
        with self._lock:
            self._busy.discard(worker)
            # In front of those that are still starting.
            self._idle.insert(0 if worker.is_known_ready else len(self._idle), worker)

    def _drop(self, worker: _Worker) -> None:
        """Kill a worker that hangs or has ended, and start another."""
        worker.end()
        with self._lock:
            self._busy.discard(worker)
            self._killed.append(worker)
            if not self._ending:
                self._keep_spare()

    @contextlib.contextmanager
    def ending(self) -> Iterator[None]:
        """Within this context reads fail at once, those in other threads included."""
        with self._lock:
            self._ending += 1
            for worker in self._busy:
                worker.process.kill()
        try:
            yield
        finally:
            with self._lock:
                self._ending -= 1

    def close(self) -> None:
        """End idle workers; hung ones end with this process."""
        with self._lock:
            idle, self._idle = self._idle, []
        for worker in idle:
            worker.end()
            worker.process.wait()


class Stream:
    """The items of a generator that runs in a worker. ``done``: it has ended, or was closed."""

    def __init__(self, reader: ProcReader, worker: _Worker) -> None:
        self._reader = reader
        self._worker: _Worker | None = worker
        self._received = time.monotonic()
        self.done = False

    def next(self, deadline: float) -> tuple[bool, Any]:
        """Return (whether there is an item, the item); wait until ``deadline`` (monotonic seconds).

        An item may be None, which means only that the generator is at work. Raises Unreadable if
        the generator failed.
        """
        if self._worker is None:
            return False, None
        try:
            message = self._worker.receive(max(0.0, min(deadline - time.monotonic(), 3600.0)))
        except (EOFError, OSError) as error:
            self.close()
            raise Unreadable("the process that reads /proc has ended") from error
        if message is None:
            return False, None
        self._received = time.monotonic()
        kind, value = message
        if kind == proc_worker.ITEM:
            return True, value
        self.done = True
        worker, self._worker = self._worker, None
        self._reader._give_back(worker)
        if kind == proc_worker.ERROR:
            raise Unreadable(value)
        return False, None

    @property
    def stalled(self) -> bool:
        """Whether it hangs; to be read after ``next`` returned no item."""
        if self._worker is None or time.monotonic() - self._received < STALL_SECONDS:
            return False
        return self.sleeps or time.monotonic() - self._received >= SLOW_SECONDS

    @property
    def sleeps(self) -> bool:
        return self._worker is not None and self._worker.sleeps()

    def close(self) -> None:
        self.done = True
        worker, self._worker = self._worker, None
        if worker is not None:
            self._reader._drop(worker)


def _timed_out(pid: int) -> str:
    return f"/proc/{pid} did not answer in time"


READER = ProcReader()
"""The reader of this process: its callers share what is known of hung reads."""
