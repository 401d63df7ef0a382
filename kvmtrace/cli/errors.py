"""The one place where errors become text: a line, a hint and an exit status."""

from __future__ import annotations

import contextlib
import os
import sys
import traceback
from collections.abc import Iterator
from typing import IO, Any

import click
from click.core import ParameterSource

from kvmtrace.cli.configuration import place_of
from kvmtrace.cli.console import discard, escape_unencodable, print_status
from kvmtrace.cli.signals import Interrupted, stop
from kvmtrace.errors import KvmtraceError, UsageError


class Failure(click.ClickException):
    """A KvmtraceError on its way out through click."""

    def __init__(self, error: KvmtraceError) -> None:
        super().__init__(error.message)
        # Click's own exceptions assign it too, although it is declared for the class.
        self.exit_code = error.exit_status  # type: ignore[misc]
        self.hint = error.hint

    def show(self, file: IO[Any] | None = None) -> None:
        """``kvmtrace: MESSAGE`` and ``hint: HINT`` on stderr."""
        print_status(f"kvmtrace: {self.message}")
        if self.hint:
            print_status(f"hint: {self.hint}")


class Group(click.Group):
    def make_context(self, *arguments: Any, **extra: Any) -> click.Context:
        escape_unencodable(sys.stderr)
        with _click_as_failure():
            return super().make_context(*arguments, **extra)

    def invoke(self, ctx: click.Context) -> Any:
        """Run a command; whatever goes wrong becomes one line and an exit status, here only."""
        escape_unencodable(sys.stdout)
        escape_unencodable(sys.stderr)
        try:
            with stop, _click_as_failure(ctx):
                return super().invoke(ctx)
        except (click.ClickException, click.exceptions.Exit):
            raise
        except (BrokenPipeError, Interrupted):
            # Stdout's reader has left, or a signal came during a write: print nothing more.
            discard(sys.stdout)
            return None
        except Exception as error:
            if os.environ.get("KVMTRACE_DEBUG"):
                traceback.print_exc()
            raise Failure(as_kvmtrace_error(error)) from error


@contextlib.contextmanager
def _click_as_failure(group: click.Context | None = None) -> Iterator[None]:
    """Turn click's usage errors of three lines into one line and a hint.

    ``group``: the context whose subcommand runs, as some of click's errors do not name it.
    """
    try:
        yield
    except click.UsageError as error:
        # `kvmtrace` alone prints the help; since click 8.2 that is raised as an error.
        if isinstance(error, getattr(click.exceptions, "NoArgsIsHelpError", ())):
            raise
        what = error.format_message().rstrip(".")
        if error.ctx:
            path = error.ctx.command_path
        else:
            path = f"kvmtrace {group.invoked_subcommand}" if group else "kvmtrace"
        found = _not_on_the_command_line(error) or UsageError(
            what[:1].lower() + what[1:], f"`{path} --help` lists what there is"
        )
        raise Failure(found) from error


def _not_on_the_command_line(error: click.UsageError) -> UsageError | None:
    """What is wrong with the value of an environment variable, or of the configuration file."""
    option = getattr(error, "param", None)
    if not isinstance(option, click.Option) or error.ctx is None or option.name is None:
        return None
    what = error.format_message().rstrip(".")
    match error.ctx.get_parameter_source(option.name):
        case ParameterSource.ENVIRONMENT:
            names = [option.envvar] if isinstance(option.envvar, str) else option.envvar or []
            given = next((name for name in names if os.environ.get(name)), "a variable")
            return UsageError(
                what[:1].lower() + what[1:],
                f"{given} in the environment has that value: unset it, or give {option.opts[-1]}",
            )
        case ParameterSource.DEFAULT_MAP:
            path, setting = place_of(error.ctx, option)
            return UsageError(
                f"{path}: {setting}: {error.message.rstrip('.')}",
                f"`kvmtrace {error.ctx.info_name} --help` shows what {option.opts[-1]} takes",
            )
    return None


def as_kvmtrace_error(error: Exception) -> KvmtraceError:
    """Any error as a message and a hint."""
    if isinstance(error, KvmtraceError):
        return error
    if isinstance(error, OSError) and error.strerror:
        where = f"{error.filename}: " if error.filename else ""
        return KvmtraceError(f"{where}{error.strerror}", "KVMTRACE_DEBUG=1 shows where")
    return KvmtraceError(
        f"internal error: {type(error).__name__}: {error}",
        "KVMTRACE_DEBUG=1 shows a traceback; please report it",
    )
