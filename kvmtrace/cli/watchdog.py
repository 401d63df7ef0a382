"""That a signal ends a command even if its main thread hangs in the kernel, or computes.

A read of another process can hang for as long as that process likes, and a signal handler of Python
runs only in the main thread, once it is back from the kernel. So a second thread looks whether a
signal waits, or was taken and not acted on, and ends the process.
"""

from __future__ import annotations

import contextlib
import os
import select
import signal
import threading
import time
from collections.abc import Callable, Iterable

from kvmtrace.linux.thread_progress import Standstill

# Seconds; LOOK, one of the next two and CLEAN_UP are less than 5 together. Only detaching may take
# longer, as long as it moves.
LOOK = 0.25
STUCK = 2.5
AWAKE = 3.0
CLEAN_UP = 1.25
MOVING = 30.0


class Watchdog:
    """Ends the process if its main thread does not end after one of ``signals``.

    Until ``stop`` is called.

    ``requested``: whether the main thread has taken a signal; ``detaching``: whether it detaches
    probes by now. ``clean_up``: what to call then, the last one first (detach probes, remove
    files), as far as that does not hang, too.
    """

    def __init__(
        self,
        signals: Iterable[int],
        requested: Callable[[], bool],
        clean_up: list[Callable[[], object]],
        detaching: Callable[[], bool] = lambda: False,
    ) -> None:
        self._signals = set(signals)
        self._requested = requested
        self._clean_up = clean_up
        self._detaching = detaching
        self._stopped = threading.Event()
        self._thread = threading.Thread(target=self._watch, name="kvmtrace-end", daemon=True)
        self._thread.start()

    def stop(self) -> None:
        """The main thread is on its way out."""
        self._stopped.set()
        self._thread.join()

    def _watch(self) -> None:
        # Blocked here, so that sigpending() shows what the main thread has not taken.
        signal.pthread_sigmask(signal.SIG_BLOCK, self._signals)
        while not (self._requested() or signal.sigpending() & self._signals):
            if self._stopped.wait(LOOK):
                return
        main = Standstill(threading.main_thread())
        end = time.monotonic() + MOVING
        while not (hangs := main.seconds() >= STUCK) and time.monotonic() < end:
            if main.awake >= AWAKE and not self._detaching():
                break
            if self._stopped.wait(LOOK):
                return
        why = "something hangs in the kernel" if hangs else "it was still at work"
        end_by_force(self._clean_up, why)


def end_by_force(clean_up: Iterable[Callable[[], object]], why: str) -> None:
    """Clean up for a while, then end the process without regard to its threads: status 1."""

    def work() -> None:
        for one in reversed(list(clean_up)):
            with contextlib.suppress(Exception):
                one()

    with contextlib.suppress(RuntimeError):  # no thread is to be had
        worker = threading.Thread(target=work, daemon=True)
        worker.start()
        worker.join(CLEAN_UP)
    with contextlib.suppress(OSError):
        poller = select.poll()
        poller.register(2, select.POLLOUT)
        if poller.poll(0):
            os.write(2, f"kvmtrace: ended by force: {why}\n".encode())
    os._exit(1)
