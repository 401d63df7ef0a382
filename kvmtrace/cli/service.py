"""What ``serve`` gives its service manager: readiness, a heartbeat, and log entries.

A hook gets those of incidents, too.
"""

from __future__ import annotations

import os
import select
import sys
import time

from kvmtrace.cli.hooks import HookRun, Hooks
from kvmtrace.linux import clock, journal, service_manager
from kvmtrace.probes import ATTACHING_ANEW
from kvmtrace.sanitize import clean
from kvmtrace.session.session import Session
from kvmtrace.views.hook_input import hook_input, hook_variables, is_wanted
from kvmtrace.views.incident_log import HOOK_ID, IncidentLog, LogEntry
from kvmtrace.views.tables import header

# If events were not read for so long, the service is not reported as alive.
_ALIVE_SECONDS = 10.0
# While all is attached anew, for which it may have to be compiled: TimeoutStartSec of the unit.
_ATTACHING_SECONDS = 180.0
_LOOK_SECONDS = 1.0
_WARNING = 4
_MAX_LINE = 8192


class Service:
    """Call ``ready`` once, ``look`` at least once a second, and ``ending`` at the end.

    ``log_format``: "text", "json", "journal", or "auto": the journal where stderr leads there, else
    text.
    """

    def __init__(self, session: Session, log_format: str, hooks: Hooks | None = None) -> None:
        self._session = session
        self._hooks = hooks
        if log_format == "auto":
            log_format = "journal" if journal.is_stream(2) else "text"
        self._format = log_format
        self._log = IncidentLog()
        self._seen: object = None
        self._status = ""
        self._next_look = 0.0
        self._alive_every = service_manager.watchdog_seconds()
        self._next_alive = 0.0
        self.unwritten = 0
        """Log entries that could not be written."""

    def ready(self) -> None:
        """Report that all that was asked for is attached and answers."""
        self._status = header.watching_text(self._session.snapshot())
        service_manager.notify(READY="1", STATUS=self._status)

    def look(self) -> None:
        """Log what changed, and report that the reader is alive, if it is."""
        now = time.monotonic()
        if self._alive_every is not None and now >= self._next_alive:
            if self._is_alive():
                service_manager.notify(WATCHDOG="1")
            self._next_alive = now + min(self._alive_every, _ALIVE_SECONDS) / 2
        if now < self._next_look:
            return
        self._next_look = now + _LOOK_SECONDS
        self._log_hooks()
        if not self._session.rounds:
            return  # what was there at the start is not news, and is seen as a whole
        # A snapshot of many VMs costs something: it is taken only if it can differ.
        seen = self._session.fed, self._session.probes()
        if seen == self._seen and not self._log.waits:
            return
        self._seen = seen
        snapshot = self._session.snapshot()
        if (status := header.watching_text(snapshot)) != self._status:
            self._status = status
            service_manager.notify(STATUS=status)
        for entry in self._log.entries(snapshot, self._session.now()):
            wall = snapshot.wall(self._session.now())
            self._log_entry(entry, wall)
            change = entry.change
            if self._hooks is not None and change is not None and is_wanted(change):
                about = entry.fields.get("INCIDENT", "")
                data = hook_input(entry, change, snapshot, wall)
                self._hooks.add(HookRun(about, data, hook_variables(change)))

    def _is_alive(self) -> bool:
        age = self._session.age()
        if age >= _ALIVE_SECONDS:
            is_attaching = any(one.why == ATTACHING_ANEW for one in self._session.probes())
            return is_attaching and age < _ATTACHING_SECONDS
        return True

    def ending(self) -> None:
        service_manager.notify(STOPPING="1")
        if self._hooks is not None:
            self._hooks.close()
            self._log_hooks()

    def _log_hooks(self) -> None:
        for note in self._hooks.notes() if self._hooks is not None else ():
            about = f" for incident {note.about}" if note.about else ""
            fields = {"INCIDENT": note.about} if note.about else {}
            entry = LogEntry(_WARNING, HOOK_ID, f"hook{about}: {note.text}", fields)
            self._log_entry(entry, clock.wall_ns())

    def _log_entry(self, entry: LogEntry, wall: int) -> None:
        if not self._write(entry, wall):
            self.unwritten += 1
        elif self.unwritten:
            self._report_unwritten()

    def _write(self, entry: LogEntry, wall: int) -> bool:
        match self._format:
            case "journal":
                return journal.send(entry.as_journal())
            case "json":
                return _print(entry.as_json(wall))
        return _print(f"kvmtrace: {clean(entry.message, _MAX_LINE)}")

    def _report_unwritten(self) -> None:
        count, self.unwritten = self.unwritten, 0
        _print(f"kvmtrace: {count} log entries before this one were not written: nobody read them")


def _print(line: str) -> bool:
    """Write a line to stderr if that does not block: the reader of events must not wait for it."""
    try:
        poller = select.poll()
        poller.register(2, select.POLLOUT)
        if not poller.poll(0):
            return False
        sys.stderr.flush()
        os.write(2, (line + "\n").encode(errors="backslashreplace"))
    except OSError:
        return False
    return True
