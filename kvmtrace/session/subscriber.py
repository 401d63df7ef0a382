"""A client's view of a session: the backlog, and then new events.

The session never waits for a slow client. Events that the client has not read are added up as in
``history``, which bounds them and keeps counts exact.
"""

from __future__ import annotations

import threading
from collections.abc import Iterable

from kvmtrace.events import Event
from kvmtrace.session.history import CompactLog

MAX_PENDING = 4096


class Subscriber:
    """The events for one client. ``backlog``: those before it connected.

    ``publish`` never waits; ``read`` may, and is for the client's thread.
    """

    def __init__(self, backlog: list[Event], limit: int = MAX_PENDING) -> None:
        self.backlog = backlog
        self._limit = limit
        self._pending: list[Event] = []
        self._sums: CompactLog | None = None
        self._changed = threading.Condition()

    def publish(self, events: Iterable[Event]) -> None:
        with self._changed:
            for event in events:
                if self._sums is None and len(self._pending) == self._limit:
                    # The client has VMs that end meanwhile, so it needs their VmGone.
                    self._sums = CompactLog(self._limit, forget=False, where="follower")
                    for waiting in self._pending:
                        self._sums.add(waiting)
                    self._pending.clear()
                if self._sums is None:
                    self._pending.append(event)
                else:
                    self._sums.add(event)
            self._changed.notify_all()

    def read(self, timeout: float) -> list[Event]:
        """Return the events since the last call; wait up to ``timeout`` seconds for the first."""
        with self._changed:
            self._changed.wait_for(lambda: self._pending or self._sums, timeout)
            if self._sums is None:
                events, self._pending = self._pending, []
            else:
                events, self._sums = self._sums.events(), None
        return events
