"""A snapshot on stdout."""

from __future__ import annotations

import json
import shutil

from kvmtrace.cli.errors import json_is_utf8, say
from kvmtrace.model import Snapshot
from kvmtrace.views import json_output
from kvmtrace.views.tables.table import table_text

WIDTH_WITHOUT_TERMINAL = 160


def show_snapshot(snapshot: Snapshot, now: int, as_json: bool) -> None:
    if as_json:
        json_is_utf8()
        say(json.dumps(json_output.top(snapshot), ensure_ascii=False))
        return
    width = shutil.get_terminal_size((WIDTH_WITHOUT_TERMINAL, 24)).columns
    say(table_text(snapshot, now=now, width=width))
