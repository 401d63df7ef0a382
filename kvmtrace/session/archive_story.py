"""Events of serve's archive as one story, over restarts and reboots.

At a reboot every VM ends and no page is poisoned any more (``events.Reboot``). If a serve could not
read the events of earlier runs, it gave new keys to all VMs, so the VMs of those runs end here.
"""

from __future__ import annotations

import dataclasses
import sqlite3
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any

from kvmtrace.bounded import BoundedDict
from kvmtrace.errors import KvmtraceError
from kvmtrace.events import (
    LAST_NS,
    Event,
    Found,
    Host,
    Owned,
    Owner,
    Poison,
    Reboot,
    Unpoison,
    VmGone,
    VmSeen,
)
from kvmtrace.model import MAX_INCIDENTS
from kvmtrace.session import archive_file
from kvmtrace.session.archive_file import Run


class Story:
    """Joins runs. ``here``: {key: the VM}, of those that run. ``next_key``: above all keys."""

    def __init__(self, run: Run | None = None, events: Iterable[Event] = (), next_key: int = 0):
        """``run``, ``events``: what there was so far, and the run of the last of it."""
        self.here: dict[int, VmSeen] = {}
        self.next_key = next_key
        self._run = run
        for event in events:
            self._note(event)

    def begin(self, run: Run) -> list[Event]:
        """Return what ends before events of ``run``: by a reboot, or because VMs have new keys."""
        before, self._run = self._run, run
        if before is None or before.number == run.number:
            return []
        is_same = before.is_same_boot(run)
        if is_same and run.first_key in (0, before.first_key):
            return []
        gone: list[Event] = [VmGone(run.began, vm) for vm in self.here]
        self.here.clear()
        return gone if is_same else [Reboot(run.began), *gone]

    def add(self, run: Run, event: Event) -> list[Event]:
        """Return an event of a run, with what has to come before it."""
        before = self.begin(run)
        if run.first_key:
            event = rekeyed(event, lambda vm: vm + run.first_key)
        self._note(event)
        return [*before, event]

    def _note(self, event: Event) -> None:
        self.next_key = max([self.next_key, *(key + 1 for key in keys_of(event))])
        match event:
            case VmSeen():
                self.here[event.vm] = event
            case VmGone():
                self.here.pop(event.vm, None)


def host_of(database: sqlite3.Connection) -> tuple[Host, str | None]:
    """The host of the last run, and the kvmtrace that watched it. Raises KvmtraceError."""
    found = archive_file.runs(database)
    if not found:
        raise KvmtraceError("nothing has been kept yet", "serve keeps what happens from its start")
    return found[-1].host, found[-1].version


def whole(database: sqlite3.Connection, until: int = LAST_NS) -> Iterator[tuple[int, Event]]:
    """All events until then (ns since the epoch, by the wall clock), as (id, event)."""
    runs = {run.number: run for run in archive_file.runs(database)}
    story = Story()
    for number, run, event in archive_file.events_of(database, until=until):
        if run not in runs:  # it has just begun
            runs = {one.number: one for one in archive_file.runs(database)}
        for one in story.add(runs[run], event):
            yield number, one


def window(database: sqlite3.Connection, since: int, until: int) -> Iterator[Event]:
    """Events from ``since`` to ``until``; first what was there at ``since``.

    That is the VMs, as seen then, and how pages were poisoned that were so still.
    """
    is_begun = False
    here: dict[int, VmSeen] = {}
    pages: BoundedDict[int, list[Event]] = BoundedDict(MAX_INCIDENTS)
    for _, event in whole(database, until):
        if event.ts >= since:
            if not is_begun:
                is_begun = True
                yield from _there(here, pages, since)
            yield event
        elif not is_begun:
            _note(here, pages, event)
    if not is_begun:
        yield from _there(here, pages, since)


def _note(here: dict[int, VmSeen], pages: BoundedDict[int, list[Event]], event: Event) -> None:
    match event:
        case VmSeen():
            here[event.vm] = event
        case VmGone():
            here.pop(event.vm, None)
        case Poison() | Found() | Owned():
            known = pages.setdefault(event.pfn, [])
            if len(known) < _OF_PAGE and not any(_is_again(one, event) for one in known):
                known.append(event)
        case Unpoison():
            pages.pop(event.pfn, None)
        case Reboot():
            pages.clear()


_OF_PAGE = 64


def _is_again(one: Event, event: Event) -> bool:
    return dataclasses.replace(one, ts=event.ts) == event


def _there(
    here: Mapping[int, VmSeen], pages: Mapping[int, list[Event]], since: int
) -> Iterator[Event]:
    for events in pages.values():
        owners = [owner.vm for event in events for owner in _owners(event)]
        if not owners or any(vm in here for vm in owners):
            yield from events
    for seen in here.values():
        yield dataclasses.replace(seen, ts=since)


def _owners(event: Event) -> tuple[Owner, ...]:
    match event:
        case Owned():
            return (event.owner,)
        case Poison(gmem=gmem) if gmem is not None:
            return gmem.owners
    return ()


# -- keys


def rekeyed(event: Event, key: Callable[[int], int]) -> Event:
    """The event with other keys for its VMs."""
    changes: dict[str, Any] = {}
    match event:
        case Owned():
            changes["owner"] = dataclasses.replace(event.owner, vm=key(event.owner.vm))
        case Poison(gmem=gmem) if gmem is not None:
            owners = tuple(dataclasses.replace(one, vm=key(one.vm)) for one in gmem.owners)
            changes["gmem"] = dataclasses.replace(gmem, owners=owners)
        case _ if (vm := getattr(event, "vm", None)) is not None:
            changes["vm"] = key(vm)
    return dataclasses.replace(event, **changes) if changes else event


def keys_of(event: Event) -> tuple[int, ...]:
    """The keys of the VMs that an event names."""
    if owners := _owners(event):
        return tuple(owner.vm for owner in owners)
    vm = getattr(event, "vm", None)
    return () if vm is None else (vm,)
