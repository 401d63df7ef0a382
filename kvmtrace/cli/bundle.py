"""``kvmtrace bundle``: put everything about this host's incidents into one archive."""

from __future__ import annotations

import contextlib
import os
import re
import tempfile
import time
from collections.abc import Iterator, Mapping

import click

from kvmtrace.cli.console import print_status
from kvmtrace.cli.doctor import doctor_report
from kvmtrace.cli.inputs import Batch, EventLog, load_log
from kvmtrace.cli.options import from_option, source_option, watch_option
from kvmtrace.cli.output_file import Output
from kvmtrace.cli.signals import Interrupted, stop
from kvmtrace.errors import KvmtraceError
from kvmtrace.linux import edac, host, kernel_log, memory_failure, page_flags, smbios
from kvmtrace.linux.read import read_text
from kvmtrace.sanitize import clean
from kvmtrace.sources.recording import Writer
from kvmtrace.spool import LongText, spooling
from kvmtrace.views import bundle as bundle_view
from kvmtrace.views.doctor_report import render, with_texts
from kvmtrace.views.host_files import HostRecords, host_files


@click.command()
@click.option(
    "-o",
    "--output",
    type=click.Path(dir_okay=False),
    required=True,
    metavar="FILE.tar.gz",
    help="Where to write it.",
)
@click.option(
    "--redact",
    is_flag=True,
    help="Replace names of VMs, processes and the host, and serial numbers.",
)
@click.option("--force", is_flag=True, help="Replace FILE.tar.gz if it exists.")
@from_option
@watch_option
@source_option
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

    For a ticket or an RMA: the events as a recording, all incidents explained, versions; of this
    host also the report of `kvmtrace doctor`, its DIMMs with part and serial numbers, counters of
    memory errors, and what the kernel logged of them.
    """
    with (
        Output(output, force, binary=True) as archive,
        load_log(recording, source, duration, twice=redact) as log,
        contextlib.closing(LongText()) as events,
    ):
        records = _host_records() if recording is None else None
        names = None
        if redact:
            all_events = (event for batch, _ in log.batches() for event in batch)
            serials = (dimm.serial_number for dimm in ((records and records.dimms) or ()))
            names = bundle_view.Redaction(all_events, log.host, filter(None, serials))
            log = _RedactedLog(log, names)  # noqa: PLW2901 (the log with names must not be used)
        files = _files(log, events)
        if recording is not None and stop.requested:
            raise Interrupted  # before the whole recording was read
        if records is not None:
            report = doctor_report(source, with_names=not redact)
            if names is not None:
                report = with_texts(report, names.text)
            files["doctor.txt"] = render(report, verbose=True)
            files |= host_files(records, names)
        print_status(_pack(archive, output, files))


def write_bundle(log: EventLog, name: str, *, here: bool) -> str:
    """Write ``name``.tar.gz, a bundle of a log without doctor's report; what to print about it.

    ``here``: the log is of this host, whose records of its memory are added.

    Into the current directory or, where that does not let us, the one for temporary files: a
    command that watches has given up the privilege to write anywhere. Raises KvmtraceError.
    """
    name = f"{re.sub('[^A-Za-z0-9.-]+', '-', name)}.tar.gz"
    try:
        return _write(name, log, here=here)
    except KvmtraceError as error:
        if not isinstance(error.__cause__, PermissionError):
            raise
        return _write(os.path.join(tempfile.gettempdir(), name), log, here=here)


def _write(path: str, log: EventLog, *, here: bool) -> str:
    with Output(path, False, binary=True) as archive, contextlib.closing(LongText()) as events:
        files = _files(log, events)
        if here:
            files |= host_files(_host_records(), None)
        return _pack(archive, path, files)


def _pack(archive: Output, path: str, files: Mapping[str, str | LongText]) -> str:
    """Write the files into the archive; what to print about it."""
    with archive.writing():
        bundle_view.write(archive.file, files, int(time.time()))
    archive.sync()
    archive.place()
    return f"{path}: {', '.join(sorted(files))}"


def _host_records() -> HostRecords:
    """What this host has on its memory, as far as this user may read it."""
    log, error = None, None
    try:
        log = tuple(kernel_log.memory_errors())
    except OSError as failure:
        error = failure.strerror or str(failure)
    return HostRecords(
        command_line=clean(read_text("/proc/cmdline", _MAX_COMMAND_LINE).strip(), _MAX_COMMAND_LINE)
        or None,
        settings=memory_failure.settings(),
        failures=page_flags.failures_by_node(),
        dimms=smbios.memory_devices(),
        edac=edac.counts(),
        kernel_log=log,
        log_error=error,
    )


_MAX_COMMAND_LINE = 8192


class _RedactedLog(EventLog):
    """A log with all names replaced."""

    def __init__(self, log: EventLog, names: bundle_view.Redaction) -> None:
        self.host = names.host(log.host)
        self.version = log.version and names.text(log.version)
        self._log, self._names = log, names

    def batches(self) -> Iterator[Batch]:
        for events, probes in self._log.batches():
            yield self._names.events(events), self._names.probes(probes)

    def is_complete(self) -> bool:
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
