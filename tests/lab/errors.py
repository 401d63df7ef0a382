"""Errors of the lab; each is a message of one line."""

from __future__ import annotations

from collections.abc import Callable

from tests.lab.progress import print_status


class LabError(Exception):
    """The lab failed to do something; the message is one line for people."""


class LabTimeout(LabError):
    """Something in the machine took longer than its time limit."""


class LabUnable(LabError):
    """Machines of this kind do not support an option of `Machine.boot`."""


class LabPanic(LabError):
    """The kernel under test died; `console` is the end of its console output."""

    def __init__(self, message: str, console: str) -> None:
        super().__init__(message)
        self.console = console

    def __str__(self) -> str:
        return f"{self.args[0]}\n{self.console}"


class CommandFailed(LabError):
    """A command run with `check=True` ended with a status other than 0."""


def status_of(work: Callable[[], int]) -> int:
    """Run a command's main function and return the exit status; errors are printed."""
    try:
        return work()
    except LabError as error:
        print_status(f"error: {error}")
        return 1
    except KeyboardInterrupt:
        return 130
