"""What can go wrong with the lab, each said in one line."""

from __future__ import annotations

from collections.abc import Callable

from tests.lab.progress import print_status


class LabError(Exception):
    """The lab could not do what was asked; the message is one line for a person."""


class LabTimeout(LabError):
    """Something in the machine took longer than it was given."""


class LabUnable(LabError):
    """No machine of this kind can be had that way, whatever one does."""


class LabPanic(LabError):
    """The kernel under test died; `console` holds the end of what it said."""

    def __init__(self, message: str, console: str) -> None:
        super().__init__(message)
        self.console = console

    def __str__(self) -> str:
        return f"{self.args[0]}\n{self.console}"


class CommandFailed(LabError):
    """A command run with `check=True` ended with another status than 0."""


def status_of(work: Callable[[], int]) -> int:
    """The exit status of a command's work."""
    try:
        return work()
    except LabError as error:
        print_status(f"error: {error}")
        return 1
    except KeyboardInterrupt:
        return 130
