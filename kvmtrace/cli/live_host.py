"""A host as the live table watches it: opened in a thread, and followed over restarts.

Probes take seconds to attach, and a serve may restart under a command that follows it. Both happen
in a thread of their own, so that the table shows what is going on and takes keys meanwhile.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Sequence
from dataclasses import replace

from kvmtrace import sources
from kvmtrace.cli.inputs import (
    EventLog,
    WatchedLog,
    give_up_privileges,
    open_host,
    open_session,
)
from kvmtrace.cli.signals import stop
from kvmtrace.cli.watchdog import DETACHING
from kvmtrace.errors import KvmtraceError
from kvmtrace.linux import clock
from kvmtrace.model import CorrelatedEvent, Snapshot
from kvmtrace.probes import specs
from kvmtrace.session.session import Session
from kvmtrace.sources.remote import RemoteSource, ServeEnded
from kvmtrace.views.format import age_of, counted

RECENT = 500
"""Events that are kept for the table of events."""

_RETRY_SECONDS = 1.0
_SHOWN_SECONDS = 60.0
_MOMENT = 0.3
_END_SECONDS = 4.0
_BY = {"auto": "", "bpf": " by eBPF", "ftrace": " by ftrace"}


class Watching:
    """A session that is opened, and after the end of a serve opened anew, by a thread.

    Methods may be called from any thread; those that return something return at once.
    """

    def __init__(self, kind: str) -> None:
        """``kind``: as ``open_host_or_remote``. Nothing happens before ``start``."""
        self._kind = kind
        self._lock = threading.Lock()
        self._stop = threading.Event()
        self._settled = threading.Event()  # opened, or failed
        self._began = time.monotonic()
        self._session: Session | None = None
        self._opened: Session | None = None  # the last one that there was
        self._source: sources.Source | None = None
        self._failure: BaseException | None = None
        self._is_raised = False  # whether that was raised already
        self._last: tuple[Snapshot, int, Sequence[CorrelatedEvent]] | None = None
        self._gone: tuple[str, float] | None = None  # the serve's end: its message, and when
        self._returned: tuple[int, float] | None = None  # the next serve's pid, and when
        self._thread = threading.Thread(target=self._run, name="kvmtrace-open", daemon=True)

    def start(self) -> None:
        """Begin to open it, with the privileges of this thread; wait a moment for that.

        What fails at once can be raised before anything is drawn.
        """
        self._thread.start()
        self._settled.wait(_MOMENT)

    def close(self) -> None:
        """Stop, and detach; a source that is still being attached, as far as it is.

        Raises KvmtraceError if the reader goes on, as ``open_session``.
        """
        self._stop.set()
        end = time.monotonic() + _END_SECONDS
        while self._thread.is_alive() and (time.monotonic() < end or stop.detaching):
            self._thread.join(0.1)
            if time.monotonic() > end + DETACHING:
                break
        if self._thread.is_alive():
            sources.close_opening()
            stop.hung = True
        elif self._failure is not None and not self._is_raised:
            raise self._failure.with_traceback(None)

    # -- what is shown

    def snapshot(self) -> Snapshot | None:
        """The model, or the last one of a serve that has ended; None before there is any.

        Raises what ended it, if it was not the end of a serve.
        """
        if self._failure is not None:
            self._is_raised = True
            raise self._failure.with_traceback(None)
        session = self._session
        if session is not None:
            try:
                self._last = session.snapshot(), session.now(), session.recent()
            except ServeEnded as end:
                self._note_end(end)
        return None if self._last is None else self._last[0]

    def now(self) -> int:
        """The time of the snapshot: it stands still while there is no serve."""
        return clock.now_ns() if self._last is None else self._last[1]

    def recent(self) -> Sequence[CorrelatedEvent]:
        return () if self._last is None else self._last[2]

    def status(self) -> str:
        """What a person has to know of the source; "" if nothing."""
        with self._lock:
            gone = self._gone
        if gone is not None:
            message, when = gone
            return f"{message}, {_ago(when)}: waiting for it; its last report is below"
        if self._last is None:
            seconds = int(time.monotonic() - self._began)
            probes = counted(len(specs()), "probe")
            return f"attaching {probes}{_BY[self._kind]} … {seconds} s"
        if self._returned is not None and time.monotonic() - self._returned[1] < _SHOWN_SECONDS:
            pid, when = self._returned
            return f"another kvmtrace serve (pid {pid}) took over {_ago(when)}"
        return ""

    def log(self) -> EventLog:
        """All events so far. Raises KvmtraceError where there are none to be had."""
        # Also of a serve that has ended.
        session, source = self._opened, self._source
        if session is None:
            raise KvmtraceError("nothing is watched yet", "try again when it is")
        subscriber = session.subscribe()
        session.unsubscribe(subscriber)
        log = WatchedLog(subscriber.backlog, session.host(), session.probes())
        return replace(log, version=source.version) if isinstance(source, RemoteSource) else log

    # -- the thread

    def _run(self) -> None:
        try:
            source: sources.Source | None = RemoteSource.connect() if self._kind == "auto" else None
            source = source or open_host(self._kind)
            while source is not None:
                source = self._watch(source)
        except BaseException as failure:  # raised in ``snapshot``
            self._failure = failure
        finally:
            self._settled.set()

    def _watch(self, source: sources.Source) -> sources.Source | None:
        """Follow a source to its end; the next one, or None if there shall be none."""
        with open_session(source, recent=RECENT) as session:
            give_up_privileges()
            session.pump(0)
            session.start()
            with self._lock:
                self._session = self._opened = session
                self._source, self._gone = source, None
            self._settled.set()
            try:
                while not self._stop.wait(0.25):
                    session.age()
            except ServeEnded as end:
                self._note_end(end)
            finally:
                self._session = None
        return self._serve_again() if self._gone is not None else None

    def _note_end(self, end: ServeEnded) -> None:
        with self._lock:
            if self._gone is None:
                self._gone = end.message, time.monotonic()
        self._session = None

    def _serve_again(self) -> sources.Source | None:
        while not self._stop.wait(_RETRY_SECONDS):
            if (again := RemoteSource.connect()) is not None:
                self._returned = again.pid, time.monotonic()
                return again
        return None


def _ago(when: float) -> str:
    return f"{age_of(0, int((time.monotonic() - when) * 1e9))} ago"
