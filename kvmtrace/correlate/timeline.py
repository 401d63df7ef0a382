"""Entries of a timeline while they are being counted."""

from __future__ import annotations

from kvmtrace.facts import TimelineEntry
from kvmtrace.quick import maker

_make_entry = maker(TimelineEntry)


class RunningEntry:
    """An entry that may come again, millions of times; ``frozen`` gives the immutable one."""

    __slots__ = ("_count", "_entry", "_last_ts", "_ts")

    def __init__(self, entry: TimelineEntry) -> None:
        self._entry = entry
        self._ts, self._count, self._last_ts = entry.ts, entry.count, entry.last_ts

    def add(self, ts: int, count: int) -> None:
        """Count ``count`` more, at ``ts``."""
        last = self._last_ts or self._ts
        self._count += count
        self._last_ts = ts if ts > last else last
        self._ts = ts if ts < self._ts else self._ts

    def frozen(self) -> TimelineEntry:
        """Return an immutable copy, the last one if nothing was added."""
        entry = self._entry
        if self._last_ts != entry.last_ts or self._count != entry.count or self._ts != entry.ts:
            entry = self._entry = _make_entry(
                self._ts,
                entry.kind,
                entry.event,
                entry.joined_by,
                entry.vm,
                self._count,
                self._last_ts,
                entry.owner,
                entry.vmm,
            )
        return entry
