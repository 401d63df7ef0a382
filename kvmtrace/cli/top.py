"""``kvmtrace top``: the table of incidents and VMs, live, once, or of a recording."""

from __future__ import annotations

import os
import re
import sys

import click

from kvmtrace.cli.bundle import write_bundle
from kvmtrace.cli.console import show_snapshot
from kvmtrace.cli.inputs import (
    EventLog,
    RecordedLog,
    give_up_privileges,
    open_host_or_remote,
    open_recording,
    open_session,
    poll_timeouts,
)
from kvmtrace.cli.live_host import Watching
from kvmtrace.cli.options import (
    from_option,
    interval_option,
    json_option,
    source_option,
    utc_option,
)
from kvmtrace.cli.past import TIMES, PastLog, Span, open_history, span_of, span_options
from kvmtrace.cli.tape import RecordedTape
from kvmtrace.errors import KvmtraceError, UsageError
from kvmtrace.linux import clock
from kvmtrace.model import Snapshot
from kvmtrace.views.format import date_of


@click.command()
@click.option("--once", is_flag=True, help="Watch for one interval, print the table and exit.")
@json_option
@from_option
@span_options(
    "Show what serve has kept, from then on: what there was, what is over included.",
    f"Show what serve has kept, as it was then: {TIMES}. With --from: begin at a time of day"
    " (20:07:15), or so long before the end (5m).",
)
@interval_option
@utc_option
@source_option
def top(
    *,
    once: bool,
    as_json: bool,
    recording: str | None,
    since: int | None,
    until: int | None,
    at: str | None,
    history: str,
    interval: float,
    source: str,
) -> None:
    """Show a live table of poison incidents and VMs, and what to do.

    The live table needs a terminal; --once does not. --json needs --once and prints one object.
    With --from, --since or --at it shows what was: space plays it, < and > step through it.
    """
    if as_json and not once:
        raise UsageError("--json goes with --once", "`kvmtrace events --json` streams")
    span = span_of(since, until, at, history, recording)
    if not once and not on_terminal():
        raise UsageError(
            "top needs a terminal", "`kvmtrace top --once` prints the table, `events` follows"
        )
    if not once:
        _need_library()
    if span is not None:
        _show_history(span, interval, once=once, as_json=as_json)
    elif recording is not None:
        _show_recording(recording, at, interval, once=once, as_json=as_json)
    elif once:
        _top_once(source, interval, as_json)
    else:
        _watch(source, interval)


def _need_library() -> None:
    """Raises KvmtraceError if the live table's library is not there, or too old."""
    try:
        from kvmtrace.views.terminal import app  # noqa: F401, PLC0415 (a TUI library)
    except ImportError as error:
        if (error.name or "").partition(".")[0] not in ("textual", "rich"):
            raise
        raise KvmtraceError(
            f"the live table needs textual 1.0 or newer: {error}",
            "`kvmtrace top --once` prints the table without it",
        ) from error


def _show_recording(
    path: str, at: str | None, interval: float, *, once: bool, as_json: bool
) -> None:
    with open_recording(path, twice=True) as source:
        tape = RecordedTape(source)
        if at is not None:
            tape.seek(at)
        if once:
            show_snapshot(tape.snapshot(), tape.now(), as_json)
            return
        from kvmtrace.views.terminal import app, watched  # noqa: PLC0415 (a TUI library)

        def bundle() -> str:
            with open_recording(path) as whole:
                return _bundle(RecordedLog(whole), tape.snapshot(), tape.now(), here=False)

        shown = watched.Watched(
            tape.snapshot,
            tape.now,
            tape.recent,
            tape=tape,
            # A pipe cannot be read again.
            bundle=bundle if os.path.isfile(path) else None,
        )
        app.run(shown, interval)


def _show_history(span: Span, interval: float, *, once: bool, as_json: bool) -> None:
    # A moment is shown with what came after it.
    end = span.until if once or span.since is not None else clock.now_ns()
    with open_history(span.history, end) as source:
        if once:
            show_snapshot(PastLog(source, span).model(), span.until, as_json)
            return
        tape = RecordedTape(source, since=span.since or 0)
        if span.since is None:
            tape.seek_to(span.until)
        from kvmtrace.views.terminal import app, watched  # noqa: PLC0415 (a TUI library)

        app.run(watched.Watched(tape.snapshot, tape.now, tape.recent, tape=tape), interval)


def _watch(kind: str, interval: float) -> None:
    from kvmtrace.views.terminal import app, watched  # noqa: PLC0415 (a TUI library)

    watching = Watching(kind)

    def bundle() -> str:
        return _bundle(watching.log(), watching.snapshot(), watching.now(), here=True)

    shown = watched.Watched(
        watching.snapshot, watching.now, watching.recent, watching.status, bundle
    )
    watching.start()
    try:
        # The thread gives its own up once it has attached.
        give_up_privileges()
        app.run(shown, interval)
    finally:
        watching.close()


def _bundle(log: EventLog, snapshot: Snapshot | None, now: int, *, here: bool) -> str:
    wall = now if snapshot is None else snapshot.wall(now)
    stamp = re.sub("[^0-9]", "", date_of(wall))[:14]
    return write_bundle(log, f"kvmtrace-{log.host.name}-{stamp}", here=here)


def _top_once(source: str, interval: float, as_json: bool) -> None:
    with open_session(open_host_or_remote(source)) as session:
        for timeout in poll_timeouts(interval):
            session.pump(timeout)
        snapshot, now = session.snapshot(), session.now()
    show_snapshot(snapshot, now, as_json)


def on_terminal() -> bool:
    """Whether the live table can be shown: a terminal that can do more than print lines."""
    if os.environ.get("TERM", "dumb") == "dumb":
        return False
    return all(
        stream is not None and stream.isatty() for stream in (sys.stdin, sys.stdout, sys.stderr)
    )
