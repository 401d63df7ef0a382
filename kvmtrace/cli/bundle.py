"""``kvmtrace bundle``: put everything about this host's incidents into one archive."""

from __future__ import annotations

import contextlib
import os
import re
import tempfile
import time
from collections.abc import Iterator

import click

from kvmtrace.cli.console import print_status
from kvmtrace.cli.doctor import doctor_report
from kvmtrace.cli.inputs import Batch, EventLog, load_log
from kvmtrace.cli.options import from_option, watch_option, with_source
from kvmtrace.cli.output_file import Output
from kvmtrace.cli.signals import Interrupted, stop
from kvmtrace.errors import KvmtraceError
from kvmtrace.linux import host
from kvmtrace.sources.recording import Writer
from kvmtrace.spool import LongText, spooling
from kvmtrace.views import bundle as bundle_view
from kvmtrace.views import doctor as doctor_view


@click.command()
@click.option(
    "-o", "--output", type=click.Path(dir_okay=False), required=True, metavar="FILE.tar.gz"
)
@click.option("--redact", is_flag=True, help="Replace names of VMs, processes and the host.")
@click.option("--force", is_flag=True, help="Replace FILE.tar.gz if it exists.")
@from_option
@watch_option
@with_source
def bundle(
    *,
    output: str,
    redact: bool,
    force: bool,
    recording: str | None,
    duration: float,
    source: str,
) -> None:
    """Put everything about this host's incidents into one archive.

    For a ticket or an RMA: the events as a recording, all incidents explained, the report of
    `kvmtrace doctor`, versions.
    """
    with (
        Output(output, force, binary=True) as archive,
        load_log(recording, source, duration, twice=redact) as log,
        contextlib.closing(LongText()) as events,
    ):
        if redact:
            all_events = (event for batch, _ in log.batches() for event in batch)
            names = bundle_view.Redaction(all_events, log.host)
            log = _RedactedLog(log, names)  # noqa: PLW2901 (the log with names must not be used)
        files = _files(log, events)
        if recording is not None and stop.requested:
            raise Interrupted  # before the whole recording was read
        if recording is None:
            report = doctor_report(source)
            if redact:
                report = doctor_view.with_texts(report, names.text)
            files["doctor.txt"] = doctor_view.render(report, verbose=True)
        with archive.writing():
            bundle_view.write(archive.file, files, int(time.time()))
        archive.sync()
        archive.place()
        print_status(f"{output}: {', '.join(sorted(files))}")


def write_bundle(log: EventLog, host: str, stamp: str) -> str:
    """Write a bundle of a log, without a report on this host; what to print about it.

    Into the current directory or, where that does not let us, the one for temporary files: a
    command that watches has given up the privilege to write anywhere. Raises KvmtraceError.
    """
    name = f"kvmtrace-{re.sub('[^A-Za-z0-9.-]+', '-', host)}-{stamp}.tar.gz"
    try:
        return _write(name, log)
    except KvmtraceError as error:
        if not isinstance(error.__cause__, PermissionError):
            raise
        return _write(os.path.join(tempfile.gettempdir(), name), log)


def _write(path: str, log: EventLog) -> str:
    with Output(path, False, binary=True) as archive, contextlib.closing(LongText()) as events:
        files = _files(log, events)
        with archive.writing():
            bundle_view.write(archive.file, files, int(time.time()))
        archive.sync()
        archive.place()
        return f"{path}: {', '.join(sorted(files))}"


class _RedactedLog(EventLog):
    """A log with all names replaced."""

    def __init__(self, log: EventLog, names: bundle_view.Redaction) -> None:
        self.host = names.host(log.host)
        self.version = log.version and names.text(log.version)
        self._log, self._names = log, names

    def batches(self) -> Iterator[Batch]:
        """The batches of the log."""
        for events, probes in self._log.batches():
            yield self._names.events(events), self._names.probes(probes)

    def is_complete(self) -> bool:
        """Whether the log is."""
        return self._log.is_complete()


def _files(log: EventLog, events: LongText) -> dict[str, str | LongText]:
    """{file name: text} of a bundle; the recording is written to ``events``."""
    with spooling():
        writer = Writer(events.file, log.host, log.version, ends=True)

    def write(batch: Batch) -> None:
        with spooling():
            writer.write(*batch)

    model = log.model(write)
    if log.is_complete():
        with spooling():
            writer.end()
    return bundle_view.contents(events, model, log.version, host.bcc().version)
