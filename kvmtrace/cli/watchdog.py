"""A thread that ends the command after a signal if the main thread hangs or computes.

A read of another process can hang as long as that process likes, and Python runs signal handlers
only in the main thread, once it is back from the kernel. So a second thread checks whether a signal
is pending, or was received and not acted on, and ends the process.
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

# Seconds; BUSY of CPU time. CHECK, CLEAN_UP and one of STUCK and BUSY are less than 5 together: the
# time within which a signal ends a command. It takes longer, up to DETACHING, on a host that leaves
# it no CPU, and while it detaches.
CHECK = 0.25
STUCK = 2.5
BUSY = 3.0
CLEAN_UP = 1.25
DETACHING = 30.0


class Watchdog:
    """Ends the process if the main thread goes on after one of ``signals``, until ``stop``.

    ``requested``: whether the main thread has received a signal. ``detaching``: whether it is
    detaching probes. ``clean_up``: what to call before the end, the last one first (detach probes,
    remove files); calls that hang are abandoned.
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
        """Stop watching: the main thread ends on its own."""
        self._stopped.set()
        self._thread.join()

    def _watch(self) -> None:
        # Blocked here, so that sigpending() shows signals that the main thread has not received.
        signal.pthread_sigmask(signal.SIG_BLOCK, self._signals)
        while not (self._requested() or signal.sigpending() & self._signals):
            if self._stopped.wait(CHECK):
                return
        main = Standstill(threading.main_thread())
        end = time.monotonic() + DETACHING
        while not (hangs := main.seconds() >= STUCK) and time.monotonic() < end:
            if main.computed >= BUSY and not self._detaching():
                break
            if self._stopped.wait(CHECK):
                return
        why = "something hangs in the kernel" if hangs else "it was still at work"
        end_by_force(self._clean_up, why)


def end_by_force(clean_up: Iterable[Callable[[], object]], why: str) -> None:
    """Clean up for ``CLEAN_UP`` seconds at most, then end the process with status 1."""

    def work() -> None:
        for one in reversed(list(clean_up)):
            with contextlib.suppress(Exception):
                one()

    with contextlib.suppress(RuntimeError):  # no thread can be started
        worker = threading.Thread(target=work, daemon=True)
        worker.start()
        worker.join(CLEAN_UP)
    with contextlib.suppress(OSError):
        poller = select.poll()
        poller.register(2, select.POLLOUT)
        if poller.poll(0):
            os.write(2, f"kvmtrace: ended by force: {why}\n".encode())
    os._exit(1)
