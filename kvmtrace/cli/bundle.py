"""``kvmtrace bundle``: everything about this host's incidents in one archive."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Iterator

import click

from kvmtrace.cli.console import tell
from kvmtrace.cli.doctor import examined
from kvmtrace.cli.inputs import Batch, Story, log_of
from kvmtrace.cli.options import from_option, look_option, with_source
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
@look_option
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
        log_of(recording, source, duration, twice=redact) as log,
        contextlib.closing(LongText()) as events,
    ):
        if redact:
            every = (one for batch, _ in log.batches() for one in batch)
            names = bundle_view.Redaction(every, log.host)
            log = _Redacted(log, names)  # noqa: PLW2901 (what else there is must not be used)
        files = _files(log, events)
        if recording is not None and stop.asked:
            raise Interrupted  # before all of it was read
        if recording is None:
            report = examined(source)
            if redact:
                report = doctor_view.with_texts(report, names.text)
            files["doctor.txt"] = doctor_view.render(report, verbose=True)
        with archive.writing():
            bundle_view.write(archive.file, files, int(time.time()))
        archive.sync()
        archive.place()
        tell(f"{output}: {', '.join(sorted(files))}")


class _Redacted(Story):
    """A story without names."""

    def __init__(self, story: Story, names: bundle_view.Redaction) -> None:
        self.host = names.host(story.host)
        self.version = story.version and names.text(story.version)
        self._story, self._names = story, names

    def batches(self) -> Iterator[Batch]:
        """Those of the story."""
        for events, probes in self._story.batches():
            yield self._names.events(events), self._names.probes(probes)

    def whole(self) -> bool:
        """Whether the story is."""
        return self._story.whole()


def _files(log: Story, events: LongText) -> dict[str, str | LongText]:
    """What is in a bundle; the recording goes to ``events``."""
    with spooling():
        writer = Writer(events.file, log.host, log.version, ends=True)

    def look(batch: Batch) -> None:
        with spooling():
            writer.write(*batch)

    model = log.model(look)
    if log.whole():
        with spooling():
            writer.end()
    return bundle_view.contents(events, model, log.version, host.bcc().version)
