"""``kvmtrace top``: the table of VMs and incidents, live or once."""

from __future__ import annotations

import os
import sys

import click

from kvmtrace.cli.console import show_snapshot
from kvmtrace.cli.inputs import give_up_privileges, open_host_or_remote, open_session, poll_timeouts
from kvmtrace.cli.options import interval_option, json_option, with_source
from kvmtrace.errors import UsageError


@click.command()
@click.option("--once", is_flag=True, help="Watch for one interval, print the table and exit.")
@json_option
@interval_option
@with_source
def top(once: bool, as_json: bool, interval: float, source: str) -> None:
    """Show a live table of VMs and poison incidents.

    The live table needs a terminal; --once does not. --json needs --once and prints one object.
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
    from kvmtrace.views.terminal import app  # noqa: PLC0415 (a TUI library)

    with open_session(open_host_or_remote(source)) as session:
        give_up_privileges()
        session.start()
        app.run(session.snapshot, interval, now=session.now)


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
