"""``kvmtrace events``: one line per event."""

from __future__ import annotations

import os
import select
import sys

import click

from kvmtrace import sanitize
from kvmtrace.cli.console import json_is_utf8, print_line, print_status
from kvmtrace.cli.inputs import give_up_privileges, open_host_or_remote, open_session, poll_timeouts
from kvmtrace.cli.options import duration_option, json_option, with_source
from kvmtrace.errors import UsageError
from kvmtrace.events import Event, VmSeen
from kvmtrace.model import CorrelatedEvent, Snapshot
from kvmtrace.sources.remote import RemoteSource
from kvmtrace.views import event_lines
from kvmtrace.views.tables.header import watching_text
from kvmtrace.vmm import processes


@click.command()
@json_option
@click.option(
    "--vm",
    metavar="PID|NAME",
    help="Print only events of this VM, and what was lost. The VM must be known at the start, or "
    "be given as the pid of a live process.",
)
@click.option("--count", type=click.IntRange(min=1), metavar="N", help="Stop after N lines.")
@duration_option
@with_source
def events(
    as_json: bool, vm: str | None, count: int | None, duration: float | None, source: str
) -> None:
    """Print one line per event as it happens.

    With --json each line is a JSON object. Fields with unknown values are absent.
    """
    text = event_lines.json_text if as_json else event_lines.event_text
    if as_json:
        json_is_utf8()
    attached = open_host_or_remote(source)
    with open_session(attached) as session:
        give_up_privileges()
        batch = session.pump(0)
        start = session.snapshot()
        if isinstance(attached, RemoteSource):
            # The serve's history is not news. Its live VMs are listed, as if just attached.
            batch = [one for one in batch if _is_live_vm(one.event, start)]
        if vm is not None:
            _require_vm(vm, batch)
        print_status(f"kvmtrace: {watching_text(start)}")
        timeouts = poll_timeouts(duration, reader_gone)
        while True:
            for correlated in batch:
                if vm is not None and not _concerns(correlated, vm):
                    continue
                line = text(correlated)
                if line is None:
                    continue
                print_line(line)
                if count is not None:
                    count -= 1
                    if not count:
                        return
            timeout = next(timeouts, None)
            if timeout is None:
                return
            batch = session.pump(timeout)


def _is_live_vm(event: Event, snapshot: Snapshot) -> bool:
    vm = snapshot.vms.get(event.vm) if isinstance(event, VmSeen) else None
    return vm is not None and not vm.gone


def _is_named(seen: VmSeen | None, vm: str) -> bool:
    if seen is None:
        return False
    names = (str(seen.pid), f"pid {seen.pid}", seen.name, seen.label, seen.vmid)
    return vm in names or (seen.uuid is not None and vm.lower() == seen.uuid.lower())


def _concerns(correlated: CorrelatedEvent, vm: str) -> bool:
    """Whether a line is about this VM. Lost events may be; clock steps concern every VM."""
    return (
        _is_named(correlated.vm, vm)
        or any(_is_named(seen, vm) for _, seen in correlated.owners)
        or correlated.event.kind in ("lost", "clock")
        or (correlated.event.kind == "sigbus" and vm == str(getattr(correlated.event, "pid", None)))
    )


def _require_vm(vm: str, batch: list[CorrelatedEvent]) -> None:
    # Pids are shorter than that; int() raises for thousands of digits.
    if vm.isascii() and vm.isdecimal() and len(vm) <= 10 and os.path.exists(f"/proc/{int(vm)}"):
        return
    known = [one.vm for one in batch if one.vm]
    if any(_is_named(seen, vm) for seen in known):
        return
    names = {seen.label for seen in known}
    for pid in processes.vm_processes():
        found = processes.identify(pid).identity
        seen = VmSeen(0, 0, pid, found.name, found.uuid, found.vmm, found.vmid)
        if _is_named(seen, vm):
            return
        names.add(seen.label)
    listed = ", ".join(sorted(names)[:8]) + (", …" if len(names) > 8 else "")
    raise UsageError(
        f"no VM {sanitize.clean(vm)!r} here", f"there are: {listed}" if names else "none is running"
    )


def reader_gone() -> bool:
    """Whether stdout is a pipe whose reader has left, before there is a line to write."""
    try:
        poller = select.poll()
        poller.register(sys.stdout.fileno(), 0)
        return any(what & select.POLLERR for _, what in poller.poll(0))
    except (OSError, ValueError):
        return False
