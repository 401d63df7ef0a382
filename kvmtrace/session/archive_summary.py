"""A summary of the archive: a few events that stand for all, so that a start reads these only.

It outlives the events themselves, which are deleted when they are old.
"""

from __future__ import annotations

import json
import sqlite3
from collections.abc import Iterable

from kvmtrace.events import Event
from kvmtrace.session import archive_file
from kvmtrace.session.archive_story import Story
from kvmtrace.session.history import CompactLog
from kvmtrace.sources.codec import DECODE_ERRORS, Decoder, checked, to_record


def load(database: sqlite3.Connection) -> tuple[CompactLog, Story]:
    """What led to the state after the last event, and the story up to there."""
    log = CompactLog()
    runs = {run.number: run for run in archive_file.runs(database)}
    upto, number, next_key = database.execute(
        "SELECT upto, run, next_key FROM summarized"
    ).fetchone()
    decoder = Decoder()
    known = []
    for (record,) in database.execute("SELECT record FROM summary ORDER BY id"):
        event = archive_file.decoded(decoder, record)
        if event is not None:
            known.append(event)
            log.add(event)
    story = Story(runs.get(number), known, next_key)
    for _, run, event in archive_file.events_of(database, upto):
        if run in runs:
            for one in story.add(runs[run], event):
                log.add(one)
    return log, story


def store(
    database: sqlite3.Connection, events: Iterable[Event], upto: int, run: int, next_key: int
) -> None:
    """Replace the summary, within a transaction. ``upto``: id of the last event that it has."""
    database.execute("DELETE FROM summary")
    database.executemany(
        "INSERT INTO summary (record) VALUES (?)", ((record_of(event),) for event in events)
    )
    database.execute("UPDATE summarized SET upto = ?, run = ?, next_key = ?", (upto, run, next_key))


def record_of(event: Event) -> str:
    """The event as it is kept."""
    try:
        return json.dumps(to_record(checked(event)), ensure_ascii=False, separators=(",", ":"))
    except DECODE_ERRORS:
        return UNWRITABLE


UNWRITABLE = "{}"
"""In place of an event that no reader would accept: read as one that is not understood."""
