"""Events that wait for their poison: what memory_failure does before it traces its result."""

from __future__ import annotations

import typing
from collections.abc import Sequence
from dataclasses import fields, replace
from operator import attrgetter

from kvmtrace.bounded import BoundedDict
from kvmtrace.correlate.limits import CountLost, Limits
from kvmtrace.events import JOIN_NS, Owned, Poison, Sigbus

_Like = tuple[object, ...]
"""What two signals have in common that differ in time and count only."""


class PendingEvents:
    """Each event is taken once. The oldest gives way to new ones; it is counted as lost if its
    poison might still have come.
    """

    def __init__(self, limits: Limits, count_lost: CountLost) -> None:
        self._limits = limits
        self._count_lost = count_lost
        self._last_ts = 0
        limit = limits.pending
        # By sending thread, by pfn: senders of signals for it, and its owners.
        self._signals: BoundedDict[int, dict[_Like, Sigbus]] = BoundedDict(
            limit, lambda _, dropped: self._count_dropped(list(dropped.values()))
        )
        self._senders: BoundedDict[int, dict[int, None]] = BoundedDict(limit)
        self._owned: BoundedDict[int, list[Owned]] = BoundedDict(
            limit, lambda _, dropped: self._count_dropped(dropped)
        )

    def add(self, event: Sigbus | Owned) -> None:
        """Keep an event that came before its poison."""
        match event:
            case Owned():
                self._last_ts = event.ts
                owned = self._owned.setdefault(event.pfn, [])
                owned.append(event)
                if len(owned) > self._limits.pending_each:  # more than a page can plausibly have
                    del owned[0]
            case Sigbus(sender=int(sender)):
                # memory_failure sends it before it traces the poison; or the page was poisoned
                # before kvmtrace started and is not found yet.
                self._keep_signal(sender, event)

    def take_signals(self, poison: Poison) -> list[Sigbus]:
        """Take the signals that the same thread sent just before this poison."""
        if poison.tid is None:
            return []
        sent = self._signals.pop(poison.tid, {})
        # A later signal is of the thread's next poison, one with a pfn is of that page.
        others = {
            like: signal
            for like, signal in sent.items()
            if signal.ts > poison.ts
            or (signal.pfn is not None and not _just_before(signal.ts, poison.ts))
        }
        if others:
            self._signals[poison.tid] = others
        return [signal for signal in sent.values() if _just_before(signal.ts, poison.ts)]

    def take_signals_of(self, pfn: int) -> list[Sigbus]:
        """Take the signals at whose address the page table has the pfn."""
        found: list[Sigbus] = []
        for sender in self._senders.pop(pfn, {}):
            kept = self._signals.pop(sender, {})
            found += [signal for signal in kept.values() if signal.pfn == pfn]
            if others := {like: signal for like, signal in kept.items() if signal.pfn != pfn}:
                self._signals[sender] = others
        return found

    def take_owned(self, pfn: int, ts: int) -> list[Owned]:
        """Take the owners of the page, found just before ``ts`` or later.

        A VM that had the page long ago need not have it now.
        """
        return [one for one in self._owned.pop(pfn, []) if ts - one.ts <= JOIN_NS]

    def drop(self, pfn: int) -> None:
        """Drop what waits for a poison of this page: it is not about its next one."""
        self._owned.pop(pfn, None)
        self.take_signals_of(pfn)

    def _keep_signal(self, sender: int, event: Sigbus) -> None:
        kept = self._signals.setdefault(sender, {})
        like = _like(event)
        known = kept.get(like)
        if known is not None:
            # A VMM that ignores signals gets the same one many times over.
            kept[like] = replace(event, count=known.count + event.count)
        else:
            self._last_ts = event.ts
            kept[like] = event
            if len(kept) > self._limits.pending_each:
                del kept[next(iter(kept))]
        if event.pfn is not None:
            self._senders.setdefault(event.pfn, {})[sender] = None

    def _count_dropped(self, dropped: Sequence[Owned | Sigbus]) -> None:
        if young := sum(_just_before(one.ts, self._last_ts) for one in dropped):
            self._count_lost("halves", young)


_DISTINCT = attrgetter(*(f.name for f in fields(Sigbus) if f.name not in ("ts", "count")))


def _like(event: Sigbus) -> _Like:
    return typing.cast("_Like", _DISTINCT(event))


def _just_before(ts: int, poisoned_ts: int) -> bool:
    return 0 <= poisoned_ts - ts <= JOIN_NS
