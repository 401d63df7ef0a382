"""``kvmtrace explain``: what happened to a page or a VM, and what to do."""

from __future__ import annotations

import json

import click

from kvmtrace.cli.completion import complete_target
from kvmtrace.cli.console import json_is_utf8, print_line
from kvmtrace.cli.inputs import load_log
from kvmtrace.cli.options import from_option, json_option, watch_option, with_source
from kvmtrace.views import explain as explain_view
from kvmtrace.views import json_output, lookup


@click.command()
@click.argument("target", metavar="PFN|GPA@VM|VM|INCIDENT", shell_complete=complete_target)
@from_option
@json_option
@watch_option
@with_source
def explain(
    target: str, recording: str | None, as_json: bool, duration: float, source: str
) -> None:
    """Explain a page, VM or incident: what failed and what to do.

    Also which VMM was notified, and what it did. Numbers are page frames of the host (PFN:
    0x103275) or, with @VM, guest physical addresses (GPA: 0x8000@web-1).
    """
    with load_log(recording, source, duration) as log:
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
            print_line(json.dumps(objects, ensure_ascii=False))
            return
        texts = [explain_view.explain_text(incident, snapshot) for incident in found]
        print_line("\n\n".join(texts) or lookup.about_nothing(snapshot, target))
