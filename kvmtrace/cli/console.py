"""What commands print: status lines on stderr, results on stdout."""

from __future__ import annotations

import contextlib
import io
import json
import os
import shutil
import sys
from typing import IO, Any

import click

from kvmtrace.cli.signals import stop
from kvmtrace.errors import KvmtraceError
from kvmtrace.model import Snapshot
from kvmtrace.sanitize import clean
from kvmtrace.views import json_output
from kvmtrace.views.tables.table import table_text

WIDTH_WITHOUT_TERMINAL = 160
# Room for the longest path and a message about it.
_MAX_LINE = 8192


def print_status(text: str) -> None:
    """Print a line on stderr, made safe for a terminal: it may quote file names and arguments."""
    click.echo(clean(" ".join(text.split()), _MAX_LINE), err=True)


def print_line(text: str) -> None:
    """Print a line on stdout, as ``stop.write`` does. Raises KvmtraceError, BrokenPipeError."""
    try:
        stop.write(text, sys.stdout)
    except BrokenPipeError:
        raise
    except OSError as error:
        discard(sys.stdout)
        raise KvmtraceError(f"standard output: {error.strerror}") from error


def stdout_is_terminal() -> bool:
    """Whether a person reads stdout as it is printed."""
    try:
        return sys.stdout.isatty()
    except (AttributeError, ValueError):  # none, or closed
        return False


def escape_unencodable(stream: IO[str]) -> None:
    """Have characters that the locale lacks printed as escapes, not raise UnicodeEncodeError."""
    if isinstance(stream, io.TextIOWrapper):
        stream.reconfigure(errors="backslashreplace")


def json_is_utf8() -> None:
    """Have stdout written in UTF-8: JSON is, whatever the locale."""
    if isinstance(sys.stdout, io.TextIOWrapper):
        sys.stdout.reconfigure(encoding="utf-8")


def discard(file: IO[Any]) -> None:
    """Drop what a file still buffers: flushing it would block or fail once more."""
    with contextlib.suppress(OSError, ValueError):
        null = os.open(os.devnull, os.O_WRONLY)
        os.dup2(null, file.fileno())
        os.close(null)


def show_snapshot(snapshot: Snapshot, now: int, as_json: bool) -> None:
    """Print a snapshot as the table at ``now`` (ns since the epoch) or as a JSON object."""
    if as_json:
        json_is_utf8()
        print_line(json.dumps(json_output.top(snapshot), ensure_ascii=False))
        return
    width = shutil.get_terminal_size((WIDTH_WITHOUT_TERMINAL, 24)).columns
    print_line(table_text(snapshot, now=now, width=width))
