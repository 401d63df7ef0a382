"""top, events and serve: what happens now."""

from __future__ import annotations

import os
import resource
import select
import sys
import time

import click

from kvmtrace import sanitize
from kvmtrace.cli.errors import json_is_utf8, say, stop, tell
from kvmtrace.cli.inputs import (
    POLL_SECONDS,
    attach,
    give_up_privileges,
    here,
    open_door,
    session_on,
)
from kvmtrace.cli.options import (
    duration_option,
    interval_option,
    json_option,
    with_source,
)
from kvmtrace.cli.printing import show_snapshot
from kvmtrace.errors import UsageError
from kvmtrace.events import Event, VmSeen
from kvmtrace.linux.tracefs import mount
from kvmtrace.model import CorrelatedEvent, Snapshot
from kvmtrace.sources.remote import RemoteSource
from kvmtrace.views import event_lines
from kvmtrace.views.tables.header import watching_text
from kvmtrace.views.web.server import check_listen
from kvmtrace.vmm import processes


@click.command()
@click.option("--once", is_flag=True, help="Watch for one interval, print the table, exit.")
@json_option
@interval_option
@with_source
def top(once: bool, as_json: bool, interval: float, source: str) -> None:
    """Live table of VMs and poison incidents (needs a terminal, or --once).

    --json goes with --once and prints one object.
    """
    if as_json and not once:
        raise UsageError("--json goes with --once", "`kvmtrace events --json` streams")
    if once:
        _top_once(source, interval, as_json)
        return
    if not on_terminal():
        raise UsageError(
            "top needs a terminal", "`kvmtrace top --once` prints the table, `events` follows"
        )
    from kvmtrace.views.terminal import app as view  # noqa: PLC0415 (a TUI library)

    with session_on(here(source)) as session:
        give_up_privileges()
        session.start()
        view.run(session.snapshot, interval, now=session.now)


def _top_once(source: str, interval: float, as_json: bool) -> None:
    with session_on(here(source)) as session:
        deadline = time.monotonic() + interval
        while not stop.asked and (left := deadline - time.monotonic()) > 0:
            session.pump(min(left, POLL_SECONDS))
        session.pump(0)
        snapshot, now = session.snapshot(), session.now()
    show_snapshot(snapshot, now, as_json)


def on_terminal() -> bool:
    if os.environ.get("TERM", "dumb") == "dumb":
        return False
    return all(
        stream is not None and stream.isatty() for stream in (sys.stdin, sys.stdout, sys.stderr)
    )


@click.command()
@json_option
@click.option(
    "--vm",
    metavar="PID|NAME",
    help="Only what concerns this VM (and what was lost). It must be known at the start, or be "
    "the pid of a live process.",
)
@click.option("--count", type=click.IntRange(min=1), metavar="N", help="Stop after N lines.")
@duration_option
@with_source
def events(
    as_json: bool, vm: str | None, count: int | None, duration: float | None, source: str
) -> None:
    """One line per event, as it happens.

    --json prints one JSON object per line: integers as integers, what is unknown is absent.
    """
    text = event_lines.json_text if as_json else event_lines.event_text
    if as_json:
        json_is_utf8()
    attached = here(source)
    with session_on(attached) as session:
        give_up_privileges()
        deadline = time.monotonic() + duration if duration else None
        told = session.pump(0)
        start = session.snapshot()
        if isinstance(attached, RemoteSource):
            # All that happened before is known, but is no news: what is, as if just attached, is.
            told = [one for one in told if _lives(one.event, start)]
        if vm is not None:
            _require_vm(vm, told)
        tell(f"kvmtrace: {watching_text(start)}")
        last_look = False
        while True:
            for one in told:
                if vm is not None and not _concerns(one, vm):
                    continue
                line = text(one)
                if line is None:
                    continue
                say(line)
                if count is not None:
                    count -= 1
                    if not count:
                        return
            wait = POLL_SECONDS
            if deadline is not None:
                wait = min(wait, deadline - time.monotonic())
            if stop.asked or wait <= 0 or reader_gone():
                if last_look:
                    return
                # What the kernel counted meanwhile and has not reported yet belongs to this run.
                last_look, wait = True, 0
            told = session.pump(wait)


def _lives(event: Event, snapshot: Snapshot) -> bool:
    vm = snapshot.vms.get(event.vm) if isinstance(event, VmSeen) else None
    return vm is not None and not vm.gone


def _is(seen: VmSeen | None, vm: str) -> bool:
    if seen is None:
        return False
    names = (str(seen.pid), f"pid {seen.pid}", seen.name, seen.label, seen.vmid)
    return vm in names or (seen.uuid is not None and vm.lower() == seen.uuid.lower())


def _concerns(told: CorrelatedEvent, vm: str) -> bool:
    """Whether a line is about this VM; what was lost may have been, and times are everybody's."""
    return (
        _is(told.vm, vm)
        or any(_is(seen, vm) for _, seen in told.owners)
        or told.event.kind in ("lost", "clock")
        or (told.event.kind == "sigbus" and vm == str(getattr(told.event, "pid", None)))
    )


def _require_vm(vm: str, told: list[CorrelatedEvent]) -> None:
    # No pid is longer, and int() refuses thousands of digits.
    if vm.isascii() and vm.isdecimal() and len(vm) <= 10 and os.path.exists(f"/proc/{int(vm)}"):
        return
    known = [one.vm for one in told if one.vm]
    if any(_is(seen, vm) for seen in known):
        return
    names = {seen.label for seen in known}
    for pid in processes.vm_processes():
        found = processes.identify(pid).identity
        seen = VmSeen(0, 0, pid, found.name, found.uuid, found.vmm, found.vmid)
        if _is(seen, vm):
            return
        names.add(seen.label)
    listed = ", ".join(sorted(names)[:8]) + (", …" if len(names) > 8 else "")
    raise UsageError(
        f"no VM {sanitize.clean(vm)!r} here", f"there are: {listed}" if names else "none is running"
    )


def reader_gone() -> bool:
    """Whether stdout is a pipe that nobody will read any more, before there is a line to write."""
    try:
        poller = select.poll()
        poller.register(sys.stdout.fileno(), 0)
        return any(what & select.POLLERR for _, what in poller.poll(0))
    except (OSError, ValueError):
        return False


@click.command()
@click.option(
    "--listen",
    metavar="[HOST:]PORT",
    help="Where to serve; 'PORT' is loopback, ':PORT' every address, port 0 a free one.  "
    "[default: 127.0.0.1:9750]",
)
@click.option(
    "--max-vms",
    type=click.IntRange(min=1),
    metavar="N",
    help='VMs with series of their own; the rest share vm="other".  [default: 500]',
)
@click.option(
    "--allow-host",
    multiple=True,
    metavar="NAME",
    help="On loopback: answer those who ask for this name, too (behind a proxy that passes it on).",
)
@with_source
def serve(
    listen: str | None, max_vms: int | None, allow_host: tuple[str, ...], source: str
) -> None:
    """Serve /metrics for Prometheus, /-/healthy and a landing page."""
    from kvmtrace.views.web import metrics  # noqa: PLC0415 (prometheus_client)

    def kinds() -> list[tuple[str, str]]:
        types, results = mount.memory_failure_names()
        return [(kind, result) for kind in types.values() for result in results.values()]

    listen = listen or metrics.DEFAULT_LISTEN
    check_listen(listen)
    with session_on(attach(source)) as session, open_door(session, started=False) as answering:
        server = metrics.serve(
            listen,
            session,
            kinds=kinds,
            max_vms=max_vms or metrics.DEFAULT_MAX_VMS,
            now=session.now,
            names=allow_host,
            started=False,
        )
        try:
            give_up_privileges()
            server.start()
            if answering is not None:
                answering.start()
            session.start()
            tell(f"serving {server.url}/metrics")
            told = False
            while not stop.asked and session.failure is None:
                time.sleep(POLL_SECONDS)
                if not told and (session.shortages or server.dropped["descriptors"]):
                    limit, _ = resource.getrlimit(resource.RLIMIT_NOFILE)
                    tell(f"kvmtrace: no file descriptors left (limit {limit}): events may be lost")
                    told = True
            if session.failure is not None:
                raise session.failure
        finally:
            server.close()
