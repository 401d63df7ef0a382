"""Reads of other processes that may be given up on: nothing a VMM does can stop the reader.

A process can make readers of its /proc/PID/cmdline, maps or pagemap wait for ever: it lets a
page fault on its own FUSE file go unanswered while another of its threads waits for mmap_lock.
Such reads are done by worker processes (``proc_worker``). One that does not answer in time is
killed and replaced; where even that does not end it (the kernel waits for a FUSE server), it is
left behind, up to ``MAX_WORKERS`` of all. The process whose read hung is left alone for a while,
longer each time, and what is waited for hanging reads is bounded for all processes together.
"""

from __future__ import annotations

import contextlib
import subprocess
import sys
import threading
import time
from collections import OrderedDict
from collections.abc import Callable, Iterator
from multiprocessing import Pipe
from typing import Any

from kvmtrace.linux import proc_worker

TIMEOUT = 1.0
"""Seconds after which a read hangs if its process sleeps. One that only waits for a CPU is slow."""
SLOW_SECONDS = 10.0
STALL_SECONDS = 2.0
"""Likewise for a generator that says nothing; at work it speaks many times a second."""
START_SECONDS = 30.0
"""A worker's start depends on nobody but this host."""

WAIT_SECONDS, WINDOW_SECONDS = 2.0, 10.0
"""So long may be waited in vain in any window of so long, and then as long again in short waits:
who hangs must not keep others from being read."""
SHORT_TIMEOUT = 0.05
RETRY_SECONDS, MAX_RETRY_SECONDS = 10.0, 600.0
MAX_WORKERS = 16
SPARE = 2
"""So many are kept: when one hangs, the next read need not wait for a start."""
_LOOK_SECONDS = 0.1
_MAX_HUNG = 4096
_PRELOADED = ("kvmtrace.vmm.processes", "kvmtrace.enrich.page_tables", "kvmtrace.enrich.vcpu_state")


class Unreadable(Exception):
    """A process could not be read; the text says why, in words for people."""


class Starting(Unreadable):
    """The process that reads /proc has not started yet: try again."""


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
                start_new_session=True,  # the terminal's Ctrl-C is not for it
            )
        except OSError:
            self._pipe.close()
            raise
        finally:
            theirs.close()
        self._started = time.monotonic()
        self._ready = False

    def send(self, function: Callable[..., object], arguments: tuple[object, ...]) -> None:
        """Call ``function`` there. Raises OSError if the worker has ended."""
        self._pipe.send((function, arguments))

    def receive(self, timeout: float) -> tuple[str, Any] | None:
        """Its next message; None if there is none within ``timeout`` seconds.

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
        """Whether it has started; waits up to ``timeout`` seconds, or until it should have."""
        if not self._ready:
            left = self._started + START_SECONDS - time.monotonic()
            self._ready = self.receive(max(0.0, min(timeout, left))) is not None
            if not self._ready and left <= 0:
                raise EOFError
        return self._ready

    def answer(self, timeout: float) -> tuple[str, Any] | None:
        """As ``receive``, with more time for a worker that is at work or waits for a CPU."""
        answer = self.receive(timeout)
        until = time.monotonic() + SLOW_SECONDS
        while answer is None and time.monotonic() < until and not self.sleeps():
            answer = self.receive(_LOOK_SECONDS)
        return answer

    def sleeps(self) -> bool:
        """Whether it waits for something, and did so since a moment ago."""
        before = self._state()
        if before[0] not in "SD" or self._pipe.poll(_LOOK_SECONDS):
            return False
        return self._state() == before

    def _state(self) -> tuple[str, ...]:
        """State letter and CPU time (proc(5), stat); it takes no lock of the worker's memory."""
        try:
            with open(f"/proc/{self.process.pid}/stat", "rb") as file:
                fields = file.read().rpartition(b")")[2].decode().split()
        except OSError:
            return ("Z",)
        return (fields[0], *fields[11:13])

    def end(self) -> None:
        """Kill it, without waiting for that."""
        self._pipe.close()
        self.process.kill()


class ProcReader:
    """Calls functions in worker processes. All methods may be called from any thread.

    ``now``: monotonic seconds.
    """

    def __init__(self, now: Callable[[], float] = time.monotonic) -> None:
        self._now = now
        self._lock = threading.Lock()
        self._idle: list[_Worker] = []
        self._killed: list[_Worker] = []
        self._busy: set[_Worker] = set()
        self._ending = 0
        self._started = False  # a worker ever was ready
        # By pid: not to be read before (monotonic seconds), and the pause after that.
        self._hung: OrderedDict[int, tuple[float, float]] = OrderedDict()
        self._waits: list[tuple[float, float]] = []  # when, and for how long in vain
        self.hangs = 0
        """Reads that were given up on, ever."""

    # -- one read

    def call(self, pid: int, function: Callable[..., Any], *arguments: object) -> Any:
        """``function(*arguments)``, which reads process ``pid``.

        Raises Unreadable where that takes too long, failed, or hung a short while ago.
        """
        if self.hung_lately(pid):
            raise Unreadable(_did_not_answer(pid))
        if self._waited_in_vain() >= 2 * WAIT_SECONDS:
            raise Unreadable("reads of other processes hang: tried again in some seconds")
        timeout = max(SHORT_TIMEOUT, min(TIMEOUT, WAIT_SECONDS - self._waited_in_vain()))
        worker = self._take(timeout if self.hangs else START_SECONDS)
        try:
            worker.send(function, arguments)
            begun = time.monotonic()
            answer = worker.answer(timeout)
        except (EOFError, OSError) as error:
            self._drop(worker)
            raise Unreadable("the process that reads /proc has ended") from error
        except BaseException:  # Ctrl-C: the answer would be taken for the next one's
            self._drop(worker)
            raise
        if answer is None:
            self._drop(worker)
            raise self.hung(pid, time.monotonic() - begun)
        self._give_back(worker)
        with self._lock:
            self._hung.pop(pid, None)
        kind, result = answer
        if kind == proc_worker.ERROR:
            raise Unreadable(result)
        return result

    def hung_lately(self, pid: int) -> bool:
        """Whether a read of this process hung a short while ago: it is not tried again yet."""
        with self._lock:
            until, _ = self._hung.get(pid, (0.0, 0.0))
        return self._now() < until

    def hung(self, pid: int, waited: float = 0.0) -> Unreadable:
        """Note that a read of ``pid`` was given up; the error to raise.

        ``waited``: seconds in which the caller did nothing else.
        """
        now = self._now()
        with self._lock:
            self.hangs += 1
            _, pause = self._hung.pop(pid, (0.0, RETRY_SECONDS))
            self._hung[pid] = now + pause, min(2 * pause, MAX_RETRY_SECONDS)
            while len(self._hung) > _MAX_HUNG:
                self._hung.popitem(last=False)
            if waited:
                self._waits.append((now, waited))
        return Unreadable(_did_not_answer(pid))

    def _waited_in_vain(self) -> float:
        """Seconds, within the window."""
        now = self._now()
        with self._lock:
            self._waits = [one for one in self._waits if now - one[0] < WINDOW_SECONDS]
            return sum(seconds for _, seconds in self._waits)

    # -- many reads

    def stream(
        self, deadline: float, function: Callable[..., Iterator[Any]], *arguments: object
    ) -> Stream:
        """What a generator yields there.

        Raises Starting if no worker is ready until ``deadline`` (monotonic seconds), Unreadable
        where none is to be had. The first one of all is waited for.
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
        """Start workers while the caller does something else."""
        with self._lock:
            self._keep_spare()

    def _keep_spare(self) -> None:
        """With the lock held."""
        while len(self._idle) + len(self._busy) < SPARE and (worker := self._spawn()) is not None:
            self._idle.append(worker)

    def _spawn(self) -> _Worker | None:
        """A new worker, if there may be another one; with the lock held."""
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
            # The one that was started first is ready first.
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
        """This one hangs or has ended; the next is made ready meanwhile."""
        worker.end()
        with self._lock:
            self._busy.discard(worker)
            self._killed.append(worker)
            if not self._ending:
                self._keep_spare()

    @contextlib.contextmanager
    def ending(self) -> Iterator[None]:
        """In here nothing is read; another thread that waits for a worker comes back at once."""
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
        """End the workers that do nothing; those that hang end with this process."""
        with self._lock:
            idle, self._idle = self._idle, []
        for worker in idle:
            worker.end()
            worker.process.wait()


class Stream:
    """A generator that runs in a worker. ``done``: it has ended, or is not listened to any more.

    Raises Unreadable where it failed.
    """

    def __init__(self, reader: ProcReader, worker: _Worker) -> None:
        self._reader = reader
        self._worker: _Worker | None = worker
        self._heard = time.monotonic()
        self.done = False

    def next(self, deadline: float) -> tuple[bool, Any]:
        """(whether there was one, the next item), waiting until ``deadline`` (monotonic seconds).

        None is an item too: it says that the work goes on.
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
        self._heard = time.monotonic()
        kind, what = message
        if kind == proc_worker.ITEM:
            return True, what
        self.done = True
        worker, self._worker = self._worker, None
        self._reader._give_back(worker)
        if kind == proc_worker.ERROR:
            raise Unreadable(what)
        return False, None

    @property
    def stalled(self) -> bool:
        """It hangs; to be asked after ``next`` found nothing."""
        if self._worker is None or time.monotonic() - self._heard < STALL_SECONDS:
            return False
        return self.sleeps or time.monotonic() - self._heard >= SLOW_SECONDS

    @property
    def sleeps(self) -> bool:
        """Whether its worker waits for something."""
        return self._worker is not None and self._worker.sleeps()

    def close(self) -> None:
        """Give up on it."""
        self.done = True
        worker, self._worker = self._worker, None
        if worker is not None:
            self._reader._drop(worker)


def _did_not_answer(pid: int) -> str:
    return f"/proc/{pid} did not answer in time"


READER = ProcReader()
"""The one of this process: what hangs is known to all who ask."""
