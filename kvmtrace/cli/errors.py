"""How a run ends: errors as one line and an exit status, signals as a flag, readers that leave."""

from __future__ import annotations

import contextlib
import io
import os
import select
import signal
import sys
import traceback
from collections.abc import Callable, Iterator
from types import FrameType
from typing import IO, Any

import click

from kvmtrace.cli.watchdog import Watchdog
from kvmtrace.errors import KvmtraceError, UsageError
from kvmtrace.sanitize import clean

# Room for the longest path beside what is said of it.
_LINE = 8192


class Failure(click.ClickException):
    """A KvmtraceError on its way out through click."""

    def __init__(self, error: KvmtraceError) -> None:
        super().__init__(error.message)
        # Click's own exceptions assign it too, although it is declared for the class.
        self.exit_code = error.exit_status  # type: ignore[misc]
        self.hint = error.hint

    def show(self, file: IO[Any] | None = None) -> None:
        """``kvmtrace: MESSAGE`` and ``hint: HINT`` on stderr."""
        tell(f"kvmtrace: {self.message}")
        if self.hint:
            tell(f"hint: {self.hint}")


def tell(text: str) -> None:
    """A line on stderr, fit for a terminal whatever is quoted in it (names of files, arguments)."""
    click.echo(clean(" ".join(text.split()), _LINE), err=True)


class Group(click.Group):
    def make_context(self, *arguments: Any, **extra: Any) -> click.Context:
        """Parse what stands before the command."""
        _survive_any_name(sys.stderr)
        with _click_as_failure():
            return super().make_context(*arguments, **extra)

    def invoke(self, ctx: click.Context) -> Any:
        """Run a command; whatever goes wrong becomes one line and an exit status, here only."""
        _survive_any_name(sys.stdout)
        _survive_any_name(sys.stderr)
        try:
            with stop, _click_as_failure(ctx):
                return super().invoke(ctx)
        except (click.ClickException, click.exceptions.Exit):
            raise
        except (BrokenPipeError, Interrupted):
            # The reader has left, or asked us to: nothing more can or need be said.
            discard(sys.stdout)
            return None
        except Exception as error:
            if os.environ.get("KVMTRACE_DEBUG"):
                traceback.print_exc()
            raise Failure(as_kvmtrace_error(error)) from error


@contextlib.contextmanager
def _click_as_failure(group: click.Context | None = None) -> Iterator[None]:
    """Turn click's usage errors, which take three lines, into one line and a hint.

    ``group``: the context whose subcommand is run; click leaves it out of some of its errors.
    """
    try:
        yield
    except click.UsageError as error:
        # `kvmtrace` alone is answered with the help; not by an error in click before 8.2.
        if isinstance(error, getattr(click.exceptions, "NoArgsIsHelpError", ())):
            raise
        what = error.format_message().rstrip(".")
        if error.ctx:
            path = error.ctx.command_path
        else:
            path = f"kvmtrace {group.invoked_subcommand}" if group else "kvmtrace"
        hint = f"`{path} --help` lists what there is"
        raise Failure(UsageError(what[:1].lower() + what[1:], hint)) from error


def as_kvmtrace_error(error: Exception) -> KvmtraceError:
    """Any error as one that a person can act on."""
    if isinstance(error, KvmtraceError):
        return error
    if isinstance(error, OSError) and error.strerror:
        where = f"{error.filename}: " if error.filename else ""
        return KvmtraceError(f"{where}{error.strerror}", "KVMTRACE_DEBUG=1 shows where")
    return KvmtraceError(
        f"internal error: {type(error).__name__}: {error}",
        "KVMTRACE_DEBUG=1 shows a traceback; please report it",
    )


class Interrupted(BaseException):
    """A signal arrived while we were blocked in a write."""


class _Stop:
    """SIGINT, SIGTERM and SIGHUP as a flag that loops look at, so that probes are always detached.

    An exception out of nowhere could hit a half-attached source or a C callback. Reading and
    writing files is different (``waiting``): who is at the other end could keep us for ever.

    ``clean_up``: what to call if the command has to be ended by force. ``hung``: a thread was left
    in the kernel; Python's own way out could wait for it. ``detaching``: probes are being detached.
    ``owns_process``: nothing but this command runs in it (tests run several), so it may give up
    for good what it needs no more.
    """

    def __init__(self) -> None:
        self.asked = self.detaching = self._was_taken = False
        self._taken = -1
        self.hung = False
        self.owns_process = False
        self.clean_up: list[Callable[[], object]] = []
        self._watchdog: Watchdog | None = None
        self._blocked: Callable[[], bool] | None = None
        self._previous: dict[int, Any] = {}

    def __enter__(self) -> None:
        self.asked = self.detaching = self._was_taken = False
        self.clean_up.clear()
        with contextlib.suppress(ValueError):  # not the main thread (tests)
            for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
                if number == signal.SIGHUP and signal.getsignal(number) == signal.SIG_IGN:
                    continue  # nohup
                self._previous[number] = signal.signal(number, self._handle)
        if self._previous:
            # While the main thread computes no handler runs; a byte is written all the same.
            self._taken, written = os.pipe2(os.O_NONBLOCK | os.O_CLOEXEC)
            signal.set_wakeup_fd(written, warn_on_full_buffer=False)
            self._watch()

    def _watch(self) -> None:
        self._watchdog = Watchdog(
            self._previous, self._is_asked, self.clean_up, lambda: self.detaching
        )

    def watch_anew(self) -> None:
        """By another thread, which has the privileges that the calling one has now."""
        if self._watchdog is not None:
            self._watchdog.stop()
            self._watch()

    def __exit__(self, *_: object) -> None:
        if self._watchdog is not None:
            self._watchdog.stop()
            self._watchdog = None
            for descriptor in (self._taken, signal.set_wakeup_fd(-1)):
                with contextlib.suppress(OSError):  # none any more: asyncio has taken its place
                    os.close(descriptor)
        for number, previous in self._previous.items():
            signal.signal(number, previous)
        self._previous.clear()

    def _is_asked(self) -> bool:
        with contextlib.suppress(BlockingIOError):
            self._was_taken |= any(number in self._previous for number in os.read(self._taken, 512))
        return self.asked or self._was_taken

    def _handle(self, _number: int, _frame: FrameType | None) -> None:
        self.asked = True
        if self._blocked is not None and self._blocked():
            raise Interrupted

    @contextlib.contextmanager
    def waiting(self, blocked: Callable[[], bool]) -> Iterator[None]:
        """In here, a signal raises ``Interrupted`` if ``blocked()``; else it is only a flag."""
        self._blocked = blocked
        try:
            if self.asked and blocked():
                raise Interrupted
            yield
        finally:
            self._blocked = None

    def write(self, text: str, file: IO[str]) -> None:
        """Print a line and flush it; a signal ends it even if nobody reads.

        After a signal, the last lines still go out as long as somebody does.
        """
        with self.waiting(lambda: nobody_reads(file)):
            file.write(text + "\n")
            file.flush()


def always() -> bool:
    """For ``stop.waiting``, of what is over at once or not for a long time (opening a pipe)."""
    return True


def nobody_reads(file: IO[Any]) -> bool:
    """Whether there is no room to write, nor any within a second."""
    return not _ready(file, select.POLLOUT, 1000)


def nobody_writes(file: IO[Any]) -> bool:
    """Whether there is nothing to read now."""
    return not _ready(file, select.POLLIN, 0)


def _ready(file: IO[Any], what: int, milliseconds: int) -> bool:
    try:
        poller = select.poll()
        poller.register(file.fileno(), what)
        return bool(poller.poll(milliseconds))
    except (OSError, ValueError):
        return True  # not a file (tests)


stop = _Stop()


def say(text: str) -> None:
    """Print a line on stdout, as ``stop.write`` does."""
    try:
        stop.write(text, sys.stdout)
    except BrokenPipeError:
        raise
    except OSError as error:
        discard(sys.stdout)
        raise KvmtraceError(f"standard output: {error.strerror}") from error


def _survive_any_name(stream: IO[str]) -> None:
    if isinstance(stream, io.TextIOWrapper):
        stream.reconfigure(errors="backslashreplace")


def json_is_utf8() -> None:
    """The contract: JSON is UTF-8, whatever the locale."""
    if isinstance(sys.stdout, io.TextIOWrapper):
        sys.stdout.reconfigure(encoding="utf-8")


def discard(file: IO[Any]) -> None:
    """Let what a file still holds go nowhere: its flush would block, or complain, once more."""
    with contextlib.suppress(OSError, ValueError):
        null = os.open(os.devnull, os.O_WRONLY)
        os.dup2(null, file.fileno())
        os.close(null)
