"""What was reported, reconciled with what the kernel counted."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Hashable, Mapping
from typing import Generic, TypeVar

K = TypeVar("K", bound=Hashable)


class Tally(Generic[K]):
    """Reconciles events with totals, so that what is reported adds up to what happened.

    A thing is known by its event (``event``), by the kernel's total (``total``), or both. What was
    reported of a key is never more than there was so far, and after ``total`` never less than the
    total: the larger of "events seen" and "kernel's total" is reported, each thing once.

    The kernel has room for so many keys. ``rest_of`` gives for each further key the one under which
    it counts all those together (``rests``); without one, what came without an event is ``lost``.
    """

    def __init__(self, rest_of: Callable[[K], K | None] = lambda key: None) -> None:
        self._rest_of = rest_of
        self._seen: dict[K, int] = {}
        self._told: dict[K, int] = {}
        self._in_kernel: set[K] = set()
        self._doubtful: set[K] = set()
        self._folded: Counter[K | None] = Counter()
        self._lost = 0

    def event(self, key: K) -> bool:
        """An event of this key was read: whether it has to be reported now."""
        seen = self._seen[key] = self._seen.get(key, 0) + 1
        if seen <= self._told.get(key, 0):
            return False
        self._told[key] = seen
        return True

    def total(self, counts: Mapping[K, int]) -> list[tuple[K, int]]:
        """Things of which no event came: [(key, how many)], reported by this."""
        owed = []
        self._in_kernel.update(counts)
        for key, total in counts.items():
            told = self._told.get(key, 0)
            if total > told:
                owed.append((key, total - told))
                self._told[key] = total
        return owed

    def rests(self, counts: Mapping[K, int]) -> list[tuple[K, int]]:
        """Likewise for what the kernel had no entry of its own for; after ``total``."""
        if not any(counts.values()):
            self._in_kernel.update(counts)
            return []
        by_event = self._by_event()
        known = {key: count - by_event[key] for key, count in counts.items()}
        return self.total(known)

    def lost(self, dropped: int) -> int:
        """Things newly lost: those the kernel had no entry for, less those whose events came."""
        if not dropped:
            return 0
        seen = sum(n for rest, n in self._by_event().items() if rest not in self._in_kernel)
        lost = max(0, dropped - seen)
        fresh, self._lost = max(0, lost - self._lost), max(lost, self._lost)
        return fresh

    def fold(self, counts: Mapping[K, int]) -> None:
        """The kernel's entries are used up, and these are all of them: remember no further keys.

        What was seen before the previous reading and is not in this one never gets an entry; its
        events are reported one by one, and only their number is needed.
        """
        for key in self._doubtful:
            if key not in counts and key in self._seen:
                self._folded[self._rest_of(key)] += self._seen.pop(key)
                self._told.pop(key, None)
        self._doubtful = {key for key in self._seen if key not in counts}

    def _by_event(self) -> Counter[K | None]:
        """How many came by events alone, by what they would be the rest of."""
        found = Counter(self._folded)
        for key, seen in self._seen.items():
            if key not in self._in_kernel:
                found[self._rest_of(key)] += seen
        return found

    def __len__(self) -> int:
        return len(self._seen.keys() | self._told.keys())
