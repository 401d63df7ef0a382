"""The file in which ``serve`` keeps its events: an SQLite database.

A *run* is one serve, an event belongs to a run and has its time by the wall clock. Runs of one boot
use the same keys for the same VMs (``resumed``).
"""

from __future__ import annotations

import contextlib
import dataclasses
import json
import os
import sqlite3
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from kvmtrace.errors import KvmtraceError
from kvmtrace.events import LAST_NS, ClockStep, Event, Host, Lost
from kvmtrace.sources.codec import DECODE_ERRORS, Decoder, dataclass_from
from kvmtrace.sources.dataclass_checks import MalformedLine

VERSION = 1
"""Of the tables (PRAGMA user_version). A newer file is not touched; an older one is brought up."""

_TABLES = """
CREATE TABLE runs (
    id INTEGER PRIMARY KEY, boot TEXT NOT NULL, began INTEGER NOT NULL, version TEXT, host TEXT
);
CREATE TABLE events (
    id INTEGER PRIMARY KEY, run INTEGER NOT NULL, ts INTEGER NOT NULL, record TEXT NOT NULL
);
CREATE INDEX events_by_time ON events (ts);
"""

UNREADABLE = "history_lines"
"""Place of the Lost for events of the file that are not understood."""

# {version: what makes the next one of it}
MIGRATIONS: Mapping[int, str] = {0: _TABLES}


class Unusable(Exception):
    """The file cannot be used: damaged, or of a newer kvmtrace. The text says why."""


@dataclass(frozen=True, slots=True)
class Run:
    """One serve. ``began``: nanoseconds since the epoch. ``boot``: the kernel's boot id."""

    number: int
    boot: str
    began: int
    host: Host
    version: str | None = None


def boot_id() -> str:
    """What tells one boot of this host from another; "" if the kernel does not say."""
    with contextlib.suppress(OSError), open("/proc/sys/kernel/random/boot_id") as file:
        return file.read().strip()
    return ""


def opened(path: str) -> sqlite3.Connection:
    """Open the file for writing; make it, or bring it up to ``VERSION``.

    Raises Unusable if it is damaged or newer, and sqlite3.Error or OSError if it cannot be written.
    """
    # It has addresses and names of guests.
    os.close(os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC | os.O_NOFOLLOW, 0o600))
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


def _check(database: sqlite3.Connection) -> None:
    try:
        (version,) = database.execute("PRAGMA user_version").fetchone()
        verdict = [row[0] for row in database.execute("PRAGMA quick_check(1)")]
    except sqlite3.DatabaseError as error:
        if isinstance(error, sqlite3.OperationalError):
            raise  # cannot be read now, which says nothing of the content
        raise Unusable(str(error)) from error
    if version > VERSION:
        raise Unusable(f"written by a newer kvmtrace (tables of version {version})")
    if verdict != ["ok"]:
        raise Unusable(verdict[0] if verdict else "the check says nothing")


def _migrate(database: sqlite3.Connection) -> None:
    (version,) = database.execute("PRAGMA user_version").fetchone()
    for before in range(version, VERSION):
        database.executescript(
            f"BEGIN; {MIGRATIONS[before]}; PRAGMA user_version = {before + 1}; COMMIT;"
        )


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
        os.stat(path)
        database = sqlite3.connect(f"file:{_quoted(path)}?mode=ro", uri=True, timeout=5.0)
        database.execute("SELECT 1 FROM runs LIMIT 1")
    except OSError as error:
        raise KvmtraceError(
            f"{path}: {error.strerror}", "serve keeps it where it is started with --history FILE"
        ) from error
    except sqlite3.Error as error:
        raise KvmtraceError(f"{path}: {error}", "is it the file of serve's --history?") from error
    return database


def _quoted(path: str) -> str:
    return path.replace("%", "%25").replace("?", "%3f").replace("#", "%23")


def runs(database: sqlite3.Connection) -> list[Run]:
    """All runs, in order. Those that cannot be understood are left out."""
    found = []
    rows = database.execute("SELECT id, boot, began, version, host FROM runs ORDER BY id")
    for number, boot, began, version, host in rows:
        with contextlib.suppress(*DECODE_ERRORS):
            read = dataclass_from(Host, json.loads(host))
            found.append(Run(int(number), str(boot), int(began), read, version))
    return found


def events_of(
    database: sqlite3.Connection,
    numbers: Sequence[int],
    since: int = 0,
    until: int = LAST_NS,
    *,
    only_vms: bool = False,
) -> Iterator[tuple[int, Event]]:
    """Events of these runs in the order in which they were written, as (run, event).

    ``only_vms``: those that VMs begin and end with.

    Their times are by the wall clock, so steps of the clock are left out: each run had its own. An
    event that is not understood is a Lost.
    """
    decoder = Decoder()
    marks = ",".join("?" * len(numbers))
    rows = database.execute(
        f"SELECT run, ts, record FROM events WHERE run IN ({marks}) AND ts BETWEEN ? AND ?"
        f"{_VMS if only_vms else ''} ORDER BY id",
        (*numbers, since, until),
    )
    for run, ts, record in rows:
        try:
            event = decoder.event({**json.loads(record), "ts": ts})
        except (MalformedLine, TypeError, ValueError):
            event = Lost(ts, UNREADABLE, 1)
        if event is not None and not isinstance(event, ClockStep):
            yield run, event


# As ``archive`` writes them: the kind comes first.
_VMS = """ AND (record LIKE '{"kind":"vm_seen"%' OR record LIKE '{"kind":"vm_gone"%')"""


def as_json(value: Any) -> str:
    """A dataclass of facts as JSON, without what is None."""
    fields = {k: v for k, v in dataclasses.asdict(value).items() if v is not None}
    return json.dumps(fields, ensure_ascii=False, separators=(",", ":"))


def default_path() -> str | None:
    """The file in the directory that the service manager gave us, if it gave one."""
    directory = os.environ.get("STATE_DIRECTORY", "").partition(":")[0]
    return os.path.join(directory, "history.db") if directory else None
