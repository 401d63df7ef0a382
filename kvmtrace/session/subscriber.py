"""Readers that follow a session from elsewhere: what happened before, and then what happens.

However slow a follower is, the session does not wait for it and keeps little for it: what it has
not taken is added up as ``history`` does it, so that its counts stay exact.
"""

from __future__ import annotations

import threading
from collections.abc import Iterable

from kvmtrace.events import Event
from kvmtrace.session.history import CompactLog

MAX_PENDING = 4096


class Subscriber:
    """``past``: what happened before it came. ``put`` never waits; ``take`` may, in its thread."""

    def __init__(self, past: list[Event], limit: int = MAX_PENDING) -> None:
        self.past = past
        self._limit = limit
        self._pending: list[Event] = []
        self._sums: CompactLog | None = None
        self._changed = threading.Condition()

    def put(self, events: Iterable[Event]) -> None:
        """What has just happened."""
        with self._changed:
            for event in events:
                if self._sums is None and len(self._pending) == self._limit:
                    # It knows of the VMs that end meanwhile: nothing about them may be forgotten.
                    self._sums = CompactLog(self._limit, forget=False, where="follower")
                    for waiting in self._pending:
                        self._sums.add(waiting)
                    self._pending.clear()
                if self._sums is None:
                    self._pending.append(event)
                else:
                    self._sums.add(event)
            self._changed.notify_all()

    def take(self, timeout: float) -> list[Event]:
        """What happened since the last time; waits up to ``timeout`` seconds for something."""
        with self._changed:
            self._changed.wait_for(lambda: self._pending or self._sums, timeout)
            if self._sums is None:
                events, self._pending = self._pending, []
            else:
                events, self._sums = self._sums.events(), None
        return events
