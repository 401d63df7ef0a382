"""The two errors that end kvmtrace: for a reason on this host, or in the command line."""

from __future__ import annotations


class KvmtraceError(Exception):
    """An error that the user can fix: one line, and a hint how; exit status 1.

    ``detail``: the original text of a library or the kernel, for `doctor --verbose`. ``cli`` prints
    ``kvmtrace: MESSAGE`` and, on a second line, ``hint: HINT``.
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
    """The command line names something that does not exist (an unknown VM …); exit status 2."""

    exit_status = 2
