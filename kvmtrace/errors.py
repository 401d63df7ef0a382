"""The two ways kvmtrace ends early: something on this host, or something on the command line."""

from __future__ import annotations


class KvmtraceError(Exception):
    """A reason to stop that a person can act on: one line, and a hint of the fix.

    ``cli`` prints ``kvmtrace: MESSAGE`` and, on a second line, ``hint: HINT``; exit status 1.
    """

    exit_status = 1

    def __init__(self, message: str, hint: str = "") -> None:
        super().__init__(message)
        self.message = message
        self.hint = hint


class UsageError(KvmtraceError):
    """The command line asks for something that is not there (an unknown VM …); status 2."""

    exit_status = 2
