"""What was told, reconciled with what the kernel counted."""

from __future__ import annotations

from collections.abc import Hashable, Mapping
from typing import Generic, TypeVar

K = TypeVar("K", bound=Hashable)


class Tally(Generic[K]):
    """Reconciles events with totals, so that what is told adds up to what happened.

    A thing is known by its event (``event``), by the kernel's total (``total``), or both. What was
    told of a key is never more than there was so far, and after ``total`` never less than the
    total: the larger of "events seen" and "kernel's total" is told, each thing once.
    """

    def __init__(self) -> None:
        self._seen: dict[K, int] = {}
        self._told: dict[K, int] = {}
        self._in_kernel: set[K] = set()
        self._lost = 0

    def event(self, key: K) -> bool:
        """An event of this key was read: whether it has to be told now."""
        seen = self._seen[key] = self._seen.get(key, 0) + 1
        if seen <= self._told.get(key, 0):
            return False
        self._told[key] = seen
        return True

    def total(self, counts: Mapping[K, int]) -> list[tuple[K, int]]:
        """Things of which no event came: [(key, how many)], told by this."""
        owed = []
        self._in_kernel.update(counts)
        for key, total in counts.items():
            told = self._told.get(key, 0)
            if total > told:
                owed.append((key, total - told))
                self._told[key] = total
        return owed

    def lost(self, dropped: int) -> int:
        """Things newly lost: those the kernel had no entry for, less those whose events came."""
        if not dropped:
            return 0
        seen = sum(n for key, n in self._seen.items() if key not in self._in_kernel)
        lost = max(0, dropped - seen)
        fresh, self._lost = max(0, lost - self._lost), max(lost, self._lost)
        return fresh

    def __len__(self) -> int:
        return len(self._told)
