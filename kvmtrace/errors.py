"""The two ways kvmtrace ends early: something on this host, or something on the command line."""

from __future__ import annotations


class KvmtraceError(Exception):
    """A reason to stop that a person can act on: one line, and a hint of the fix.

    ``detail``: what a library or the kernel said, word for word; `doctor --verbose` shows it.
    ``cli`` prints ``kvmtrace: MESSAGE`` and, on a second line, ``hint: HINT``; exit status 1.
    """

    exit_status = 1

    def __init__(self, message: str, hint: str = "", detail: str = "") -> None:
        super().__init__(message)
        self.message = message
        self.hint = hint
        self.detail = detail
        if detail:
            self.add_note(detail)  # tracebacks (KVMTRACE_DEBUG=1) show it


class UsageError(KvmtraceError):
    """The command line asks for something that is not there (an unknown VM …); status 2."""

    exit_status = 2
