"""``kvmtrace record``: write the event log of this host to a file."""

from __future__ import annotations

import contextlib
import time

import click

from kvmtrace.cli.console import print_status
from kvmtrace.cli.inputs import give_up_privileges, open_host_or_remote, open_session, poll_timeouts
from kvmtrace.cli.options import duration_option, point_in_time, source_option, utc_option
from kvmtrace.cli.output_file import Output
from kvmtrace.cli.past import history_option
from kvmtrace.events import Event, HwError, Poison
from kvmtrace.linux import clock
from kvmtrace.sources.recording import Writer

# Syncing while recording keeps the wait at the end short.
_SYNC_SECONDS = 5.0


@click.command()
@click.argument("file", type=click.Path(dir_okay=False), required=False)
@click.option("-o", "output_file", type=click.Path(dir_okay=False), help="The same as FILE.")
@click.option("--force", is_flag=True, help="Replace FILE if it exists.")
@duration_option
@click.option(
    "--since",
    type=point_in_time,
    metavar="TIME",
    help="Export what serve has kept from then on, and do not watch: 2h (ago), 2026-09-21T20:15.",
)
@click.option(
    "--until", type=point_in_time, metavar="TIME", help="With --since: up to then.  [default: now]"
)
@history_option
@utc_option
@source_option
def record(
    *,
    file: str | None,
    output_file: str | None,
    force: bool,
    duration: float | None,
    since: int | None,
    until: int | None,
    history: str,
    source: str,
) -> None:
    """Write the event log to FILE, for `kvmtrace replay`.

    Each line of FILE is a JSON object.
    """
    if file is not None and output_file is not None:
        raise click.UsageError("one FILE is enough")
    path = output_file if file is None else file
    if path is None:
        raise click.MissingParameter(param_hint="'FILE'", param_type="argument")
    if since is not None:
        _export(path, force, history, since, clock.now_ns() if until is None else until)
    elif until is not None:
        raise click.UsageError("--until needs --since")
    else:
        _watch(path, force, duration, source)


def _export(file: str, force: bool, history: str, since: int, until: int) -> None:
    # Only this needs SQLite.
    from kvmtrace.session import archive_file, archive_story  # noqa: PLC0415

    with contextlib.closing(archive_file.reading(history)) as database:
        host, version = archive_story.host_of(database)
        number = 0
        with Output(file, force) as output:
            with output.writing():
                writer = Writer(output.file, host, version, ends=True)
                for event in archive_story.window(database, since, until):
                    writer.write((event,), ())
                    number += 1
                writer.end()
            output.place()
    print_status(f"{number} events")


def _watch(file: str, force: bool, duration: float | None, source: str) -> None:
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
                if any(map(_is_urgent, batch)) or (batch and time.monotonic() >= sync_at):
                    output.sync_soon()
                    sync_at = time.monotonic() + _SYNC_SECONDS
                number += len(batch)
        finally:
            # Also if the source fails: the recording is complete up to then.
            with output.writing():
                writer.end()
    print_status(f"{number} events")


def _is_urgent(event: Event) -> bool:
    """Whether the host may crash right after this, so that it is written to the disk at once."""
    return isinstance(event, Poison) or (isinstance(event, HwError) and event.check is not None)
