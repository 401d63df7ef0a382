"""Totals of a session: poisons by kind, latencies, losses, and the kernel's own counts."""

from __future__ import annotations

import bisect

from kvmtrace.correlate.limits import Limits
from kvmtrace.events import KernelCounts, Poison
from kvmtrace.model import LATENCY_BUCKETS, KernelAccount, Latency
from kvmtrace.page_types import is_newly_lost


class Totals:
    """Totals that only grow."""

    def __init__(self, limits: Limits) -> None:
        self._limits = limits
        self.poisons: dict[tuple[str, str], int] = {}
        self.lost: dict[str, int] = {}
        self._latency = [0] * (len(LATENCY_BUCKETS) + 1)
        self._latency_sum = 0.0
        self._counts: tuple[KernelCounts, KernelCounts] | None = None  # first and last
        self._seen_failures = 0

    def add_poison(self, event: Poison) -> None:
        kind = (event.page_type, event.result)
        if kind in self.poisons or len(self.poisons) < self._limits.kinds:
            self.poisons[kind] = self.poisons.get(kind, 0) + 1
        if self._counts is not None and is_newly_lost(event.page_type):
            self._seen_failures += 1

    def add_kernel_counts(self, event: KernelCounts) -> None:
        """Take the kernel's counts, read anew."""
        if event.at_start or self._counts is None:
            self._counts, self._seen_failures = (event, event), 0
        else:
            self._counts = self._counts[0], event

    def add_latency(self, poisoned_ts: int | None, notified_ts: int | None) -> None:
        """Count a page's first delivery, if both times are known."""
        if poisoned_ts is None or notified_ts is None or notified_ts < poisoned_ts:
            return
        seconds = (notified_ts - poisoned_ts) / 1e9
        self._latency[bisect.bisect_left(LATENCY_BUCKETS, seconds)] += 1
        self._latency_sum += seconds

    def count_lost(self, where: str, count: int) -> None:
        """Count what had no room, or was lost by the source."""
        if where not in self.lost and len(self.lost) >= self._limits.kinds:
            where = "other"
        self.lost[where] = self.lost.get(where, 0) + count

    def latency(self) -> Latency:
        return Latency(tuple(self._latency), self._latency_sum)

    def kernel_account(self) -> KernelAccount | None:
        """The kernel's account beside ours; None where it was never read."""
        if self._counts is None:
            return None
        first, last = (dict(counts.failures) for counts in self._counts)
        handled = None
        if "total" in first and "total" in last:
            handled = max(0, last["total"] - first["total"])
        corrupted = self._counts[1].hardware_corrupted_bytes
        return KernelAccount(first, last, handled, self._seen_failures, corrupted)
