"""Halves of joins that wait for the other one: what memory_failure does before it traces."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import TypeVar

from kvmtrace.bounded import BoundedDict
from kvmtrace.correlate.limits import Limits
from kvmtrace.events import GmemPoison, Owned, Poison, Sigbus

# How long a half of a same-thread join may wait for its other half, which follows within one call
# of memory_failure: longer means that the other half was lost.
JOIN_NS = 5_000_000_000

_T = TypeVar("_T", GmemPoison, Owned, Sigbus)


class PendingEvents:
    """Everything is taken once; what waits longest gives way to what is new.

    It is lost if its other half might still have come.
    """

    def __init__(self, limits: Limits, lose: Callable[[str, int], None]) -> None:
        self._limits = limits
        self._lose = lose
        self._last_ts = 0
        limit = limits.pending
        # By thread, by sending thread, by pfn: senders of signals for it, and its owners.
        self._gmem: BoundedDict[int, list[GmemPoison]] = BoundedDict(limit, self._drop)
        self._signals: BoundedDict[int, list[Sigbus]] = BoundedDict(limit, self._drop)
        self._senders: BoundedDict[int, dict[int, None]] = BoundedDict(limit)
        self._owned: BoundedDict[int, list[Owned]] = BoundedDict(limit, self._drop)

    def add(self, event: GmemPoison | Sigbus | Owned) -> None:
        """It came before its poison."""
        match event:
            case GmemPoison():
                self._keep(self._gmem, event.tid, event)
            case Owned():
                self._keep(self._owned, event.pfn, event)
            case Sigbus(sender=int(sender)):
                # Sent by memory_failure, which traces the poison only afterwards; or of a page that
                # was poisoned before kvmtrace started and is not found yet.
                self._keep_signal(sender, event)

    def gmem(self, poison: Poison) -> GmemPoison | None:
        """The thread's last ``GmemPoison`` just before this poison."""
        if poison.tid is None:
            return None
        told = self._gmem.pop(poison.tid, [])
        # What is read early is of the thread's next poison.
        if later := [event for event in told if event.ts > poison.ts]:
            self._gmem[poison.tid] = later
        before = [event for event in told if _just_before(event.ts, poison.ts)]
        return max(before, key=lambda event: event.ts, default=None)

    def signals(self, poison: Poison) -> list[Sigbus]:
        """Signals that the same thread sent, just before."""
        if poison.tid is None:
            return []
        sent = self._signals.pop(poison.tid, [])
        # What is read early is of the thread's next poison, what names a page is of that one.
        others = [
            signal
            for signal in sent
            if signal.ts > poison.ts
            or (signal.pfn is not None and not _just_before(signal.ts, poison.ts))
        ]
        if others:
            self._signals[poison.tid] = others
        return [signal for signal in sent if _just_before(signal.ts, poison.ts)]

    def signals_of(self, pfn: int) -> list[Sigbus]:
        """Signals at whose address the page table named the pfn."""
        found = []
        for sender in self._senders.pop(pfn, {}):
            kept = self._signals.pop(sender, [])
            found += [signal for signal in kept if signal.pfn == pfn]
            if others := [signal for signal in kept if signal.pfn != pfn]:
                self._signals[sender] = others
        return found

    def owned(self, pfn: int, ts: int) -> list[Owned]:
        """Page table entries with the pfn, found just before ``ts`` or later.

        The VM that had the page long ago need not have it now.
        """
        return [one for one in self._owned.pop(pfn, []) if ts - one.ts <= JOIN_NS]

    def unpoisoned(self, pfn: int) -> None:
        """Nothing that waits for this page's poison is about its next one."""
        self._owned.pop(pfn, None)
        self.signals_of(pfn)

    def _keep_signal(self, sender: int, event: Sigbus) -> None:
        kept = self._signals.get(sender, [])
        for at, known in enumerate(kept):
            if known == replace(event, ts=known.ts, count=known.count):
                # A VMM that ignores them gets the same one many times over.
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

    def _drop(self, _: int, dropped: Sequence[GmemPoison | Owned | Sigbus]) -> None:
        if young := sum(_just_before(one.ts, self._last_ts) for one in dropped):
            self._lose("halves", young)


def _just_before(ts: int, poisoned_ts: int) -> bool:
    return 0 <= poisoned_ts - ts <= JOIN_NS
