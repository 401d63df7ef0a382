"""record, replay, explain and bundle: what happened, from a log or a look."""

from __future__ import annotations

import contextlib
import json
import time
from collections.abc import Iterator

import click

from kvmtrace.cli.doctor import examined
from kvmtrace.cli.errors import Interrupted, json_is_utf8, say, stop, tell
from kvmtrace.cli.inputs import (
    POLL_SECONDS,
    Batch,
    Story,
    give_up_privileges,
    here,
    log_of,
    reading,
    replaying,
    session_on,
)
from kvmtrace.cli.options import (
    duration_option,
    from_option,
    json_option,
    look_option,
    with_source,
)
from kvmtrace.cli.output_file import Output
from kvmtrace.cli.printing import show_snapshot
from kvmtrace.events import GmemPoison, Mce, Poison
from kvmtrace.linux import host
from kvmtrace.session.session import Session
from kvmtrace.sources.recording import Writer
from kvmtrace.spool import LongText, spooling
from kvmtrace.views import bundle as bundle_view
from kvmtrace.views import doctor as doctor_view
from kvmtrace.views import event_lines, json_output, lookup
from kvmtrace.views import explain as explain_view

# The host may go down with what these report.
_LAST_WORDS = (GmemPoison, Mce, Poison)
# So that little is left for the end of a recording, where the disk is waited for.
_SYNC_SECONDS = 5.0


@click.command()
@click.argument("file", type=click.Path(dir_okay=False))
@click.option("--force", is_flag=True, help="Replace FILE if it is there.")
@duration_option
@with_source
def record(file: str, force: bool, duration: float | None, source: str) -> None:
    """Write the event log to FILE (JSON lines), for `kvmtrace replay`."""
    with Output(file, force) as output, session_on(here(source)) as session:
        number, sync_at = 0, 0.0
        deadline = time.monotonic() + duration if duration else None
        with output.writing():
            host_here = session.host()
            writer = Writer(output.file, host_here, ends=True)
        output.place()
        give_up_privileges()
        why = host_here.source_why
        by = f"{host_here.source} ({why})" if why else host_here.source
        tell(f"recording to {file} by {by}; Ctrl-C ends it")
        try:
            while True:
                wait = POLL_SECONDS
                if deadline is not None:
                    wait = min(wait, deadline - time.monotonic())
                over = stop.asked or wait <= 0
                # What the kernel counted meanwhile and has not reported yet belongs to it, too.
                batch = session.poll(0 if over else wait)
                with output.writing():
                    writer.write(batch, session.probes())
                    output.file.flush()
                is_urgent = any(isinstance(event, _LAST_WORDS) for event in batch)
                if is_urgent or (batch and time.monotonic() >= sync_at):
                    output.sync_soon()
                    sync_at = time.monotonic() + _SYNC_SECONDS
                number += len(batch)
                if over:
                    break
        finally:
            # Also if a source fails: what it reported until then is whole.
            with output.writing():
                writer.end()
    tell(f"{number} events")


@click.command()
@click.argument("file", type=click.Path(dir_okay=False))
@click.option("--events", "as_events", is_flag=True, help="The event lines, not the table.")
@json_option
def replay(file: str, as_events: bool, as_json: bool) -> None:
    """Show a recording: the final table, or with --events what happened line by line.

    Needs no privilege, no BPF and no KVM.
    """
    if as_json:
        json_is_utf8()
    text = event_lines.json_text if as_json else event_lines.event_text
    with replaying(file) as source:
        session = Session(source, source.host.page_shift)
        while not source.done and not stop.asked:
            with reading(source):
                batch = session.pump(0)
            for told in batch:
                if as_events and (line := text(told)) is not None:
                    say(line)
        if not as_events:
            snapshot = session.snapshot().of_log(source.host, source.probes())
            show_snapshot(snapshot, snapshot.last_ts or 0, as_json)


@click.command()
@click.argument("target", metavar="PFN|GPA@VM|VM|INCIDENT")
@from_option
@json_option
@look_option
@with_source
def explain(
    target: str, recording: str | None, as_json: bool, duration: float, source: str
) -> None:
    """The whole story of a page or a VM: what failed, which VMM was notified, what to do.

    Numbers are PFNs (0x103275) or, with @VM, guest physical addresses (0x8000@web-1).
    """
    with log_of(recording, source, duration) as log:
        snapshot = log.model()
        found = lookup.find(snapshot, target)
        if as_json:
            json_is_utf8()
            objects = [explain_view.as_object(incident, snapshot) for incident in found]
            if not found:
                pages = lookup.soft_offlined(snapshot, target)
                objects = [json_output.soft_offlined(page, snapshot) for page in pages]
                errors = lookup.reported(snapshot, target)
                objects = objects or [json_output.reported(*one, snapshot) for one in errors]
            say(json.dumps(objects, ensure_ascii=False))
            return
        texts = [explain_view.explain_text(incident, snapshot) for incident in found]
        say("\n\n".join(texts) or lookup.about_nothing(snapshot, target))


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
