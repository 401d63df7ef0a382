"""Serve's archive as a source that is read like a recording."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Mapping

from kvmtrace.events import LAST_NS, Event
from kvmtrace.linux import clock
from kvmtrace.probes import Probe, ProbeRuns
from kvmtrace.session import archive_file, archive_story

BATCH = 1024


class ArchivedSource:
    """All events of the file at ``path`` until ``until`` (ns since the epoch, by the wall clock).

    ``end``: id of the last one, if it is not the last that there is. Raises KvmtraceError if the
    file cannot be read, or nothing has been kept.
    """

    name = "history"
    why: str | None = None

    def __init__(self, path: str, until: int = LAST_NS) -> None:
        self.path, self._until = path, until
        self._database = archive_file.reading(path)
        try:
            self.recorded, self.version = archive_story.host_of(self._database)
        except BaseException:
            self._database.close()
            raise
        self.host = dataclasses.replace(self.recorded, source_why="history")
        self.whole = True
        self.end: int | None = None
        self.rewind()

    def rewind(self) -> None:
        self.done = False
        self._events: Iterator[tuple[int, Event]] = archive_story.whole(self._database, self._until)

    def poll(self, timeout: float) -> list[Event]:
        """The next events, without waiting."""
        events: list[Event] = []
        for number, event in self._events:
            if self.end is not None and number > self.end:
                break
            events.append(event)
            if len(events) == BATCH:
                return events
        self.done = True
        return events

    def newest(self) -> int:
        """The id of the last event by now."""
        (number,) = self._database.execute("SELECT ifnull(max(id), 0) FROM events").fetchone()
        return int(number)

    def find(self, ts: int) -> int | None:
        """The id of the last of the newest events that happened at ``ts``, by its serve's clock."""
        row = self._database.execute(
            "SELECT max(id) FROM events WHERE id > (SELECT max(id) FROM events) - 4096"
            " AND (ts = ? OR json_extract(record, '$.ts') = ?)",
            (ts, ts),
        ).fetchone()
        return None if row[0] is None else int(row[0])

    def began(self) -> int:
        """When the first event that is kept happened; now, if there is none."""
        (ts,) = self._database.execute("SELECT min(ts) FROM events").fetchone()
        return clock.now_ns() if ts is None else int(ts)

    def probes(self) -> tuple[Probe, ...]:
        """Empty: not kept."""
        return ()

    def probe_runs(self) -> Mapping[str, ProbeRuns]:
        """Empty: not kept."""
        return {}

    def close(self) -> None:
        self._database.close()
