"""Who has a poisoned page mapped: processes, found by their page tables.

Exact or nothing: a place is named only where a page table refers to that very pfn, or where the
same page of the same file is mapped and not faulted in. A search over many or large VMs takes
time (PAGEMAP_SCAN looks at every page table entry), so it goes on in slices.
"""

from __future__ import annotations

import struct
import time
from collections.abc import Collection, Iterable, Iterator
from contextlib import suppress
from dataclasses import dataclass

from kvmtrace import kvm
from kvmtrace.pagemap import (
    ENTRY,
    PAGE,
    PAGE_IS_HUGE,
    PAGE_IS_SWAPPED,
    PM_PRESENT,
    PM_SWAP,
    PM_UFFD_WP,
    SPECIAL_TYPES,
    Area,
    Pagemap,
    poisoned,
    referenced_pfn,
)

# One call into the kernel looks at this much address space, or reads this many entries: a few
# milliseconds at the most.
SCAN_BYTES = 1 << 30
READ_ENTRIES = 1 << 15

MAX_NEEDLES = 16


@dataclass(frozen=True, slots=True)
class Place:
    """``size`` bytes at ``hva`` in process ``pid`` are lost to ``pfn``.

    ``pfn`` is None for a lost hugetlb page: pagemap shows where, but not which page it was;
    ``hva`` is the start of the huge page then. ``via``: "pagemap", or "mapping" (the same page of
    the same file). ``file``: (device, inode, page offset) behind it, where there is a file.
    """

    pid: int
    hva: int
    pfn: int | None
    size: int
    via: str = "pagemap"
    file: tuple[int, int, int] | None = None


def poisoned_pfn(pid: int, hva: int, proc: str = "/proc") -> int | None:
    """The poisoned pfn at ``hva``; None if there is none, or the process is gone."""
    entry = entry_at(pid, hva, proc)
    return None if entry is None else poisoned(entry)


def entry_at(pid: int, hva: int, proc: str = "/proc") -> int | None:
    """The page table entry at ``hva`` (pagemap's); None if it cannot be read."""
    with suppress(OSError):
        pagemap = Pagemap(pid, proc)
        try:
            entries = pagemap.entries(hva, 1)
        finally:
            pagemap.close()
        return entries[0] if entries else None
    return None


def find(pfns: Collection[int], pids: Iterable[int], proc: str = "/proc") -> list[Place]:
    """All places at once, however long it takes."""
    search = Search(pfns, pids, proc)
    return search.step(float("inf"))


class Search:
    """A search for ``pfns`` in ``pids``; ``step`` until ``done``. ``huge``: those of huge pages."""

    def __init__(
        self,
        pfns: Collection[int],
        pids: Iterable[int],
        proc: str = "/proc",
        huge: frozenset[int] = frozenset(),
    ) -> None:
        self.pfns = frozenset(pfns)
        self.huge = huge
        self.done = not self.pfns
        self._pids = tuple(pids)
        self._proc = proc
        self._work = self._walk()

    def step(self, deadline: float) -> list[Place]:
        """Go on until ``deadline`` (monotonic seconds), or the end; the places found meanwhile."""
        found: list[Place] = []
        while not self.done:
            try:
                place = next(self._work)
            except StopIteration:
                self.done = True
                break
            if place is not None:
                found.append(place)
            if time.monotonic() >= deadline:
                break
        return found

    def _walk(self) -> Iterator[Place | None]:
        files: dict[tuple[int, int, int], int] = {}
        known: set[tuple[int, int]] = set()
        for pid in self._pids:
            for place in self._process(pid):
                if place is not None:
                    known.add((place.pid, place.hva))
                    if place.file is not None and place.pfn is not None:
                        files[place.file] = place.pfn
                yield place
        for file, pfn in files.items():
            for place in mapped(file, pfn, self._pids, self._proc):
                if (place.pid, place.hva) not in known:
                    yield place

    def _process(self, pid: int) -> Iterator[Place | None]:
        with suppress(OSError):  # it may end at any time
            pagemap = Pagemap(pid, self._proc)
            try:
                # Guest memory is the largest there is: first things first.
                areas = sorted(pagemap.areas(), key=lambda area: area.start - area.end)
                for area in areas:
                    yield from self._area(pid, pagemap, area)
            finally:
                pagemap.close()

    def _area(self, pid: int, pagemap: Pagemap, area: Area) -> Iterator[Place | None]:
        for start in range(area.start, area.end, SCAN_BYTES):
            end = min(start + SCAN_BYTES, area.end)
            regions = pagemap.scan(start, end, PAGE_IS_SWAPPED)
            if regions is None:
                yield from self._read(pid, pagemap, area, start, end)
                continue
            for first, last, what in regions:
                if what & PAGE_IS_HUGE and pagemap.page_size(area) > PAGE:
                    yield from self._huge(pid, pagemap, area, first, last)
                else:
                    yield from self._read(pid, pagemap, area, first, last)
            yield None

    def _huge(
        self, pid: int, pagemap: Pagemap, area: Area, first: int, last: int
    ) -> Iterator[Place]:
        size = pagemap.page_size(area)
        for hva in range(first, last, size):
            entries = pagemap.entries(hva, 1)
            # A page on its way (migration) is back in a moment; a uffd marker is no loss.
            if not entries or entries[0] & (PM_PRESENT | PM_SWAP | PM_UFFD_WP):
                continue
            yield Place(pid, hva, None, size, file=_file(area, hva))

    def _read(
        self, pid: int, pagemap: Pagemap, area: Area, first: int, last: int
    ) -> Iterator[Place | None]:
        for start in range(first, last, READ_ENTRIES * PAGE):
            count = min(READ_ENTRIES, (last - start) >> kvm.PAGE_SHIFT)
            for index, pfn in _matches(pagemap.raw(start, count), self.pfns):
                hva = start + index * PAGE
                yield Place(pid, hva, pfn, PAGE, file=_file(area, hva))
            yield None


def mapped(
    file: tuple[int, int, int], pfn: int, pids: Iterable[int], proc: str = "/proc"
) -> Iterator[Place]:
    """Where processes map page ``file`` (device, inode, page offset) without having touched it.

    Whoever has a page of their own there (copied on write, or put in its place since) is safe.
    """
    device, inode, index = file
    for pid in pids:
        with suppress(OSError):
            pagemap = Pagemap(pid, proc)
            try:
                for area in pagemap.areas():
                    if (area.device, area.inode) != (device, inode):
                        continue
                    hva = area.start + index * PAGE - area.offset
                    if not area.start <= hva < area.end:
                        continue
                    entries = pagemap.entries(hva, 1)
                    if not entries:
                        continue
                    if entries[0] & (PM_PRESENT | PM_SWAP) and referenced_pfn(entries[0]) != pfn:
                        continue
                    yield Place(pid, hva, pfn, pagemap.page_size(area), "mapping", file)
            finally:
                pagemap.close()


def _file(area: Area, hva: int) -> tuple[int, int, int] | None:
    # A private mapping's page may be the process's own copy: its file says nothing then.
    if not area.inode or not area.shared:
        return None
    return area.device, area.inode, area.file_offset(hva) >> kvm.PAGE_SHIFT


def _matches(raw: bytes, pfns: frozenset[int]) -> Iterator[tuple[int, int]]:
    """(index, pfn) of entries that refer to one of ``pfns``, found without unpacking them all."""
    if len(pfns) > MAX_NEEDLES or len(raw) < 64 * ENTRY:
        for index, (entry,) in enumerate(struct.iter_unpack("=Q", raw)):
            found = referenced_pfn(entry)
            if found is not None and found in pfns:
                yield index, found
        return
    for pfn in pfns:
        values = [pfn] + [pfn << 5 | kind for kind in SPECIAL_TYPES]
        for value in values:
            # The low six bytes of an entry are pfn (or type and offset) only; flags come above.
            needle = (value & (1 << 48) - 1).to_bytes(6, "little")
            at = raw.find(needle)
            while at >= 0:
                if at % 8 == 0:
                    entry = int.from_bytes(raw[at : at + 8], "little")
                    if referenced_pfn(entry) == pfn:
                        yield at // 8, pfn
                at = raw.find(needle, at + 1)
