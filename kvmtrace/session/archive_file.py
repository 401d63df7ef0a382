"""The file in which ``serve`` keeps its events: an SQLite database.

A *run* is one serve; an event belongs to a run and has its time by the wall clock. Keys of VMs are
unique in the file: a run goes on with those of the runs before, or its own begin at ``first_key``.
"""

from __future__ import annotations

import contextlib
import dataclasses
import grp
import json
import os
import sqlite3
import stat
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from kvmtrace.errors import KvmtraceError
from kvmtrace.events import LAST_NS, ClockStep, Event, Host, Lost
from kvmtrace.sources.codec import DECODE_ERRORS, Decoder, dataclass_from
from kvmtrace.sources.dataclass_checks import MalformedLine

VERSION = 2
"""Of the tables (PRAGMA user_version). A newer file is not touched; an older one is brought up."""

GROUP = "kvmtrace"
"""Its members may read the file, where there is that group."""

UNREADABLE = "history_lines"
"""Place of the Lost for events of the file that are not understood."""

_CHUNK = 4096
_UNKNOWN = Host("unknown", "unknown", "unknown")

_FIRST = """
CREATE TABLE runs (
    id INTEGER PRIMARY KEY, boot TEXT NOT NULL, began INTEGER NOT NULL, version TEXT, host TEXT
);
CREATE TABLE events (
    id INTEGER PRIMARY KEY, run INTEGER NOT NULL, ts INTEGER NOT NULL, record TEXT NOT NULL
);
CREATE INDEX events_by_time ON events (ts);
"""

# ended: when all that the run had was on the disk; NULL for one that was killed.
# summary: what led to the state after the event summarized.upto, of summarized.run.
_SECOND = """
ALTER TABLE runs ADD COLUMN first_key INTEGER NOT NULL DEFAULT 0;
ALTER TABLE runs ADD COLUMN ended INTEGER;
CREATE TABLE summary (id INTEGER PRIMARY KEY, record TEXT NOT NULL);
CREATE TABLE summarized (upto INTEGER NOT NULL, run INTEGER, next_key INTEGER NOT NULL);
INSERT INTO summarized VALUES (0, NULL, 0);
"""


def _to_second(database: sqlite3.Connection) -> None:
    """Keys were unique in each boot only."""
    for statement in _SECOND.split(";"):
        database.execute(statement)
    rows = database.execute(
        "SELECT boot, max(json_extract(record, '$.vm')) FROM runs JOIN events ON run = runs.id"
        " GROUP BY boot ORDER BY min(runs.id)"
    ).fetchall()
    first = 0
    for boot, highest in rows:
        database.execute("UPDATE runs SET first_key = ? WHERE boot = ?", (first, boot))
        first += 1 + (highest or 0)


def _to_first(database: sqlite3.Connection) -> None:
    for statement in _FIRST.split(";"):
        database.execute(statement)


# {version: what makes the next one of it}
MIGRATIONS: Mapping[int, Callable[[sqlite3.Connection], None]] = {0: _to_first, 1: _to_second}


class Unusable(Exception):
    """The file cannot be used: damaged, or of a newer kvmtrace. The text gives the reason."""


@dataclass(frozen=True, slots=True)
class Run:
    """One serve. ``began``: nanoseconds since the epoch. ``boot``: the kernel's boot id.

    ``first_key``: is added to the keys of VMs. ``ended``: False if it was killed.
    """

    number: int
    boot: str
    began: int
    host: Host
    version: str | None = None
    first_key: int = 0
    ended: bool = False

    def is_same_boot(self, other: Run) -> bool:
        """Whether the host was not rebooted in between."""
        return bool(self.boot) and self.boot == other.boot


def boot_id() -> str:
    """What distinguishes one boot of this host from another; "" if it cannot be read."""
    with contextlib.suppress(OSError), open("/proc/sys/kernel/random/boot_id") as file:
        return file.read().strip()
    return ""


def opened(path: str) -> sqlite3.Connection:
    """Open the file for writing; make it, or bring it up to ``VERSION``.

    Raises Unusable if it is damaged or newer, and sqlite3.Error or OSError if it cannot be written.
    """
    # It has addresses and names of guests.
    descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC | os.O_NOFOLLOW, 0o600)
    try:
        _share(descriptor)
    finally:
        os.close(descriptor)
    database = sqlite3.connect(path, isolation_level=None, timeout=1.0, check_same_thread=False)
    try:
        _check(database)
        # Pages that are freed can be given back to the file system.
        if not database.execute("PRAGMA user_version").fetchone()[0]:
            database.execute("PRAGMA auto_vacuum = INCREMENTAL")
        database.execute("PRAGMA journal_mode = WAL")
        # Each commit is on the disk before the next event is written.
        database.execute("PRAGMA synchronous = FULL")
        _migrate(database)
    except BaseException:
        database.close()
        raise
    return database


def _share(descriptor: int) -> None:
    """Let the group read it, as it may read the socket. SQLite gives its other files this mode."""
    with contextlib.suppress(KeyError, OSError):
        group = _group()
        if os.fstat(descriptor).st_gid != group:
            os.fchown(descriptor, -1, group)
        if stat.S_IMODE(os.fstat(descriptor).st_mode) == 0o600:
            os.fchmod(descriptor, 0o640)


def _group() -> int:
    return grp.getgrnam(GROUP).gr_gid


def _check(database: sqlite3.Connection) -> None:
    try:
        (version,) = database.execute("PRAGMA user_version").fetchone()
        verdict = [row[0] for row in database.execute("PRAGMA quick_check(1)")]
    except sqlite3.DatabaseError as error:
        if isinstance(error, sqlite3.OperationalError):
            raise  # cannot be read now; the content may be sound
        raise Unusable(str(error)) from error
    if version > VERSION:
        raise Unusable(f"written by a newer kvmtrace (tables of version {version})")
    if verdict != ["ok"]:
        raise Unusable(verdict[0] if verdict else "the check has no result")


def _migrate(database: sqlite3.Connection) -> None:
    (version,) = database.execute("PRAGMA user_version").fetchone()
    for before in range(version, VERSION):
        database.execute("BEGIN IMMEDIATE")
        try:
            MIGRATIONS[before](database)
            database.execute(f"PRAGMA user_version = {before + 1}")
            database.execute("COMMIT")
        except sqlite3.Error as error:
            database.execute("ROLLBACK")
            if isinstance(error, sqlite3.OperationalError) and "no such" in str(error):
                raise Unusable(str(error)) from error
            raise


def set_aside(path: str) -> str:
    """Rename a file that cannot be used, so that a new one can begin; return the new name."""
    aside = f"{path}.damaged-{time.strftime('%Y%m%dT%H%M%SZ', time.gmtime())}"
    os.replace(path, aside)
    for suffix in ("-wal", "-shm"):
        with contextlib.suppress(FileNotFoundError):
            os.replace(path + suffix, aside + suffix)
    return aside


def reading(path: str) -> sqlite3.Connection:
    """Open the file for reading, also while serve writes it. Raises KvmtraceError."""
    try:
        os.close(os.open(path, os.O_RDONLY | os.O_CLOEXEC))
        database = _read_only(path)
    except PermissionError as error:
        raise KvmtraceError(
            f"{path}: {error.strerror}", f"root and members of the group {GROUP} may read it"
        ) from error
    except OSError as error:
        raise KvmtraceError(
            f"{path}: {error.strerror}",
            "`kvmtrace serve --history FILE` keeps one; --history FILE names it",
        ) from error
    except sqlite3.Error as error:
        raise KvmtraceError(f"{path}: {error}", "is it the file of serve's --history?") from error
    if database.execute("PRAGMA user_version").fetchone()[0] > VERSION:
        database.close()
        raise KvmtraceError(f"{path} was written by a newer kvmtrace", "read it with that version")
    return database


def _read_only(path: str) -> sqlite3.Connection:
    name = f"file:{path.replace('%', '%25').replace('?', '%3f').replace('#', '%23')}?mode=ro"
    try:
        return _tried(name)
    except sqlite3.OperationalError:
        # Without a serve there is no index of the log (-shm), and who may not write there cannot
        # make one. Without a log none is needed.
        if os.path.exists(f"{path}-wal") and os.path.getsize(f"{path}-wal"):
            raise
        return _tried(f"{name}&immutable=1")


def _tried(name: str) -> sqlite3.Connection:
    database = sqlite3.connect(name, uri=True, timeout=5.0)
    try:
        database.execute("SELECT 1 FROM runs LIMIT 1").fetchall()
    except BaseException:
        database.close()
        raise
    return database


def runs(database: sqlite3.Connection) -> list[Run]:
    """All runs, in order."""
    columns = "id, boot, began, version, host"
    if database.execute("PRAGMA user_version").fetchone()[0] > 1:
        columns += ", first_key, ended IS NOT NULL"
    found = []
    for number, boot, began, version, host, *more in database.execute(
        f"SELECT {columns} FROM runs ORDER BY id"
    ):
        read = _UNKNOWN
        with contextlib.suppress(*DECODE_ERRORS):
            read = dataclass_from(Host, json.loads(host))
        first_key, ended = more or (0, False)
        found.append(Run(number, boot, began, read, version, first_key, bool(ended)))
    return found


def events_of(
    database: sqlite3.Connection, after: int = 0, until: int = LAST_NS
) -> Iterator[tuple[int, int, Event]]:
    """Events in the order in which they were written, as (id, run, event).

    ``after``: those with a greater id. ``until``: by then, in nanoseconds since the epoch.

    Their times are by the wall clock, so steps of the clock are left out: each run had its own. An
    event that is not understood is a Lost. No transaction is left open between two events: it
    would keep serve's log from being emptied.
    """
    decoder = Decoder()
    while rows := database.execute(
        "SELECT id, run, ts, record FROM events WHERE id > ? ORDER BY id LIMIT ?", (after, _CHUNK)
    ).fetchall():
        for number, run, ts, record in rows:
            if ts <= until and (event := decoded(decoder, record, ts)) is not None:
                yield number, run, event
        after = rows[-1][0]


def decoded(decoder: Decoder, record: str, ts: int | None = None) -> Event | None:
    """The event of a record, at ``ts``; None for a step of the clock."""
    try:
        found = json.loads(record)
        event = decoder.event(found if ts is None else {**found, "ts": ts})
    except (MalformedLine, TypeError, ValueError, RecursionError):
        event = Lost(ts or 0, UNREADABLE, 1)
    return None if isinstance(event, ClockStep) else event


def as_json(value: Any) -> str:
    """A dataclass of facts as JSON, without what is None."""
    fields = {k: v for k, v in dataclasses.asdict(value).items() if v is not None}
    return json.dumps(fields, ensure_ascii=False, separators=(",", ":"))


def default_path() -> str | None:
    """The file in the directory that the service manager gave us, if it gave one."""
    directory = os.environ.get("STATE_DIRECTORY", "").partition(":")[0]
    return os.path.join(directory, "history.db") if directory else None
