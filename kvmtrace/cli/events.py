"""``kvmtrace events``: one line per event."""

from __future__ import annotations

import contextlib
import functools
import itertools
import os
import select
import sys
from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING

import click
from click.core import ParameterSource

from kvmtrace.cli.console import json_is_utf8, print_line, print_status, stdout_is_terminal
from kvmtrace.cli.event_filter import EventFilter, filter_options, require_vm
from kvmtrace.cli.inputs import give_up_privileges, open_host_or_remote, open_session, poll_timeouts
from kvmtrace.cli.options import duration_option, json_option, source_option, utc_option
from kvmtrace.cli.past import TIMES, open_history, span_of, span_options
from kvmtrace.cli.past_events import PastEvents
from kvmtrace.cli.signals import stop
from kvmtrace.errors import KvmtraceError
from kvmtrace.events import LAST_NS, Found, Lost, Owned, VmSeen
from kvmtrace.model import CorrelatedEvent, Snapshot
from kvmtrace.sources.remote import RemoteSource
from kvmtrace.views import event_lines
from kvmtrace.views.format import counted, date_of, zone_of
from kvmtrace.views.tables.header import watching_text
from kvmtrace.vmm import processes
from kvmtrace.wording import some_of

if TYPE_CHECKING:
    from kvmtrace.session.archived import ArchivedSource

_MAX_NAMED = 8
_AROUND = 60_000_000_000


@click.command()
@json_option
@filter_options
@span_options(
    "First print what serve has kept, or has seen if it keeps nothing, from then on:",
    f"Print what serve has kept of the minute before and the minute after, and stop: {TIMES}.",
)
@click.option("--count", type=click.IntRange(min=1), metavar="N", help="Stop after N events.")
@duration_option
@utc_option
@source_option
@click.pass_context
def events(
    ctx: click.Context,
    *,
    as_json: bool,
    vm: str | None,
    states: tuple[tuple[str, ...], ...],
    kinds: tuple[tuple[str, ...], ...],
    since: int | None,
    until: int | None,
    at: str | None,
    history: str,
    count: int | None,
    duration: float | None,
    source: str,
) -> None:
    """Print a line for each event as it happens.

    VMs and poisoned pages that exist already are no events: they are counted on stderr. With
    --until or --at it does not go on with what happens: it prints what serve has kept, and stops.

    With --json each line is a JSON object. What exists already comes first, marked with "before".
    Fields with unknown values are absent.
    """
    printing = _Printing(EventPrinter(as_json), EventFilter.of_options(kinds, states, vm), count)
    span = span_of(since, until, at, history)
    if span is not None and (until is not None or at is not None):
        first, last = span.since, span.until
        if first is None:
            first, last = last - _AROUND, last + _AROUND
        with open_history(history, last) as kept:
            past = PastEvents(kept, first)
            _report_begin(first, kept.began())
            printing.print_past(past)
            if vm is not None and not printing.is_done:
                require_vm(vm, past.seen.values())
        return
    with contextlib.ExitStack() as stack:
        kept_since = None
        if since is not None:
            is_given = ctx.get_parameter_source("history") != ParameterSource.DEFAULT
            kept_since = _kept(stack, history, is_given=is_given)
        past_since = None if since is None or kept_since is None else PastEvents(kept_since, since)
        if past_since is not None and kept_since is not None and since is not None:
            _report_begin(since, kept_since.began())
        _follow(printing, source, duration, since, past_since)


def _follow(
    printing: _Printing,
    source: str,
    duration: float | None,
    since: int | None,
    past: PastEvents | None,
) -> None:
    """Print what happens, after what was kept and what a serve has seen."""
    attached = open_host_or_remote(source)
    is_remote = isinstance(attached, RemoteSource)
    with open_session(attached) as session:
        give_up_privileges()
        batch = session.pump(0)
        start = session.snapshot()
        vm = printing.wanted.vm
        if vm is not None and past is None:
            _require_vm(vm, batch)
        print_status(f"kvmtrace: {watching_text(start)}")
        if past is not None:
            is_whole = past.until(batch if is_remote else ())
            printing.print_past(past)
            if printing.is_done:
                return
            since = None if is_whole or not is_remote else past.last + 1
            if not is_remote:
                known = f"{date_of(past.last)} {zone_of(past.last)}"
                print_status(f"kvmtrace: from {known} until now no serve kept what happened")
        elif since is not None:
            _report_gap(since, batch if is_remote else None)
        there = _There()
        before, batch = there.split(batch, start, since, is_remote=is_remote)
        if not printing.as_json:
            before = []  # counted in this line
            if text := _already_here(start, is_remote=is_remote):
                print_status(f"kvmtrace: {text}")
        for timeout in itertools.chain([None], poll_timeouts(duration, reader_gone)):
            if timeout is not None:
                before, batch = there.split(session.pump(timeout))
            printing.print(before, batch, functools.cache(session.snapshot))
            if printing.is_done:
                return


def _kept(stack: contextlib.ExitStack, history: str, *, is_given: bool) -> ArchivedSource | None:
    """What serve has kept; None if that is nowhere and nobody said where."""
    try:
        return stack.enter_context(open_history(history, LAST_NS))
    except KvmtraceError as error:
        if is_given:
            raise
        print_status(f"kvmtrace: nothing that was kept can be read: {error.message}")
        return None


class _Printing:
    """What is printed, and whether that is enough. ``count``: so many events; None: all."""

    def __init__(self, lines: EventPrinter, wanted: EventFilter, count: int | None) -> None:
        self._lines, self.wanted, self._left = lines, wanted, count
        self.as_json = lines.as_json

    @property
    def is_done(self) -> bool:
        """Whether no more is to be printed."""
        return self._left == 0 or stop.requested

    def print(
        self,
        before: list[CorrelatedEvent],
        batch: list[CorrelatedEvent],
        snapshot: Callable[[], Snapshot],
    ) -> None:
        """Print what was there before, and what happened."""
        if before:
            self._lines.print_before(self.wanted.chosen(before, snapshot))
        for correlated in self.wanted.chosen(batch, snapshot):
            if self._lines.print(correlated) and self._left is not None:
                self._left -= 1
                if not self._left:
                    return
        if not self.wanted.has_lost:
            _report_lost(batch)

    def print_past(self, past: PastEvents) -> None:
        """Print what was kept."""
        for batch in past.batches():
            self.print([], batch, past.snapshot)
            if self.is_done:
                return


class EventPrinter:
    """Prints events on stdout, as JSON or text."""

    def __init__(self, as_json: bool) -> None:
        if as_json:
            json_is_utf8()
        self.as_json = as_json
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
    else:
        _report_begin(since, min((one.wall for one in history), default=since))


def _report_begin(since: int, first: int) -> None:
    if first > since:
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
