"""What commands print: status lines on stderr, results on stdout."""

from __future__ import annotations

import contextlib
import io
import json
import os
import shutil
import sys
from collections.abc import Iterable
from typing import IO, Any

import click

from kvmtrace.cli.signals import stop
from kvmtrace.errors import KvmtraceError
from kvmtrace.model import Snapshot
from kvmtrace.sanitize import clean
from kvmtrace.views import json_output
from kvmtrace.views.format import Line, plain
from kvmtrace.views.tables.table import table_text

WIDTH_WITHOUT_TERMINAL = 160
# Room for the longest path and a message about it.
_MAX_LINE = 8192

_STYLES: dict[str, dict[str, Any]] = {
    "title": {"bold": True},
    "head": {"bold": True},
    "bad": {"fg": "red", "bold": True},
    "warn": {"fg": "yellow", "bold": True},
    "note": {"fg": "cyan"},
    "dim": {"dim": True},
}


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


def print_lines(lines: Iterable[Line]) -> None:
    """Print lines as ``print_line`` does; on a terminal in colour, unless NO_COLOR is set.

    An empty NO_COLOR counts as none (https://no-color.org).
    """
    is_coloured = sys.stdout.isatty() and not os.environ.get("NO_COLOR")
    is_coloured &= os.environ.get("TERM", "dumb") != "dumb"
    shown = (styled(line) if is_coloured else plain(line).rstrip() for line in lines)
    print_line("\n".join(shown))


def styled(line: Line) -> str:
    """A line with escape sequences for its styles."""
    return "".join(click.style(text, **_STYLES.get(style, {})) for text, style in line)


def terminal_width(most: int) -> int:
    """The width of the terminal, at most ``most``; that where stdout is no terminal."""
    if not sys.stdout.isatty():
        return most
    return min(most, shutil.get_terminal_size((most, 24)).columns)


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
