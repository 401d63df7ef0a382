"""``kvmtrace explain``: what is open, or what happened to a page or a VM, and what to do."""

from __future__ import annotations

import contextlib
import shlex

import click

from kvmtrace.cli.completion import complete_target
from kvmtrace.cli.console import print_json, print_lines, terminal_width
from kvmtrace.cli.inputs import EventLog, RecordedLog, load_log, open_recording
from kvmtrace.cli.options import from_option, json_option, source_option, utc_option, watch_option
from kvmtrace.cli.past import TIMES, PastLog, open_history, span_of, span_options
from kvmtrace.cli.tape import MomentLog
from kvmtrace.model import Snapshot
from kvmtrace.sanitize import clean
from kvmtrace.views import explain as explain_view
from kvmtrace.views import explain_screen, lookup
from kvmtrace.views.stamp import Stamp


@click.command()
@click.argument(
    "target",
    required=False,
    metavar="[INCIDENT|PFN|ADDRESS@VM|VM|DIMM]",
    shell_complete=complete_target,
)
@click.option("--evidence", is_flag=True, help="Show what each statement rests on.")
@from_option
@span_options(
    "Explain what serve has kept: what there was from then on, what is over included.",
    f"Explain what serve has kept, as it was then: {TIMES}. With --from: the recording, at a time"
    " of day or so long before its end (5m).",
)
@json_option
@utc_option
@watch_option
@source_option
def explain(
    *,
    target: str | None,
    evidence: bool,
    recording: str | None,
    since: int | None,
    until: int | None,
    at: str | None,
    history: str,
    as_json: bool,
    duration: float,
    source: str,
) -> None:
    """Explain what is open: what to do first, then what happened.

    Of a target: an incident's id or its beginning; a page frame of the host (PFN, 0x103275); a
    guest physical address or a gfn (0x8000@web-1); a VM by name, uuid, pid or part of its name; a
    DIMM by its label. A target without poisoned pages is no error: the status is 0.

    With --at or --since, what is to be done is what was to be done then.

    \b
    Example: kvmtrace explain web-1
    """
    span = span_of(since, until, at, history, recording)
    with contextlib.ExitStack() as stack:
        if span is not None:
            log: EventLog = PastLog(stack.enter_context(open_history(history, span.until)), span)
        elif recording is not None:
            opened = stack.enter_context(open_recording(recording, twice=at is not None))
            log = RecordedLog(opened) if at is None else MomentLog(opened, at)
        else:
            log = stack.enter_context(load_log(None, source, duration))
        snapshot = log.model()
        showing = explain_view.Showing(
            width=terminal_width(explain_view.WIDTH),
            now=log.now,
            stamp=Stamp(log.version, log.via),
            evidence=evidence,
            command=span.option if span is not None else _suffix(recording, at),
            # Who has a recording has what a ticket needs.
            bundle=None if span or recording else "kvmtrace bundle -o case.tar.gz",
        )
        _print(target, snapshot, showing, as_json=as_json, is_span=since is not None)


def _suffix(recording: str | None, at: str | None) -> str:
    if recording is None:
        return ""
    # A name that is not safe to print is not printed.
    name = shlex.quote(recording) if clean(recording) == recording else "FILE"
    return f" --from {name}" + ("" if at is None else f" --at {shlex.quote(at)}")


def _print(
    target: str | None,
    snapshot: Snapshot,
    showing: explain_view.Showing,
    *,
    as_json: bool,
    is_span: bool,
) -> None:
    found = None if target is None else lookup.find(snapshot, target)
    if as_json:
        print_json(explain_screen.as_objects(found, snapshot, showing.now, is_span=is_span))
    elif found is not None:
        print_lines(explain_screen.of_target(found, snapshot, showing))
    elif is_span:
        print_lines(explain_screen.of_time(snapshot, showing))
    else:
        print_lines(explain_screen.of_all(snapshot, showing))
