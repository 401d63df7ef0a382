"""Events that wait for their poison: what memory_failure does before it traces its result."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import TypeVar

from kvmtrace.bounded import BoundedDict
from kvmtrace.correlate.limits import CountLost, Limits
from kvmtrace.events import GmemPoison, Owned, Poison, Sigbus

# How long an event may wait for a poison of the same thread. That follows within one call of
# memory_failure; if it takes longer, it was lost.
JOIN_NS = 5_000_000_000

_T = TypeVar("_T", GmemPoison, Owned, Sigbus)


class PendingEvents:
    """Each event is taken once. The oldest gives way to new ones; it is counted as lost if its
    poison might still have come.
    """

    def __init__(self, limits: Limits, count_lost: CountLost) -> None:
        self._limits = limits
        self._count_lost = count_lost
        self._last_ts = 0
        limit = limits.pending
        # By thread, by sending thread, by pfn: senders of signals for it, and its owners.
        self._gmem: BoundedDict[int, list[GmemPoison]] = BoundedDict(limit, self._count_dropped)
        self._signals: BoundedDict[int, list[Sigbus]] = BoundedDict(limit, self._count_dropped)
        self._senders: BoundedDict[int, dict[int, None]] = BoundedDict(limit)
        self._owned: BoundedDict[int, list[Owned]] = BoundedDict(limit, self._count_dropped)

    def add(self, event: GmemPoison | Sigbus | Owned) -> None:
        """Keep an event that came before its poison."""
        match event:
            case GmemPoison():
                self._keep(self._gmem, event.tid, event)
            case Owned():
                self._keep(self._owned, event.pfn, event)
            case Sigbus(sender=int(sender)):
                # memory_failure sends it before it traces the poison; or the page was poisoned
                # before kvmtrace started and is not found yet.
                self._keep_signal(sender, event)

    def take_gmem(self, poison: Poison) -> GmemPoison | None:
        """Take the thread's last ``GmemPoison`` just before this poison."""
        if poison.tid is None:
            return None
        kept = self._gmem.pop(poison.tid, [])
        # A later event is of the thread's next poison.
        if later := [event for event in kept if event.ts > poison.ts]:
            self._gmem[poison.tid] = later
        before = [event for event in kept if _just_before(event.ts, poison.ts)]
        return max(before, key=lambda event: event.ts, default=None)

    def take_signals(self, poison: Poison) -> list[Sigbus]:
        """Take the signals that the same thread sent just before this poison."""
        if poison.tid is None:
            return []
        sent = self._signals.pop(poison.tid, [])
        # A later signal is of the thread's next poison, one with a pfn is of that page.
        others = [
            signal
            for signal in sent
            if signal.ts > poison.ts
            or (signal.pfn is not None and not _just_before(signal.ts, poison.ts))
        ]
        if others:
            self._signals[poison.tid] = others
        return [signal for signal in sent if _just_before(signal.ts, poison.ts)]

    def take_signals_of(self, pfn: int) -> list[Sigbus]:
        """Take the signals at whose address the page table has the pfn."""
        found = []
        for sender in self._senders.pop(pfn, {}):
            kept = self._signals.pop(sender, [])
            found += [signal for signal in kept if signal.pfn == pfn]
            if others := [signal for signal in kept if signal.pfn != pfn]:
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
        kept = self._signals.get(sender, [])
        for at, known in enumerate(kept):
            if known == replace(event, ts=known.ts, count=known.count):
                # A VMM that ignores signals gets the same one many times over.
                kept[at] = replace(event, count=known.count + event.count)
                break
        else:
            self._keep(self._signals, sender, event)
        if event.pfn is not None:
            self._senders.setdefault(event.pfn, {})[sender] = None

    def _keep(self, pending: BoundedDict[int, list[_T]], key: int, item: _T) -> None:
        self._last_ts = item.ts
        items = pending.setdefault(key, [])
        items.append(item)
        if len(items) > self._limits.pending_each:  # more than a page can plausibly have
            del items[0]

    def _count_dropped(self, _: int, dropped: Sequence[GmemPoison | Owned | Sigbus]) -> None:
        if young := sum(_just_before(one.ts, self._last_ts) for one in dropped):
            self._count_lost("halves", young)


def _just_before(ts: int, poisoned_ts: int) -> bool:
    return 0 <= poisoned_ts - ts <= JOIN_NS
