"""Keeps a session's events on the disk, without the reader of events waiting for it.

Events are handed to a thread, which writes them once a second in one transaction. A kill loses what
came since the last one, and so does a power cut. What the disk does not take is counted.
"""

from __future__ import annotations

import collections
import contextlib
import dataclasses
import json
import os
import sqlite3
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterable

from kvmtrace import __version__
from kvmtrace.events import LAST_NS, ClockStep, Event, Host, VmGone, VmSeen
from kvmtrace.linux import clock
from kvmtrace.model import HistoryState
from kvmtrace.session import archive_file, archive_summary
from kvmtrace.session.archive_file import Run
from kvmtrace.session.archive_story import keys_of, rekeyed
from kvmtrace.session.history import CompactLog

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
_SUMMARY_EVERY = 16384  # events, which a start reads one by one
_SAY_EVERY = 60.0
_CLOSE_SECONDS = 1.0
_NOISE = -7  # digits: 10 ms
_DAY_NS = 86_400_000_000_000


class Archive:
    """Events of one run, in the file at ``path``. ``add`` may be called from any thread.

    ``say``: called with a sentence if something keeps it from writing, and when it goes on, once a
    minute at most. ``wall``, ``now``: nanoseconds since the epoch, by the wall clock and by that
    of events.
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
        self._began = now()
        self.was_cut = False
        """Whether the last run was killed, or did not keep everything; known after ``begin``."""
        self._queue: collections.deque[tuple[int, Event]] = collections.deque()
        self._lock = threading.Lock()
        self._lost = 0
        self._next_say = 0.0
        self._wake = threading.Event()
        self._is_closing = False
        self._thread = threading.Thread(target=self._work, name="kvmtrace-archive", daemon=True)
        # Of the thread that writes, or of ``begin``:
        self._database: sqlite3.Connection | None = None
        self._run: Run | None = None
        self._log = CompactLog()
        self._next_key = 0
        self._here: dict[int, tuple[int, VmSeen]] = {}  # VM that runs: id of its VmSeen
        self._unsummarized = 0
        self._next_trim = 0.0
        self._is_failing = False
        self._counts: Counter[str] = Counter()
        self._last_write: int | None = None
        self._oldest: int | None = None

    # -- for the reader of events

    def begin(self) -> tuple[list[Event], int]:
        """Open the file. Returns what earlier runs kept, added up as in ``CompactLog``, and the
        first key that none of their VMs has.

        A file that is damaged is set aside. Without a file nothing is returned, and ``start`` tries
        again.
        """
        try:
            self._open(is_followed=True)
        except (sqlite3.Error, OSError, archive_file.Unusable) as error:
            self._failed(error)
            return [], 0
        if self.was_cut:
            self._say(
                f"history: the serve before did not end in order: of its last second, events may be"
                f" missing in {self.path}"
            )
        return self._log.events(), self._next_key

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
                    self._counts["no_room"] += 1

    def take_lost(self) -> int:
        """How many events were not kept since the last call."""
        with self._lock:
            lost, self._lost = self._lost, 0
            return lost

    @property
    def waits(self) -> bool:
        """Whether there are events that are not on the disk yet."""
        return bool(self._queue)

    def state(self) -> HistoryState:
        """What it has kept, and what not."""
        size = 0
        for suffix in ("", "-wal"):
            with contextlib.suppress(OSError):
                size += os.stat(self.path + suffix).st_size
        with self._lock:
            counts = self._counts
            return HistoryState(
                path=self.path,
                is_written=not self._is_failing,
                size=size,
                oldest_ns=self._oldest,
                last_write_ns=self._last_write,
                written=counts["written"],
                waiting=len(self._queue),
                dropped={why: counts[why] for why in ("no_room", "unwritable")},
                deleted={why: counts[why] for why in ("age", "size")},
                errors=counts["errors"],
            )

    def close(self) -> None:
        """Write what is left, for a second at most."""
        self._is_closing = True
        self._wake.set()
        if self._thread.ident is not None:
            self._thread.join(_CLOSE_SECONDS)

    # -- the thread

    def _work(self) -> None:
        while not self._is_closing:
            self._wake.wait(_EVERY)
            self._write()
        self._write(is_last=True)  # what came during the last one
        database, self._database = self._database, None
        if database is not None:
            database.close()

    def _write(self, *, is_last: bool = False) -> None:
        due = time.monotonic() >= self._next_trim
        if not self._queue and not ((due or is_last) and self._database):
            return
        try:
            if self._database is None:
                self._open()
            assert self._database is not None
            with self._lock:
                batch = list(self._queue)
            self._insert(self._database, batch, due=due and not is_last, is_last=is_last)
        except (sqlite3.Error, OSError, OverflowError, archive_file.Unusable) as error:
            self._failed(error)
            return
        with self._lock:
            for _ in batch:
                self._queue.popleft()
            self._counts["written"] += len(batch)
            if batch:
                self._last_write = self._wall()
            was_failing, self._is_failing = self._is_failing, False
        if was_failing:
            self._say(f"history: {self.path} is written again")

    def _insert(
        self,
        database: sqlite3.Connection,
        batch: list[tuple[int, Event]],
        *,
        due: bool,
        is_last: bool,
    ) -> None:
        """One transaction, and once a minute what makes room."""
        assert self._run is not None
        run = self._run.number
        database.execute("BEGIN IMMEDIATE")
        (upto,) = database.execute(
            "SELECT max(upto, (SELECT ifnull(max(id), 0) FROM events)) FROM summarized"
        ).fetchone()
        is_summarized = self._unsummarized >= _SUMMARY_EVERY and not is_last
        if is_summarized:
            archive_summary.store(database, self._log.events(), upto, run, self._next_key)
        rows = [
            (number, run, ts, archive_summary.record_of(event))
            for number, (ts, event) in enumerate(batch, upto + 1)
        ]
        database.executemany("INSERT INTO events (id, run, ts, record) VALUES (?, ?, ?, ?)", rows)
        deleted = self._trim(database) if due else Counter[str]()
        if is_last and not self._counts["no_room"] and not self._log.dropped:
            # All that this run counted, the next one will count.
            database.execute("UPDATE runs SET ended = ? WHERE id = ?", (self._wall(), run))
        database.execute("COMMIT")
        if is_summarized:
            self._unsummarized = 0
        self._note(upto + 1, batch)
        unwritable = sum(record == archive_summary.UNWRITABLE for *_, record in rows)
        oldest = _oldest(database) if due or self._oldest is None else self._oldest
        with self._lock:
            self._counts.update(deleted, unwritable=unwritable)
            self._oldest = oldest
        if due:
            # ``execute`` would free one page only.
            database.executescript("PRAGMA incremental_vacuum;")
            database.execute("PRAGMA wal_checkpoint(TRUNCATE)").fetchall()
            self._next_trim = time.monotonic() + _TRIM_EVERY

    def _note(self, number: int, batch: Iterable[tuple[int, Event]]) -> None:
        """Take what is on the disk now into the summary. ``number``: the first one's id."""
        assert self._run is not None
        first_key = self._run.first_key
        for at, (ts, event) in enumerate(batch, number):
            self._unsummarized += 1
            if isinstance(event, VmSeen):
                self._here[event.vm] = at, event
            elif isinstance(event, VmGone):
                self._here.pop(event.vm, None)
            kept = event if event.ts == ts else dataclasses.replace(event, ts=ts)
            if first_key:
                kept = rekeyed(kept, lambda vm: vm + first_key)
            self._next_key = max([self._next_key, *(key + 1 for key in keys_of(kept))])
            if not isinstance(kept, ClockStep):
                self._log.add(kept)

    def _failed(self, error: Exception) -> None:
        """Go on without the disk: events wait while there is room, and the file is opened anew."""
        database, self._database = self._database, None
        if database is not None:
            with contextlib.suppress(sqlite3.Error):  # the next attempt opens another connection
                database.close()
        with self._lock:
            self._is_failing = True
            self._counts["errors"] += 1
        if time.monotonic() >= self._next_say:
            self._next_say = time.monotonic() + _SAY_EVERY
            self._say(f"history: {self.path} cannot be written: {error}; events wait in memory")

    def _open(self, *, is_followed: bool = False) -> None:
        """Raises sqlite3.Error, OSError, Unusable. ``is_followed``: the run goes on with VMs."""
        try:
            database = archive_file.opened(self.path)
        except archive_file.Unusable as error:
            aside = archive_file.set_aside(self.path)
            self._say(f"history: {self.path} cannot be used ({error}) and is now {aside}")
            database = archive_file.opened(self.path)
        try:
            # A run that was begun before a failure goes on, unless the file is another one.
            if self._run is None or not _has_run(database, self._run.number):
                self._begin_run(database, is_followed=is_followed)
        except BaseException:
            database.close()
            raise
        self._database = database
        with self._lock:
            self._oldest = _oldest(database)

    def _begin_run(self, database: sqlite3.Connection, *, is_followed: bool) -> None:
        log, story = archive_summary.load(database)
        before = archive_file.runs(database)
        run = Run(
            1 + max((one.number for one in before), default=0),
            archive_file.boot_id(),
            self._wall(),
            self._host,
            __version__,
            0 if is_followed else story.next_key,
        )
        database.execute(
            "INSERT INTO runs (id, boot, began, version, host, first_key)"
            " VALUES (?, ?, ?, ?, ?, ?)",
            (
                run.number,
                run.boot,
                run.began,
                run.version,
                archive_file.as_json(run.host),
                run.first_key,
            ),
        )
        for event in story.begin(run):
            log.add(event)
        if self._run is None:
            self.was_cut = bool(before) and not before[-1].ended
        with self._lock:
            # VMs of which another file had the beginning.
            again = [(run.began, seen) for _, seen in self._here.values()]
            self._queue.extendleft(reversed(again))
        self._run, self._log, self._next_key = run, log, story.next_key
        self._unsummarized = _SUMMARY_EVERY  # what was read is not read again

    def _trim(self, database: sqlite3.Connection) -> Counter[str]:
        """Delete what is too old, and the oldest events of a file that is too large.

        What VMs that run began with stays. Returns {why: events}.
        """
        assert self._run is not None
        deleted: Counter[str] = Counter()
        age = round(self._days * _DAY_NS)
        oldest = max(0, self._wall() - age)
        kept = json.dumps([number for number, _ in self._here.values()])
        # The wall clock may have been wrong when this run began.
        current = self._run.number if self._now() - self._began < age else -1
        done = database.execute(
            "DELETE FROM events WHERE ts < ? AND run <> ?"
            " AND id NOT IN (SELECT value FROM json_each(?))",
            (oldest, current, kept),
        )
        deleted["age"] += done.rowcount
        while _used_bytes(database) > self._size:
            done = database.execute(
                "DELETE FROM events WHERE id IN (SELECT id FROM events WHERE id NOT IN"
                " (SELECT value FROM json_each(?)) ORDER BY id LIMIT ?)",
                (kept, _TRIM_EVENTS),
            )
            if not done.rowcount:
                break
            deleted["size"] += done.rowcount
        database.execute(
            "DELETE FROM runs WHERE id <> ? AND began < ? AND id NOT IN (SELECT run FROM events)"
            " AND id NOT IN (SELECT ifnull(run, 0) FROM summarized)",
            (self._run.number, oldest),
        )
        return deleted


def _oldest(database: sqlite3.Connection) -> int | None:
    (ts,) = database.execute("SELECT min(ts) FROM events").fetchone()
    return None if ts is None else int(ts)


def _has_run(database: sqlite3.Connection, number: int) -> bool:
    return bool(database.execute("SELECT 1 FROM runs WHERE id = ?", (number,)).fetchall())


def _used_bytes(database: sqlite3.Connection) -> int:
    pages, free, size = (
        database.execute(f"PRAGMA {name}").fetchone()[0]
        for name in ("page_count", "freelist_count", "page_size")
    )
    return int((pages - free) * size)
