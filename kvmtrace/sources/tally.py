"""What was reported, reconciled with what the kernel counted."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Hashable, Mapping
from typing import Generic, TypeVar

K = TypeVar("K", bound=Hashable)


class Tally(Generic[K]):
    """Reconciles events with totals, so that what is reported adds up to what happened.

    An exit, signal or refusal is known by its event (``event``), by the kernel's total (``total``),
    or by both. Per key, the larger of "events seen" and "kernel's total" is reported, each hit
    once: never more than happened so far, and after ``total`` never less than the total.

    The kernel has room for a limited number of keys. Further keys are counted together, under the
    key that ``unkeyed_key_of`` returns (``unkeyed``). Where it returns None, hits without an event
    are lost (``newly_lost``).
    """

    def __init__(self, unkeyed_key_of: Callable[[K], K | None] = lambda key: None) -> None:
        self._unkeyed_key_of = unkeyed_key_of
        self._seen: dict[K, int] = {}
        self._reported: dict[K, int] = {}
        self._in_kernel: set[K] = set()
        self._maybe_unkeyed: set[K] = set()
        self._forgotten: Counter[K | None] = Counter()
        self._lost = 0

    def event(self, key: K) -> bool:
        """Count an event of this key; return whether it has to be reported now."""
        seen = self._seen[key] = self._seen.get(key, 0) + 1
        if seen <= self._reported.get(key, 0):
            return False
        self._reported[key] = seen
        return True

    def total(self, counts: Mapping[K, int]) -> list[tuple[K, int]]:
        """Return the hits of which no event came, as [(key, how many)], and mark them reported."""
        unreported = []
        self._in_kernel.update(counts)
        for key, total in counts.items():
            reported = self._reported.get(key, 0)
            if total > reported:
                unreported.append((key, total - reported))
                self._reported[key] = total
        return unreported

    def unkeyed(self, counts: Mapping[K, int]) -> list[tuple[K, int]]:
        """Do the same for keys without an entry of their own; call it after ``total``."""
        if not any(counts.values()):
            self._in_kernel.update(counts)
            return []
        by_event = self._by_event()
        known = {key: count - by_event[key] for key, count in counts.items()}
        return self.total(known)

    def newly_lost(self, dropped: int) -> int:
        """Return what was lost since the last call: hits without an entry and without an event."""
        if not dropped:
            return 0
        seen = sum(n for key, n in self._by_event().items() if key not in self._in_kernel)
        lost = max(0, dropped - seen)
        new, self._lost = max(0, lost - self._lost), max(lost, self._lost)
        return new

    def forget_unkeyed(self, counts: Mapping[K, int]) -> None:
        """Forget keys that will never get an entry. ``counts``: all entries; none is left.

        A key seen before the previous reading that is not in this one never gets an entry. Its
        events are reported one by one, so only their number is kept.
        """
        for key in self._maybe_unkeyed:
            if key not in counts and key in self._seen:
                self._forgotten[self._unkeyed_key_of(key)] += self._seen.pop(key)
                self._reported.pop(key, None)
        self._maybe_unkeyed = {key for key in self._seen if key not in counts}

    def _by_event(self) -> Counter[K | None]:
        """Count the hits known by events alone, under their unkeyed key."""
        found = Counter(self._forgotten)
        for key, seen in self._seen.items():
            if key not in self._in_kernel:
                found[self._unkeyed_key_of(key)] += seen
        return found

    def __len__(self) -> int:
        return len(self._seen.keys() | self._reported.keys())
