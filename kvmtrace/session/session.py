"""A session: one source, one correlator, and the snapshots that views draw."""

from __future__ import annotations

import dataclasses
import errno
import os
import threading
import time
from collections import deque

from kvmtrace import kvm
from kvmtrace.correlate import Correlator
from kvmtrace.events import Event, Host, Lost
from kvmtrace.linux import clock
from kvmtrace.linux.page_flags import hardware_corrupted_bytes
from kvmtrace.linux.proc_reader import READER
from kvmtrace.linux.thread_progress import Standstill
from kvmtrace.model import CorrelatedEvent, Snapshot
from kvmtrace.probes import Probe
from kvmtrace.session.history import CompactLog
from kvmtrace.session.subscriber import Subscriber
from kvmtrace.sources import Source

POLL_SECONDS = 0.25

# The correlator takes so many events before a snapshot may be taken: some milliseconds.
_SLICE = 256
_YIELD_SECONDS = 0.001

# Seconds that ``close`` waits for a reader that makes no progress, for any reader, and for the
# source. The first two are below the watchdog's limit for the thread that waits.
READER_SECONDS = 1.25
BUSY_SECONDS = 2.25
DETACH_SECONDS = 1.25

# Seconds without a file descriptor after which the reader fails.
SHORTAGE_SECONDS = 30.0


class Session:
    """Feeds a source's events to a correlator: ``pump`` here, or ``start`` in a thread of its own.

    One thread opens, polls and closes the source. ``snapshot``, ``recent``, ``age``, ``probes``,
    ``subscribe`` and ``unsubscribe`` may be called from any thread.
    """

    def __init__(
        self,
        source: Source,
        page_shift: int = kvm.PAGE_SHIFT,
        *,
        is_joined: bool = True,
        recent: int = 0,
    ) -> None:
        """``is_joined``: ``subscribe`` may be called, for which the events so far are kept.

        ``recent``: how many of the last events to keep for ``recent``.
        """
        self._source = source
        # A recording or a serve has its own clock, whose steps are among its events.
        self._steps = None if hasattr(source, "epoch_offset_ns") else clock.Steps()
        self._correlator = Correlator(page_shift=page_shift)
        self._log = CompactLog() if is_joined else None
        self._subscribers: list[Subscriber] = []
        self._lock = threading.Lock()  # of the log and the subscribers
        self._model_lock = threading.Lock()  # of the correlator, and of what comes from it
        self._asking: set[int] = set()  # threads that wait for a snapshot
        self._recent: deque[CorrelatedEvent] = deque(maxlen=recent)
        self._stop = threading.Event()
        self._thread: threading.Thread | None = None
        self._polled = time.monotonic()
        self.fed = 0
        """How many events came; a snapshot changes only with them."""
        self.rounds = 0
        """How often all events that there were have been correlated."""
        self.shortages = 0
        """How often the source found no file descriptor."""
        self.failure: BaseException | None = None
        """What ended the reader thread, if it was not ``close``."""
        self.left = ""
        """What the reader was doing when ``close`` gave up on it; empty if it ended."""

    def pump(self, timeout: float) -> list[CorrelatedEvent]:
        """Wait up to ``timeout`` seconds for events and correlate all there are."""
        events = self.poll(timeout)
        with self._lock:
            if self._log is not None:
                for event in events:
                    self._log.add(event)
            for subscriber in self._subscribers:
                subscriber.publish(events)
        correlated: list[CorrelatedEvent] = []
        for first in range(0, len(events), _SLICE):
            if self._asking and first:
                # A lock that is released and taken again at once goes to nobody else.
                time.sleep(_YIELD_SECONDS)
            with self._model_lock:
                feed = self._correlator.feed
                fed = [feed(event) for event in events[first : first + _SLICE]]
                self._recent.extend(fed)
                self.fed += len(fed)
            correlated += fed
        self.rounds += 1
        return correlated

    def recent(self) -> tuple[CorrelatedEvent, ...]:
        """Return the last events, oldest first, as many as the session was asked to keep."""
        with self._model_lock:
            return tuple(self._recent)

    def poll(self, timeout: float) -> list[Event]:
        """As ``Source.poll``, with steps of the wall clock; the events are not correlated.

        Without a free file descriptor, wait and count it as lost.
        """
        try:
            events = self._source.poll(timeout)
        except OSError as error:
            if error.errno not in (errno.EMFILE, errno.ENFILE) or self.age() > SHORTAGE_SECONDS:
                raise
            self.shortages += 1
            self._stop.wait(max(0.0, timeout))
            return [Lost(clock.now_ns(), "descriptors", 1)]
        self._polled = time.monotonic()
        step = self._steps.look() if self._steps else None
        return events if step is None else [step, *events]

    def age(self) -> float:
        """Return the seconds since the source was read last; raise what ended the reader.

        Takes no lock, so it returns even if the reader hangs.
        """
        self._check()
        return time.monotonic() - self._polled

    def subscribe(self) -> Subscriber:
        """Return the events so far, and those from now on."""
        assert self._log is not None, "made without is_joined"
        with self._lock:
            subscriber = Subscriber(self._log.events())
            self._subscribers.append(subscriber)
            return subscriber

    def unsubscribe(self, subscriber: Subscriber) -> None:
        with self._lock:
            self._subscribers.remove(subscriber)

    def now(self) -> int:
        """Return the time by the clock that stamps the source's events, in ns since the epoch.

        A running serve has its own clock, measured when it started. Steps of the wall clock do not
        change it (``Snapshot.wall``).
        """
        offset = getattr(self._source, "epoch_offset_ns", None)
        return clock.now_ns() if offset is None else time.monotonic_ns() + offset

    def host(self) -> Host:
        """Return this host, and the source that watches it."""
        return host_of(self._source)

    def probes(self) -> tuple[Probe, ...]:
        return self._source.probes()

    def start(self) -> None:
        """Run ``pump`` in a thread of its own until ``close``."""
        self._thread = threading.Thread(target=self._run, name="kvmtrace-reader", daemon=True)
        self._thread.start()

    def _run(self) -> None:
        try:
            while not self._stop.is_set():
                self.pump(POLL_SECONDS)
        except BaseException as failure:  # raised in callers of ``snapshot``
            self.failure = failure

    def snapshot(self) -> Snapshot:
        """Return the model, with host and probes; raise what ended the reader, if anything.

        The reader waits only while the correlator's part is taken, not for /proc or the kernel.
        What has changed is copied first, some of it at a time.
        """
        self._check()
        thread = threading.get_ident()
        self._asking.add(thread)
        try:
            with self._model_lock:
                parts = self._correlator.copying()
            for copy in parts:
                with self._model_lock:
                    copy()
                time.sleep(_YIELD_SECONDS)
            with self._model_lock:
                model = self._correlator.snapshot()
        finally:
            self._asking.discard(thread)
        history = getattr(self._source, "history", None)
        return dataclasses.replace(
            model,
            host=host_of(self._source),
            probes=self._source.probes(),
            probe_runs=self._source.probe_runs(),
            history=None if history is None else history(),
        )

    def _check(self) -> None:
        if self.failure is not None:
            # Its traceback would grow with every raise.
            raise self.failure.with_traceback(None)

    def close(self) -> bool:
        """Stop the thread and detach the source; return whether both ended.

        If the reader hangs, or computes for long, the source is closed without it, for a second at
        most.
        """
        self._stop.set()
        reader, self._thread = self._thread, None
        if reader is not None:
            standstill, end = Standstill(reader), time.monotonic() + BUSY_SECONDS
            with READER.ending():
                while not (hangs := standstill.seconds() >= READER_SECONDS):
                    reader.join(0.1)
                    if not reader.is_alive() or time.monotonic() >= end:
                        break
            if reader.is_alive():
                self.left = "hangs in the kernel" if hangs else "is still at work"
                detach = threading.Thread(target=self._source.close, daemon=True)
                detach.start()
                detach.join(DETACH_SECONDS)
                return False
        self._source.close()
        return True


def host_of(source: Source) -> Host:
    """Return this host as views show it."""
    uname = os.uname()
    offset = getattr(source, "epoch_offset_ns", None)
    return Host(
        uname.nodename,
        uname.release,
        source.name,
        source.why,
        hardware_corrupted_bytes(),
        epoch_offset_ns=clock.epoch_offset_ns() if offset is None else offset,
    )
