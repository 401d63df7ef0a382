"""What commands print: status lines on stderr, results on stdout."""

from __future__ import annotations

import contextlib
import io
import json
import os
import shutil
import sys
import threading
from collections.abc import Callable, Iterable, Iterator
from typing import IO, Any

import click

from kvmtrace.cli.signals import stop
from kvmtrace.errors import KvmtraceError
from kvmtrace.model import Snapshot
from kvmtrace.sanitize import clean
from kvmtrace.views import json_output
from kvmtrace.views.format import Line, clip, plain
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


SLOW_SECONDS = 1.0
_ERASE = "\r\x1b[K"
# Held while something is written on stderr; the list is empty if no line of ``busy`` is there.
_writing = threading.RLock()
_shown: list[str] = []


def print_status(text: str) -> None:
    """Print a line on stderr, made safe for a terminal: it may quote file names and arguments."""
    with _writing:
        _erase()
        click.echo(clean(" ".join(text.split()), _MAX_LINE), err=True)


@contextlib.contextmanager
def busy(what: str | Callable[[], str]) -> Iterator[None]:
    """Show on the terminal what takes longer than a second, while it does.

    ``what``: as in "attaching probes"; called each second if it may change. Nothing is shown if
    stderr is a file or a pipe: what reads that expects errors. Nor in another thread than the main
    one: the live table has the terminal then, and shows what is attached.
    """
    in_main = threading.current_thread() is threading.main_thread()
    if not (in_main and _is_terminal(sys.stderr)):
        yield
        return
    done = threading.Event()

    def show() -> None:
        while not done.wait(SLOW_SECONDS):
            text = what if isinstance(what, str) else what()
            with _writing, contextlib.suppress(OSError, ValueError):
                if not done.is_set() and _shown != [text]:
                    _erase()
                    columns = shutil.get_terminal_size().columns
                    sys.stderr.write(clip(clean(f"kvmtrace: {text} ..."), columns - 1))
                    sys.stderr.flush()
                    _shown[:] = [text]

    thread = threading.Thread(target=show, name="kvmtrace-busy", daemon=True)
    try:
        thread.start()
    except RuntimeError:  # no thread can be started
        yield
        return
    try:
        yield
    finally:
        done.set()
        with _writing:
            _erase()
        thread.join()


def _erase() -> None:
    if _shown:
        _shown.clear()
        with contextlib.suppress(OSError, ValueError):
            sys.stderr.write(_ERASE)
            sys.stderr.flush()


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
    is_coloured = stdout_is_terminal() and not os.environ.get("NO_COLOR")
    is_coloured &= os.environ.get("TERM", "dumb") != "dumb"
    shown = (styled(line) if is_coloured else plain(line).rstrip() for line in lines)
    print_line("\n".join(shown))


def styled(line: Line) -> str:
    """A line with escape sequences for its styles."""
    return "".join(click.style(text, **_STYLES.get(style, {})) for text, style in line)


def terminal_width(most: int) -> int:
    """The width of the terminal, at most ``most``; that where stdout is no terminal."""
    if not stdout_is_terminal():
        return most
    return min(most, shutil.get_terminal_size((most, 24)).columns)


def stdout_is_terminal() -> bool:
    """Whether a person reads stdout as it is printed."""
    return _is_terminal(sys.stdout)


def _is_terminal(stream: IO[str]) -> bool:
    try:
        return stream.isatty()
    except (AttributeError, ValueError):  # none, or closed
        return False


def escape_unencodable(stream: IO[str]) -> None:
    """Have characters that the locale lacks printed as escapes, not raise UnicodeEncodeError."""
    if isinstance(stream, io.TextIOWrapper):
        stream.reconfigure(errors="backslashreplace")


def print_json(value: object) -> None:
    json_is_utf8()
    print_line(json.dumps(value, ensure_ascii=False))


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
        print_json(json_output.top(snapshot))
        return
    width = shutil.get_terminal_size((WIDTH_WITHOUT_TERMINAL, 24)).columns
    print_line(table_text(snapshot, now=now, width=width))
