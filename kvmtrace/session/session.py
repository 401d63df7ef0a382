"""A session: one source and one correlator, and the snapshots that views draw from."""

from __future__ import annotations

import dataclasses
import errno
import os
import threading
import time

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

# How long ``close`` waits for a reader that does not move, for any reader, and then for the source;
# seconds. The first two are less than the watchdog's patience with the thread that waits.
READER_SECONDS = 1.25
BUSY_SECONDS = 2.25
DETACH_SECONDS = 1.25

# How long the reader may find no file descriptor before that ends it; seconds.
SHORTAGE_SECONDS = 30.0


class Session:
    """Pumps a source into a correlator, in the caller's thread (``pump``) or its own (``start``).

    Sources are opened, polled and closed by one thread; ``snapshot``, ``age``, ``probes``,
    ``follow`` and ``unfollow`` may be called from any.
    """

    def __init__(self, source: Source, page_shift: int = kvm.PAGE_SHIFT) -> None:
        self._source = source
        # What comes from elsewhere has a clock of its own, and brings that clock's steps along.
        self._steps = None if hasattr(source, "epoch_offset_ns") else clock.Steps()
        self._correlator = Correlator(page_shift=page_shift)
        self._log = CompactLog()
        self._followers: list[Subscriber] = []
        self._lock = threading.Lock()
        self._stop = threading.Event()
        self._thread: threading.Thread | None = None
        self._polled = time.monotonic()
        self.shortages = 0
        """How often the source found no file descriptor."""
        self.failure: BaseException | None = None
        """What ended the reader thread, if it was not ``close``."""
        self.left = ""
        """What the reader was left at, as a person would say it; empty if it came to an end."""

    def pump(self, timeout: float) -> list[CorrelatedEvent]:
        """Wait up to ``timeout`` seconds for events and take in all there are."""
        events = self.poll(timeout)
        with self._lock:
            for event in events:
                self._log.add(event)
            for follower in self._followers:
                follower.put(events)
            return [self._correlator.feed(event) for event in events]

    def poll(self, timeout: float) -> list[Event]:
        """As ``Source.poll``, with steps of the wall clock; nothing is taken in.

        A shortage of file descriptors is waited out, and counted as lost.
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
        """Seconds since the source was read last; raises what ended the reader, if it ended.

        Takes no lock, so it answers whatever hangs.
        """
        self._check()
        return time.monotonic() - self._polled

    def follow(self) -> Subscriber:
        """For somebody who comes later: what happened so far, and from here on what comes."""
        with self._lock:
            follower = Subscriber(self._log.events())
            self._followers.append(follower)
            return follower

    def unfollow(self, follower: Subscriber) -> None:
        """It is not listened to any more."""
        with self._lock:
            self._followers.remove(follower)

    def now(self) -> int:
        """Now, by the clock that stamps the source's events: ns since the epoch.

        A running serve has a clock of its own, measured when it started. No step of the wall clock
        is in it (``Snapshot.wall``).
        """
        offset = getattr(self._source, "epoch_offset_ns", None)
        return clock.now_ns() if offset is None else time.monotonic_ns() + offset

    def host(self) -> Host:
        """This host, and by what it is watched."""
        return host_of(self._source)

    def probes(self) -> tuple[Probe, ...]:
        """The state of every probe, from any thread."""
        with self._lock:
            return self._source.probes()

    def start(self) -> None:
        """Pump in a thread of its own until ``close``."""
        self._thread = threading.Thread(target=self._run, name="kvmtrace-reader", daemon=True)
        self._thread.start()

    def _run(self) -> None:
        try:
            while not self._stop.is_set():
                self.pump(POLL_SECONDS)
        except BaseException as failure:  # handed to callers that wait for snapshots
            self.failure = failure

    def snapshot(self) -> Snapshot:
        """The model now, with host and probes; raises what ended the reader, if it ended."""
        self._check()
        with self._lock:
            model = self._correlator.snapshot()
            host = host_of(self._source)
            return dataclasses.replace(
                model,
                host=host,
                probes=self._source.probes(),
                probe_runs=self._source.probe_runs(),
            )

    def _check(self) -> None:
        if self.failure is not None:
            # Its traceback would grow with every raise.
            raise self.failure.with_traceback(None)

    def close(self) -> bool:
        """Stop the thread and detach the source; whether both came to an end.

        If the reader hangs, or computes for long, the source is closed without it, as far as that
        goes in a second.
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
    """This host as views name it."""
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
