"""``kvmtrace record``: write the event log of this host to a file."""

from __future__ import annotations

import time

import click

from kvmtrace.cli.console import print_status
from kvmtrace.cli.inputs import give_up_privileges, open_host_or_remote, open_session, poll_timeouts
from kvmtrace.cli.options import duration_option, with_source
from kvmtrace.cli.output_file import Output
from kvmtrace.events import GmemPoison, Mce, Poison
from kvmtrace.sources.recording import Writer

# The host may crash right after these; they are written to the disk immediately.
_URGENT = (GmemPoison, Mce, Poison)
# Syncing while recording keeps the wait at the end short.
_SYNC_SECONDS = 5.0


@click.command()
@click.argument("file", type=click.Path(dir_okay=False))
@click.option("--force", is_flag=True, help="Replace FILE if it exists.")
@duration_option
@with_source
def record(file: str, force: bool, duration: float | None, source: str) -> None:
    """Write the event log to FILE, for `kvmtrace replay`.

    Each line of FILE is a JSON object.
    """
    with Output(file, force) as output, open_session(open_host_or_remote(source)) as session:
        number, sync_at = 0, 0.0
        with output.writing():
            host_here = session.host()
            writer = Writer(output.file, host_here, ends=True)
        output.place()
        give_up_privileges()
        why = host_here.source_why
        by = f"{host_here.source} ({why})" if why else host_here.source
        print_status(f"recording to {file} by {by}; Ctrl-C ends it")
        try:
            for timeout in poll_timeouts(duration):
                batch = session.poll(timeout)
                with output.writing():
                    writer.write(batch, session.probes())
                    output.file.flush()
                is_urgent = any(isinstance(event, _URGENT) for event in batch)
                if is_urgent or (batch and time.monotonic() >= sync_at):
                    output.sync_soon()
                    sync_at = time.monotonic() + _SYNC_SECONDS
                number += len(batch)
        finally:
            # Also if the source fails: the recording is complete up to then.
            with output.writing():
                writer.end()
    print_status(f"{number} events")
