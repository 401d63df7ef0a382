"""``kvmtrace bundle``: everything about this host's incidents in one archive."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Iterator

import click

from kvmtrace.cli.console import print_status
from kvmtrace.cli.doctor import doctor_report
from kvmtrace.cli.inputs import Batch, EventLog, load_log
from kvmtrace.cli.options import from_option, watch_option, with_source
from kvmtrace.cli.output_file import Output
from kvmtrace.cli.signals import Interrupted, stop
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
@click.option("--force", is_flag=True, help="Replace FILE if it is there.")
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
    """Everything about this host's incidents in one file, for a ticket or an RMA.

    Events as a recording, all incidents explained, doctor's findings, versions.
    """
    with (
        Output(output, force, binary=True) as archive,
        load_log(recording, source, duration, twice=redact) as log,
        contextlib.closing(LongText()) as events,
    ):
        if redact:
            every = (one for batch, _ in log.batches() for one in batch)
            names = bundle_view.Redaction(every, log.host)
            log = _RedactedLog(log, names)  # noqa: PLW2901 (what else there is must not be used)
        files = _files(log, events)
        if recording is not None and stop.requested:
            raise Interrupted  # before all of it was read
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


class _RedactedLog(EventLog):
    """A story without names."""

    def __init__(self, log: EventLog, names: bundle_view.Redaction) -> None:
        self.host = names.host(log.host)
        self.version = log.version and names.text(log.version)
        self._log, self._names = log, names

    def batches(self) -> Iterator[Batch]:
        """Those of the log."""
        for events, probes in self._log.batches():
            yield self._names.events(events), self._names.probes(probes)

    def is_complete(self) -> bool:
        """Whether the story is."""
        return self._log.is_complete()


def _files(log: EventLog, events: LongText) -> dict[str, str | LongText]:
    """What is in a bundle; the recording goes to ``events``."""
    with spooling():
        writer = Writer(events.file, log.host, log.version, ends=True)

    def look(batch: Batch) -> None:
        with spooling():
            writer.write(*batch)

    model = log.model(look)
    if log.is_complete():
        with spooling():
            writer.end()
    return bundle_view.contents(events, model, log.version, host.bcc().version)
