"""``kvmtrace replay``: show a recording as a table or as event lines."""

from __future__ import annotations

import contextlib

import click

from kvmtrace.cli.console import busy, show_snapshot
from kvmtrace.cli.event_filter import EventFilter, filter_options, require_vm
from kvmtrace.cli.events import EventPrinter
from kvmtrace.cli.inputs import open_recording, reading
from kvmtrace.cli.options import json_option, utc_option
from kvmtrace.cli.signals import stop
from kvmtrace.errors import UsageError
from kvmtrace.events import VmSeen
from kvmtrace.session.session import Session


@click.command()
@click.argument("file", type=click.Path(dir_okay=False, allow_dash=True))
@click.option("--events", "as_events", is_flag=True, help="Print event lines instead of the table.")
@filter_options
@json_option
@utc_option
def replay(
    *,
    file: str,
    as_events: bool,
    vm: str | None,
    states: tuple[tuple[str, ...], ...],
    kinds: tuple[tuple[str, ...], ...],
    as_json: bool,
) -> None:
    """Show a recording, as the final table or as event lines.

    FILE may be a bundle, and compressed (.gz); - is standard input. Needs no privileges, no BPF and
    no KVM.
    """
    if not as_events and (vm or states or kinds):
        raise UsageError("--vm, --state and --kind choose lines of --events", "add --events")
    wanted = EventFilter.of_options(kinds, states, vm)
    with open_recording(file) as source:
        session = Session(source, source.host.page_shift, is_joined=False)
        lines = EventPrinter(as_json) if as_events else None
        seen: dict[str, VmSeen] = {}
        with busy(f"reading {source.path}") if lines is None else contextlib.nullcontext():
            while not source.done and not stop.requested:
                with reading(source):
                    batch = session.pump(0)
                if lines is not None:
                    for correlated in wanted.chosen(batch, session.snapshot):
                        lines.print(correlated)
                if vm is not None:
                    seen |= {one.vm.label: one.vm for one in batch if one.vm}
        if vm is not None and not stop.requested:
            require_vm(vm, seen.values())
        if lines is None:
            snapshot = session.snapshot().of_log(source.host, source.probes())
            show_snapshot(snapshot, snapshot.last_ts or 0, as_json)
