"""Events of serve's archive as one story, over restarts and reboots."""

from __future__ import annotations

import dataclasses
import sqlite3
from collections.abc import Iterator

from kvmtrace.errors import KvmtraceError
from kvmtrace.events import Event, Host, VmGone, VmSeen
from kvmtrace.session import archive_file
from kvmtrace.session.archive_file import Run
from kvmtrace.session.resumed import keys_of, rekeyed


def host_of(database: sqlite3.Connection) -> tuple[Host, str | None]:
    """The host of the last run, and the kvmtrace that watched it. Raises KvmtraceError."""
    found = archive_file.runs(database)
    if not found:
        raise KvmtraceError("nothing has been kept yet", "serve keeps what happens from its start")
    return found[-1].host, found[-1].version


def story(database: sqlite3.Connection, since: int, until: int) -> Iterator[Event]:
    """Events from ``since`` to ``until`` (ns since the epoch, by the wall clock), in order.

    VMs that were there at ``since`` come first. A VM ends with its boot, if not before. Keys of VMs
    are unique in the whole story.
    """
    base = 0
    boots: dict[str, list[Run]] = {}
    for run in archive_file.runs(database):
        boots.setdefault(run.boot, []).append(run)
    for number, runs in enumerate(boots.values()):
        is_last = number == len(boots) - 1
        highest = base
        for event in _of_boot(database, [run.number for run in runs], since, until, is_last):
            moved = rekeyed(event, lambda vm, base=base: base + vm)  # type: ignore[misc]
            highest = max([highest, *(key + 1 for key in keys_of(moved))])
            yield moved
        base = highest


def _of_boot(
    database: sqlite3.Connection, runs: list[int], since: int, until: int, is_last: bool
) -> Iterator[Event]:
    here: dict[int, VmSeen] = {}
    for _, event in archive_file.events_of(database, runs, until=since - 1, only_vms=True):
        _note(here, event)
    for seen in here.values():
        yield dataclasses.replace(seen, ts=since)
    last = since
    for _, event in archive_file.events_of(database, runs, since, until):
        _note(here, event)
        last = event.ts
        yield event
    if not is_last:
        for vm in here:
            yield VmGone(last, vm)


def _note(here: dict[int, VmSeen], event: Event) -> None:
    if isinstance(event, VmSeen):
        here[event.vm] = event
    elif isinstance(event, VmGone):
        here.pop(event.vm, None)
