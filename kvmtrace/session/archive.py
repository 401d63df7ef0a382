"""Keeps a session's events on the disk, without the reader of events waiting for it.

Events are handed to a thread, which writes them once a second in one transaction. A kill loses what
came since the last one, and so does a power cut. What the disk does not take is counted.
"""

from __future__ import annotations

import collections
import contextlib
import json
import sqlite3
import threading
import time
from collections.abc import Callable, Iterable

from kvmtrace import __version__
from kvmtrace.events import LAST_NS, Event, Host
from kvmtrace.linux import clock
from kvmtrace.session import archive_file
from kvmtrace.session.history import CompactLog
from kvmtrace.sources.codec import DECODE_ERRORS, checked, to_record

LOST_AT = "disk"
"""Place of the Lost for events that were not kept."""

DAYS = 90.0
SIZE = 256 << 20
"""What is kept by default: this many days, in a file of at most so many bytes."""

QUEUE = 65536
"""Events that wait for the disk; further ones are not kept."""

_EVERY = 1.0
_TRIM_EVERY = 60.0
_TRIM_EVENTS = 1024
_SAY_EVERY = 60.0
_CLOSE_SECONDS = 1.0
_NOISE = -7  # digits: 10 ms
_DAY_NS = 86_400_000_000_000


class Archive:
    """Events of one run, in the file at ``path``. ``add`` may be called from any thread.

    ``say``: told in a sentence what keeps it from writing, and when it goes on, once a minute at
    most. ``wall``, ``now``: nanoseconds since the epoch, by the wall clock and by that of events.
    """

    def __init__(
        self,
        path: str,
        host: Host,
        say: Callable[[str], None],
        *,
        days: float = DAYS,
        size: int = SIZE,
        wall: Callable[[], int] = clock.wall_ns,
        now: Callable[[], int] = clock.now_ns,
    ) -> None:
        self.path = path
        self._host, self._say, self._wall, self._now = host, say, wall, now
        self._days, self._size = days, size
        self._queue: collections.deque[tuple[int, Event]] = collections.deque()
        self._lock = threading.Lock()
        self._lost = 0
        self._database: sqlite3.Connection | None = None
        self._run: int | None = None
        self._next_trim = self._next_say = 0.0
        self._is_failing = False
        self._wake = threading.Event()
        self._is_closing = False
        self._thread = threading.Thread(target=self._work, name="kvmtrace-archive", daemon=True)

    def begin(self) -> list[Event]:
        """Open the file; return what earlier runs of this boot kept, added up as in ``CompactLog``.

        A file that is damaged is set aside. Without a file nothing is returned, and ``start`` tries
        again.
        """
        log = CompactLog()
        try:
            self._open()
            assert self._database is not None
            boot = archive_file.boot_id()
            earlier = [
                run.number
                for run in archive_file.runs(self._database)
                if boot and run.boot == boot and run.number != self._run
            ]
            for _, event in archive_file.events_of(self._database, earlier):
                log.add(event)
        except (sqlite3.Error, OSError, archive_file.Unusable) as error:
            self._failed(error)
        return log.events()

    def start(self) -> None:
        """Write from now on, with the privileges of the calling thread."""
        self._thread.start()

    def add(self, events: Iterable[Event]) -> None:
        """Keep these events. Never waits for the disk."""
        # How far the wall clock was stepped since the start; less is noise of two readings.
        shift = round(self._wall() - self._now(), _NOISE)
        with self._lock:
            for event in events:
                if len(self._queue) < QUEUE:
                    self._queue.append((min(max(0, event.ts + shift), LAST_NS), event))
                else:
                    self._lost += 1

    def take_lost(self) -> int:
        """How many events were not kept since the last call."""
        with self._lock:
            lost, self._lost = self._lost, 0
            return lost

    @property
    def waits(self) -> bool:
        """Whether there are events that are not on the disk yet."""
        return bool(self._queue)

    def close(self) -> None:
        """Write what is left, for a second at most."""
        self._is_closing = True
        self._wake.set()
        if self._thread.ident is not None:
            self._thread.join(_CLOSE_SECONDS)

    def _work(self) -> None:
        while not self._is_closing:
            self._wake.wait(_EVERY)
            self._write()
        self._write()  # what came during the last one
        database, self._database = self._database, None
        if database is not None:
            database.close()

    def _write(self) -> None:
        with self._lock:
            batch = list(self._queue)
        due = time.monotonic() >= self._next_trim
        if not batch and not (due and self._database):
            return
        try:
            if self._database is None:
                self._open()
            assert self._database is not None
            rows = [(self._run, ts, _record(event)) for ts, event in batch]
            self._database.execute("BEGIN IMMEDIATE")
            self._database.executemany(
                "INSERT INTO events (run, ts, record) VALUES (?, ?, ?)", rows
            )
            if due:
                self._trim(self._database)
            self._database.execute("COMMIT")
            if due:
                # ``execute`` would free one page only.
                self._database.executescript("PRAGMA incremental_vacuum;")
                self._database.execute("PRAGMA wal_checkpoint(TRUNCATE)").fetchall()
                self._next_trim = time.monotonic() + _TRIM_EVERY
        except (sqlite3.Error, OSError, archive_file.Unusable) as error:
            self._failed(error)
            return
        with self._lock:
            for _ in batch:
                self._queue.popleft()
        if self._is_failing:
            self._is_failing = False
            self._say(f"history: {self.path} is written again")

    def _failed(self, error: Exception) -> None:
        """Go on without the disk: events wait while there is room, and the file is opened anew."""
        database, self._database = self._database, None
        if database is not None:
            with contextlib.suppress(sqlite3.Error):  # the next attempt opens another connection
                database.close()
        self._is_failing = True
        if time.monotonic() >= self._next_say:
            self._next_say = time.monotonic() + _SAY_EVERY
            self._say(f"history: {self.path} cannot be written: {error}; events wait in memory")

    def _open(self) -> None:
        try:
            database = archive_file.opened(self.path)
        except archive_file.Unusable as error:
            aside = archive_file.set_aside(self.path)
            self._say(f"history: {self.path} cannot be used ({error}) and is now {aside}")
            database = archive_file.opened(self.path)
        # A run that was begun before a failure goes on.
        if self._run is None or not _has_run(database, self._run):
            cursor = database.execute(
                "INSERT INTO runs (boot, began, version, host) VALUES (?, ?, ?, ?)",
                (
                    archive_file.boot_id(),
                    self._wall(),
                    __version__,
                    archive_file.as_json(self._host),
                ),
            )
            self._run = cursor.lastrowid
        self._database = database

    def _trim(self, database: sqlite3.Connection) -> None:
        """Delete what is too old, and the oldest events of a file that is too large."""
        oldest = self._wall() - round(self._days * _DAY_NS)
        database.execute("DELETE FROM events WHERE ts < ?", (oldest,))
        while _used_bytes(database) > self._size:
            done = database.execute(
                "DELETE FROM events WHERE id IN (SELECT id FROM events ORDER BY id LIMIT ?)",
                (_TRIM_EVENTS,),
            )
            if not done.rowcount:
                break
        database.execute(
            "DELETE FROM runs WHERE id <> ? AND began < ? AND id NOT IN (SELECT run FROM events)",
            (self._run, oldest),
        )


def _record(event: Event) -> str:
    try:
        return json.dumps(to_record(checked(event)), ensure_ascii=False, separators=(",", ":"))
    except DECODE_ERRORS:
        return "{}"  # read as one that is not understood, and counted there


def _has_run(database: sqlite3.Connection, number: int) -> bool:
    return bool(database.execute("SELECT 1 FROM runs WHERE id = ?", (number,)).fetchall())


def _used_bytes(database: sqlite3.Connection) -> int:
    pages, free, size = (
        database.execute(f"PRAGMA {name}").fetchone()[0]
        for name in ("page_count", "freelist_count", "page_size")
    )
    return int((pages - free) * size)
