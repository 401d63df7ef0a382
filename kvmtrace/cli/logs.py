"""record, replay, explain and bundle: what happened, from a log or a look."""

from __future__ import annotations

import contextlib
import io
import json
import time
from dataclasses import replace

import click

from kvmtrace import host, wire
from kvmtrace.cli.attaching import (
    POLL_SECONDS,
    Log,
    give_up_privileges,
    here,
    log_of,
    reading,
    replaying,
)
from kvmtrace.cli.doctor import examined
from kvmtrace.cli.ending import json_is_utf8, say, stop, tell
from kvmtrace.cli.options import (
    duration_option,
    from_option,
    json_option,
    look_option,
    with_source,
)
from kvmtrace.cli.output import Output
from kvmtrace.cli.printing import show_snapshot
from kvmtrace.live import Session, host_of
from kvmtrace.sources.recording import Writer
from kvmtrace.views import bundle as bundle_view
from kvmtrace.views import doctor as doctor_view
from kvmtrace.views import explain as explain_view
from kvmtrace.views import lines, targets


@click.command()
@click.argument("file", type=click.Path(dir_okay=False))
@click.option("--force", is_flag=True, help="Replace FILE if it is there.")
@duration_option
@with_source
def record(file: str, force: bool, duration: float | None, source: str) -> None:
    """Write the event log to FILE (JSON lines), for `kvmtrace replay`."""
    with Output(file, force) as output, contextlib.closing(here(source)) as attached:
        number = 0
        deadline = time.monotonic() + duration if duration else None
        output.place()
        give_up_privileges()
        with output.writing():
            writer = Writer(output.file, host_of(attached))
        by = f"{attached.name} ({attached.why})" if attached.why else attached.name
        tell(f"recording to {file} by {by}; Ctrl-C ends it")
        while True:
            wait = POLL_SECONDS
            if deadline is not None:
                wait = min(wait, deadline - time.monotonic())
            over = stop.asked or wait <= 0
            # What the kernel counted meanwhile and has not reported yet belongs to it, too.
            batch = attached.poll(0 if over else wait)
            with output.writing():
                writer.write(batch, attached.probes())
                output.file.flush()
            number += len(batch)
            if over:
                break
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
    text = lines.json_text if as_json else lines.event_text
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
        found = targets.find(snapshot, target)
        if as_json:
            json_is_utf8()
            objects = [explain_view.as_object(incident, snapshot) for incident in found]
            if not found:
                pages = targets.soft_offlined(snapshot, target)
                objects = [wire.soft_offlined(page) for page in pages]
            say(json.dumps(objects, ensure_ascii=False))
            return
        texts = [explain_view.explain_text(incident, snapshot) for incident in found]
        say("\n\n".join(texts) or targets.about_nothing(snapshot, target))


@click.command()
@click.option(
    "-o", "--output", type=click.Path(dir_okay=False), required=True, metavar="FILE.tar.gz"
)
@click.option("--redact", is_flag=True, help="Replace names and uuids of VMs, the same everywhere.")
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
        log_of(recording, source, duration) as log,
    ):
        names = bundle_view.Redaction(log.events)
        files = _files(replace(log, events=names.events(log.events)) if redact else log)
        if recording is None:
            found = doctor_view.render(examined(source), verbose=True)
            files["doctor.txt"] = names.text(found) if redact else found
        with archive.writing():
            bundle_view.write(archive.file, files, int(time.time()))
        archive.place()
        tell(f"{output}: {', '.join(sorted(files))}")


def _files(log: Log) -> dict[str, str]:
    text = io.StringIO()
    Writer(text, log.host, log.version).write(log.events, log.probes)
    return bundle_view.contents(text.getvalue(), log.model(), log.version, host.bcc().version)
