"""Events that serve has kept, before those that happen now."""

from __future__ import annotations

import time
from collections.abc import Iterable, Iterator
from typing import TYPE_CHECKING

from kvmtrace.cli.signals import stop
from kvmtrace.correlate import Correlator
from kvmtrace.events import ClockStep, Lost, VmSeen
from kvmtrace.model import CorrelatedEvent, Snapshot

if TYPE_CHECKING:
    from kvmtrace.session.archived import ArchivedSource

_CATCH_UP_SECONDS = 3.0
_LOOK_SECONDS = 0.1


class PastEvents:
    """Events from ``since`` on (ns since the epoch); earlier ones are read for the model only.

    ``seen``: {label: VM}. ``last``: time of the last one, by the wall clock.
    """

    def __init__(self, source: ArchivedSource, since: int) -> None:
        self._source, self._since = source, since
        self._correlator = Correlator(page_shift=source.recorded.page_shift)
        self.seen: dict[str, VmSeen] = {}
        self.last = 0

    def until(self, history: Iterable[CorrelatedEvent]) -> bool:
        """End with the last event of ``history``, which a running serve has sent.

        Serve writes once a second: wait for it, but not for long. False if it does not come: then
        all that is kept comes, and what serve has later than that is not among it.
        """
        edge = max(
            (one.event.ts for one in history if not isinstance(one.event, (Lost, ClockStep))),
            default=None,
        )
        deadline = time.monotonic() + _CATCH_UP_SECONDS
        while edge is not None and not stop.requested:
            if (number := self._source.find(edge)) is not None:
                self._source.end = number
                return True
            if time.monotonic() >= deadline:
                break
            time.sleep(_LOOK_SECONDS)
        self._source.end = self._source.newest()
        return False

    def batches(self) -> Iterator[list[CorrelatedEvent]]:
        """The events, in batches; a signal ends them early."""
        while not self._source.done and not stop.requested:
            batch = []
            for event in self._source.poll(0):
                one = self._correlator.feed(event)
                self.last = max(self.last, event.ts)
                if one.vm is not None:
                    self.seen[one.vm.label] = one.vm
                if event.ts >= self._since:
                    batch.append(one)
            yield batch

    def snapshot(self) -> Snapshot:
        return self._correlator.snapshot()
