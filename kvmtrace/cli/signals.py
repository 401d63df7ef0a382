"""Signals as a flag, and writes and reads that they end."""

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
    """A signal arrived while we were blocked in a write."""


class _Stop:
    """SIGINT, SIGTERM and SIGHUP as a flag that loops look at, so that probes are always detached.

    An exception out of nowhere could hit a half-attached source or a C callback. Reading and
    writing files is different (``waiting``): who is at the other end could keep us for ever.

    ``clean_up``: what to call if the command has to be ended by force. ``hung``: a thread was left
    in the kernel; Python's own way out could wait for it. ``detaching``: probes are being detached.
    ``owns_process``: nothing but this command runs in it (tests run several), so it may give up
    for good what it needs no more.
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
            # While the main thread computes no handler runs; a byte is written all the same.
            self._wakeup, written = os.pipe2(os.O_NONBLOCK | os.O_CLOEXEC)
            signal.set_wakeup_fd(written, warn_on_full_buffer=False)
            self._watch()

    def _watch(self) -> None:
        self._watchdog = Watchdog(
            self._previous, self._is_requested, self.clean_up, lambda: self.detaching
        )

    def watch_anew(self) -> None:
        """By another thread, which has the privileges that the calling one has now."""
        if self._watchdog is not None:
            self._watchdog.stop()
            self._watch()

    def __exit__(self, *_: object) -> None:
        if self._watchdog is not None:
            self._watchdog.stop()
            self._watchdog = None
            for descriptor in (self._wakeup, signal.set_wakeup_fd(-1)):
                with contextlib.suppress(OSError):  # none any more: asyncio has taken its place
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
        """In here, a signal raises ``Interrupted`` if ``blocked()``; else it is only a flag."""
        self._blocked = blocked
        try:
            if self.requested and blocked():
                raise Interrupted
            yield
        finally:
            self._blocked = None

    def write(self, text: str, file: IO[str]) -> None:
        """Print a line and flush it; a signal ends it even if nobody reads.

        After a signal, the last lines still go out as long as somebody does.
        """
        with self.waiting(lambda: nobody_reads(file)):
            file.write(text + "\n")
            file.flush()


def always() -> bool:
    """For ``stop.waiting``, of what is over at once or not for a long time (opening a pipe)."""
    return True


def nobody_reads(file: IO[Any]) -> bool:
    """Whether there is no room to write, nor any within a second."""
    return not _ready(file, select.POLLOUT, 1000)


def nobody_writes(file: IO[Any]) -> bool:
    """Whether there is nothing to read now."""
    return not _ready(file, select.POLLIN, 0)


def _ready(file: IO[Any], what: int, milliseconds: int) -> bool:
    try:
        poller = select.poll()
        poller.register(file.fileno(), what)
        return bool(poller.poll(milliseconds))
    except (OSError, ValueError):
        return True  # not a file (tests)


stop = _Stop()
