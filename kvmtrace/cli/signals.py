"""SIGINT, SIGTERM and SIGHUP as a flag, and reads and writes that they interrupt."""

from __future__ import annotations

import contextlib
import os
import select
import signal
from collections.abc import Callable, Iterator
from types import FrameType
from typing import IO, Any

from kvmtrace.cli.watchdog import Watchdog


class Interrupted(BaseException):
    """A signal arrived during a read or write that blocks."""


class _Stop:
    """SIGINT, SIGTERM and SIGHUP as a flag that loops check, so that probes are always detached.

    An exception at any point could hit a half-attached source or a C callback. Reads and writes of
    files do raise one (``waiting``): the process at the other end could block them for ever.

    ``requested``: a signal came. ``clean_up``: what to call if the command is ended by force.
    ``hung``: a thread was left in the kernel, and Python's own exit could wait for it.
    ``detaching``: probes are being detached. ``owns_process``: only this command runs in the
    process (tests run several), so it may give up privileges for good.
    """

    def __init__(self) -> None:
        self.requested = self.detaching = self._was_received = False
        self._wakeup = -1
        self.hung = False
        self.owns_process = False
        self.clean_up: list[Callable[[], object]] = []
        self._watchdog: Watchdog | None = None
        self._blocked: Callable[[], bool] | None = None
        self._previous: dict[int, Any] = {}

    def __enter__(self) -> None:
        self.requested = self.detaching = self._was_received = False
        self.clean_up.clear()
        with contextlib.suppress(ValueError):  # not the main thread (tests)
            for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
                if number == signal.SIGHUP and signal.getsignal(number) == signal.SIG_IGN:
                    continue  # nohup
                self._previous[number] = signal.signal(number, self._handle)
        if self._previous:
            # No handler runs while the main thread computes, but this byte is written.
            self._wakeup, written = os.pipe2(os.O_NONBLOCK | os.O_CLOEXEC)
            signal.set_wakeup_fd(written, warn_on_full_buffer=False)
            self._watch()

    def _watch(self) -> None:
        self._watchdog = Watchdog(
            self._previous, self._is_requested, self.clean_up, lambda: self.detaching
        )

    def restart_watchdog(self) -> None:
        """Have another thread watch, with the privileges that the calling thread has now."""
        if self._watchdog is not None:
            self._watchdog.stop()
            self._watch()

    def __exit__(self, *_: object) -> None:
        if self._watchdog is not None:
            self._watchdog.stop()
            self._watchdog = None
            for descriptor in (self._wakeup, signal.set_wakeup_fd(-1)):
                with contextlib.suppress(OSError):  # asyncio has replaced and closed it
                    os.close(descriptor)
        for number, previous in self._previous.items():
            signal.signal(number, previous)
        self._previous.clear()

    def _is_requested(self) -> bool:
        with contextlib.suppress(BlockingIOError):
            self._was_received |= any(
                number in self._previous for number in os.read(self._wakeup, 512)
            )
        return self.requested or self._was_received

    def _handle(self, _number: int, _frame: FrameType | None) -> None:
        self.requested = True
        if self._blocked is not None and self._blocked():
            raise Interrupted

    @contextlib.contextmanager
    def waiting(self, blocked: Callable[[], bool]) -> Iterator[None]:
        """Inside, a signal raises ``Interrupted`` if ``blocked()``; else it only sets the flag."""
        self._blocked = blocked
        try:
            if self.requested and blocked():
                raise Interrupted
            yield
        finally:
            self._blocked = None

    def write(self, text: str, file: IO[str]) -> None:
        """Print a line and flush it. A signal interrupts it if nobody reads.

        After a signal, further lines are still printed as long as somebody reads.
        """
        with self.waiting(lambda: nobody_reads(file)):
            file.write(text + "\n")
            file.flush()


def always() -> bool:
    """For ``stop.waiting``: interrupt at any point, for instance while a pipe is opened."""
    return True


def nobody_reads(file: IO[Any]) -> bool:
    """Whether a write would still block after a second."""
    return not _ready(file, select.POLLOUT, 1000)


def nobody_writes(file: IO[Any]) -> bool:
    """Whether a read would block now."""
    return not _ready(file, select.POLLIN, 0)


def _ready(file: IO[Any], what: int, milliseconds: int) -> bool:
    try:
        poller = select.poll()
        poller.register(file.fileno(), what)
        return bool(poller.poll(milliseconds))
    except (OSError, ValueError):
        return True  # not a file (tests)


stop = _Stop()
