"""Find pages that were poisoned before kvmtrace started.

They have KPF_HWPOISON in /proc/kpageflags. That file has 8 bytes for every page (2 GiB on a host of
1 TiB), so it is read in slices, and only if the kernel's counts show that there is poison.
"""

from __future__ import annotations

import os
import time
from collections.abc import Iterator

from kvmtrace.enrich.owners import SLICE_SECONDS, OwnerLookup
from kvmtrace.enrich.stage import Stage
from kvmtrace.events import Event, Found, KernelCounts, Lost
from kvmtrace.linux.page_flags import poisoned_in, ram_ranges
from kvmtrace.model import MAX_INCIDENTS

CONFIRM_SECONDS = 1.0  # memory_failure marks a page first and reports it last
READ_PAGES = 1 << 15  # a few milliseconds
MAX_FOUND = MAX_INCIDENTS  # each is an incident


class ExistingPoison(Stage):
    """Adds a Found, with its owners, for each poisoned page that has no poison event.

    A page may just be being poisoned, with its event on the way. A Found is therefore reported a
    while after the page was seen.
    """

    def __init__(self, owners: OwnerLookup, proc: str = "/proc") -> None:
        self._owners = owners
        self._proc = proc
        self._pages: Iterator[list[int]] | None = None
        self._unconfirmed: list[tuple[float, list[int]]] = []
        self._excess = 0  # found beyond MAX_FOUND

    def process(self, events: list[Event], now: int, *, last: bool = False) -> list[Event]:
        """Read on in the page flags, and append what was found; with ``last`` also the newest."""
        for event in events:
            if isinstance(event, KernelCounts) and event.at_start and _counts_poison(event):
                self._pages = self._poisoned_pages()
        self.confirm_later(self._owners.unexplained_pfns())
        found = self.scan(now, time.monotonic() + SLICE_SECONDS, self._owners.pfns, last=last)
        return events + (self._owners.add_owners(found, now) if found else [])

    def scan(
        self, ts: int, deadline: float, reported: frozenset[int], *, last: bool = False
    ) -> list[Event]:
        """Read page flags until ``deadline`` (monotonic seconds); return what is confirmed.

        ``reported``: pfns that have a poison event. ``last``: confirm everything.
        """
        while self._pages is not None:
            pfns = next(self._pages, None)
            if pfns is None:
                self._pages = None
            else:
                self.confirm_later(pfns)
            if time.monotonic() >= deadline:
                break
        events: list[Event] = []
        if self._excess:
            events.append(Lost(ts, "found_pages", self._excess))
            self._excess = 0
        while self._unconfirmed and (last or self._unconfirmed[0][0] <= time.monotonic()):
            pfns = self._unconfirmed.pop(0)[1]
            events += [Found(ts, pfn) for pfn in pfns if pfn not in reported]
        return events

    def confirm_later(self, pfns: list[int]) -> None:
        """Report these poisoned pages in a while, if they still have no poison event."""
        if pfns:
            self._unconfirmed.append((time.monotonic() + CONFIRM_SECONDS, pfns))

    def _poisoned_pages(self) -> Iterator[list[int]]:
        """The poisoned pfns of one read after the other; ``MAX_FOUND`` in all."""
        room = MAX_FOUND
        try:
            fd = os.open(f"{self._proc}/kpageflags", os.O_RDONLY | os.O_CLOEXEC)
        except OSError:
            return
        try:
            for first, end in ram_ranges(f"{self._proc}/iomem"):
                for start in range(first, end, READ_PAGES):
                    flags = os.pread(fd, 8 * min(READ_PAGES, end - start), 8 * start)
                    pfns = [start + index for index in poisoned_in(flags)]
                    self._excess += max(0, len(pfns) - room)
                    yield pfns[:room]
                    room -= min(room, len(pfns))
        except OSError:
            return
        finally:
            os.close(fd)


def _counts_poison(counts: KernelCounts) -> bool:
    return bool(counts.hardware_corrupted_bytes or dict(counts.failures).get("total"))
