"""``kvmtrace replay``: show a recording as a table or as event lines."""

from __future__ import annotations

import click

from kvmtrace.cli.console import json_is_utf8, print_line, show_snapshot
from kvmtrace.cli.inputs import open_recording, reading
from kvmtrace.cli.options import json_option
from kvmtrace.cli.signals import stop
from kvmtrace.session.session import Session
from kvmtrace.views import event_lines


@click.command()
@click.argument("file", type=click.Path(dir_okay=False))
@click.option("--events", "as_events", is_flag=True, help="Print event lines instead of the table.")
@json_option
def replay(file: str, as_events: bool, as_json: bool) -> None:
    """Show a recording, as the final table or as event lines.

    Needs no privileges, no BPF and no KVM.
    """
    if as_json:
        json_is_utf8()
    text = event_lines.json_text if as_json else event_lines.event_text
    with open_recording(file) as source:
        session = Session(source, source.host.page_shift, is_joined=False)
        while not source.done and not stop.requested:
            with reading(source):
                batch = session.pump(0)
            for correlated in batch:
                if as_events and (line := text(correlated)) is not None:
                    print_line(line)
        if not as_events:
            snapshot = session.snapshot().of_log(source.host, source.probes())
            show_snapshot(snapshot, snapshot.last_ts or 0, as_json)
