"""``kvmtrace explain``: what is open, or what happened to a page or a VM, and what to do."""

from __future__ import annotations

import shlex

import click

from kvmtrace.cli.completion import complete_target
from kvmtrace.cli.console import print_json, print_lines, terminal_width
from kvmtrace.cli.inputs import EventLog, load_log
from kvmtrace.cli.options import from_option, json_option, utc_option, watch_option, with_source
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
@json_option
@utc_option
@watch_option
@with_source
def explain(
    *,
    target: str | None,
    evidence: bool,
    recording: str | None,
    as_json: bool,
    duration: float,
    source: str,
) -> None:
    """Explain what is open: what to do first, then what happened.

    Of a target: an incident's id or its beginning; a page frame of the host (PFN, 0x103275); a
    guest physical address or a gfn (0x8000@web-1); a VM by name, uuid, pid or part of its name; a
    DIMM by its label. A target without poisoned pages is no error: the status is 0.

    \b
    Example: kvmtrace explain web-1
    """
    with load_log(recording, source, duration) as log:
        snapshot = log.model()
        found = None if target is None else lookup.find(snapshot, target)
        if as_json:
            print_json(explain_screen.as_objects(found, snapshot, log.now))
            return
        showing = _showing(log, recording, evidence=evidence)
        if found is None:
            print_lines(explain_screen.of_all(snapshot, showing))
        else:
            print_lines(explain_screen.of_target(found, snapshot, showing))


def _showing(log: EventLog, recording: str | None, *, evidence: bool) -> explain_view.Showing:
    suffix = ""
    if recording is not None:
        # A name that is not safe to print is not printed.
        suffix = f" --from {shlex.quote(recording) if clean(recording) == recording else 'FILE'}"
    return explain_view.Showing(
        width=terminal_width(explain_view.WIDTH),
        now=log.now,
        stamp=Stamp(log.version, log.via),
        evidence=evidence,
        command=suffix,
        # Who has a recording has what a ticket needs.
        bundle="kvmtrace bundle -o case.tar.gz" if recording is None else None,
    )
