"""``kvmtrace events``: one line per event."""

from __future__ import annotations

import functools
import os
import select
import sys
from collections.abc import Iterator

import click

from kvmtrace.cli.console import json_is_utf8, print_line, print_status, stdout_is_terminal
from kvmtrace.cli.event_filter import EventFilter, filter_options, require_vm
from kvmtrace.cli.inputs import give_up_privileges, open_host_or_remote, open_session, poll_timeouts
from kvmtrace.cli.options import (
    duration_option,
    json_option,
    point_in_time,
    utc_option,
    with_source,
)
from kvmtrace.events import Found, Lost, Owned, VmSeen
from kvmtrace.model import CorrelatedEvent, Snapshot
from kvmtrace.sources.remote import RemoteSource
from kvmtrace.views import event_lines
from kvmtrace.views.format import counted, date_of, zone_of
from kvmtrace.views.tables.header import watching_text
from kvmtrace.vmm import processes
from kvmtrace.wording import some_of

_MAX_NAMED = 8


@click.command()
@json_option
@filter_options
@click.option(
    "--since",
    type=point_in_time,
    metavar="TIME",
    help="First print what a running serve has seen since then: 2h (ago), 20:15, 2026-09-21T20:15.",
)
@click.option("--count", type=click.IntRange(min=1), metavar="N", help="Stop after N events.")
@duration_option
@utc_option
@with_source
def events(
    *,
    as_json: bool,
    vm: str | None,
    states: tuple[tuple[str, ...], ...],
    kinds: tuple[tuple[str, ...], ...],
    since: int | None,
    count: int | None,
    duration: float | None,
    source: str,
) -> None:
    """Print a line for each event as it happens.

    VMs and poisoned pages that exist already are no events: they are counted on stderr.

    With --json each line is a JSON object. What exists already comes first, marked with "before".
    Fields with unknown values are absent.
    """
    lines = EventPrinter(as_json)
    wanted = EventFilter.of_options(kinds, states, vm)
    attached = open_host_or_remote(source)
    is_remote = isinstance(attached, RemoteSource)
    with open_session(attached) as session:
        give_up_privileges()
        batch = session.pump(0)
        start = session.snapshot()
        if vm is not None:
            _require_vm(vm, batch)
        print_status(f"kvmtrace: {watching_text(start)}")
        if since is not None:
            _report_gap(since, batch if is_remote else None)
        there = _There()
        before, batch = there.split(batch, start, since, is_remote=is_remote)
        if not as_json:
            before = []  # counted in this line
            if text := _already_here(start, is_remote=is_remote):
                print_status(f"kvmtrace: {text}")
        timeouts = poll_timeouts(duration, reader_gone)
        while True:
            snapshot = functools.cache(session.snapshot)
            if before:
                lines.print_before(wanted.chosen(before, snapshot))
            for correlated in wanted.chosen(batch, snapshot):
                if lines.print(correlated) and count is not None:
                    count -= 1
                    if not count:
                        return
            if not wanted.has_lost:
                _report_lost(batch)
            timeout = next(timeouts, None)
            if timeout is None:
                return
            before, batch = there.split(session.pump(timeout))


class EventPrinter:
    """Prints events on stdout, as JSON or text."""

    def __init__(self, as_json: bool) -> None:
        if as_json:
            json_is_utf8()
        self._text = None if as_json else event_lines.EventText(dated=not stdout_is_terminal())

    def print(self, correlated: CorrelatedEvent) -> bool:
        """Print an event; whether it has a line."""
        if self._text is None:
            line = event_lines.json_text(correlated)
            lines = [] if line is None else [line]
        else:
            lines = self._text.lines(correlated)
        for one in lines:
            print_line(one)
        return bool(lines)

    def print_before(self, correlated: list[CorrelatedEvent]) -> None:
        """Print what was there before: in JSON on stdout, of text only the pages, on stderr."""
        if self._text is None:
            for one in correlated:
                if line := event_lines.json_text(one, before=True):
                    print_line(line)
            return
        pages = [f"{one.event.pfn:#x}" for one in correlated if isinstance(one.event, Found)]
        if pages:
            some = some_of(pages, _MAX_NAMED)
            print_status(f"kvmtrace: {counted(len(pages), 'page')} poisoned before now: {some}")


class _There:
    """Separates what was there before the command from what happens."""

    def __init__(self) -> None:
        self._vms: set[int] = set()
        self._incidents: set[str | None] = set()

    def split(
        self,
        batch: list[CorrelatedEvent],
        start: Snapshot | None = None,
        since: int | None = None,
        *,
        is_remote: bool = False,
    ) -> tuple[list[CorrelatedEvent], list[CorrelatedEvent]]:
        """(What was there, what happened). ``start``: this is the first batch, and what it led to.

        The first batch of a serve is its history: its live VMs were there, and what happened since
        ``since`` is an event; the rest is left out.
        """
        there: list[CorrelatedEvent] = []
        happened: list[CorrelatedEvent] = []
        for one in batch:
            was_there = self._was_there(one, start)
            if start is not None and is_remote:
                if since is not None and one.wall >= since:
                    happened.append(one)
                elif was_there and isinstance(one.event, VmSeen):
                    there.append(one)
            else:
                (there if was_there else happened).append(one)
        return there, happened

    def _was_there(self, one: CorrelatedEvent, start: Snapshot | None) -> bool:
        match one.event:
            case VmSeen(vm=key):
                vm = start.vms.get(key) if start is not None else None
                if vm is not None and not vm.gone:
                    self._vms.add(key)
                # It comes again when more is known of the VM.
                return key in self._vms
            case Found():
                self._incidents.add(one.incident)
                return True
            case Owned():
                return one.incident in self._incidents
        return False


def _report_gap(since: int, history: list[CorrelatedEvent] | None) -> None:
    """Report from when on events are known, if that is later than what was asked for."""
    if history is None:
        print_status("kvmtrace: no serve runs here: what happened before now is not known")
    elif (first := min((one.wall for one in history), default=since)) > since:
        known = f"{date_of(first)} {zone_of(first)}"
        print_status(f"kvmtrace: the history of the serve begins at {known}")


def _already_here(start: Snapshot, *, is_remote: bool) -> str | None:
    vms = sum(not vm.gone for vm in start.vms.values())
    # A first batch that is no history may have news, too.
    there = [one for one in start.incidents if is_remote or one.before_start]
    incidents = sum(incident.state != "closed" for incident in there)
    parts = [counted(vms, "VM")] * bool(vms)
    parts += [f"{counted(incidents, 'open incident')} (see `kvmtrace explain`)"] * bool(incidents)
    return f"already here: {' and '.join(parts)}" if parts else None


def _report_lost(batch: list[CorrelatedEvent]) -> None:
    """Nothing is lost silently, whatever kinds are printed."""
    for one in batch:
        if isinstance(one.event, Lost):
            print_status(f"kvmtrace: {one.event.count} lost at {one.event.where}")


def _require_vm(vm: str, batch: list[CorrelatedEvent]) -> None:
    # Pids are shorter than that; int() raises for thousands of digits.
    if vm.isascii() and vm.isdecimal() and len(vm) <= 10 and os.path.exists(f"/proc/{int(vm)}"):
        return
    require_vm(vm, _vms_here(batch))


def _vms_here(batch: list[CorrelatedEvent]) -> Iterator[VmSeen]:
    """The VMs that were reported, then those that only /proc shows."""
    yield from (one.vm for one in batch if one.vm)
    for pid in processes.vm_processes():
        found = processes.identify(pid).identity
        yield VmSeen(0, 0, pid, found.name, found.uuid, found.vmm, found.vmid)


def reader_gone() -> bool:
    """Whether stdout is a pipe whose reader has left, before there is a line to write."""
    try:
        poller = select.poll()
        poller.register(sys.stdout.fileno(), 0)
        return any(what & select.POLLERR for _, what in poller.poll(0))
    except (OSError, ValueError):
        return False
