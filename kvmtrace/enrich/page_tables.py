"""Find the processes that have a poisoned page mapped, by their page tables.

Results are exact: a page table refers to that very pfn, or the same page of the same file is mapped
and not faulted in. A search of many or large VMs takes time (PAGEMAP_SCAN reads every page table
entry) and may hang. A ``PageTableSearch`` therefore runs in a worker process (``proc_reader``), and
its caller does not wait for it.
"""

from __future__ import annotations

import struct
import time
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping
from contextlib import suppress
from dataclasses import dataclass
from typing import TypeVar, cast

from kvmtrace import kvm
from kvmtrace.linux.pagemap import (
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
from kvmtrace.linux.proc_reader import READER, ProcReader, Starting, Stream, Unreadable

# One call into the kernel looks at this much address space, or reads this many entries: a few
# milliseconds at the most.
SCAN_BYTES = 1 << 30
READ_ENTRIES = 1 << 15

MAX_NEEDLES = 16

_T = TypeVar("_T")


@dataclass(frozen=True, slots=True)
class MappedPage:
    """Where a process has a poisoned page mapped: ``size`` bytes at ``hva`` are lost to ``pfn``.

    ``pfn`` is None for a lost hugetlb page: pagemap shows where it was, but not which page.
    ``hva`` is the start of the huge page then. ``via``: "pagemap", or "mapping" (the same page of
    the same file). ``file``: (device, inode, page offset) that is mapped there, if any.
    """

    pid: int
    hva: int
    pfn: int | None
    size: int
    via: str = "pagemap"
    file: tuple[int, int, int] | None = None


def poisoned_pfn(pid: int, hva: int, proc: str = "/proc") -> int | None:
    """Return the poisoned pfn at ``hva``; None if there is none, or it cannot be read."""
    entry = entry_at(pid, hva, proc)
    return None if entry is None else poisoned(entry)


def entry_at(pid: int, hva: int, proc: str = "/proc") -> int | None:
    """Return pagemap's entry of ``hva``; None if it cannot be read."""
    return _guarded(pid, read_entry, pid, hva, proc)


def hold(
    pid: int, pages: tuple[tuple[int, int], ...], proc: str = "/proc", *, new: bool
) -> list[bool | None]:
    """Whether each (pfn, hva) is still mapped and poisoned in process ``pid``.

    None if that is not known: nothing can be read, or the process is exiting, which takes its
    memory down well before VmGone. ``new``: return False for addresses at which guest_memfd is
    mapped.
    """
    return _guarded(pid, read_pages, pid, pages, proc, new) or [None] * len(pages)


def _guarded(pid: int, function: Callable[..., _T], *arguments: object) -> _T | None:
    try:
        return cast(_T, READER.call(pid, function, *arguments))
    except Unreadable:
        return None


def read_entry(pid: int, hva: int, proc: str) -> int | None:
    """Do the work of ``entry_at`` in the worker process."""
    pagemap = Pagemap(pid, proc)
    try:
        entries = pagemap.entries(hva, 1)
    finally:
        pagemap.close()
    return entries[0] if entries else None


def read_pages(
    pid: int, pages: tuple[tuple[int, int], ...], proc: str, new: bool
) -> list[bool | None]:
    """Do the work of ``hold`` in the worker process. Maps are read at most once."""
    pagemap = Pagemap(pid, proc)
    try:
        there: list[bool | None] = []
        for pfn, hva in pages:
            entries = pagemap.entries(hva, 1)
            there.append(poisoned(entries[0]) == pfn if entries else None)
        if not new and False not in there:
            return there
        try:
            areas = pagemap.areas()
        except OSError:
            areas = []
    finally:
        pagemap.close()
    if not new:
        return there if areas else [is_there or None for is_there in there]
    lent = [area for area in areas if area.is_guest_memfd]
    return [
        is_there and not any(area.start <= hva < area.end for area in lent)
        for is_there, (_, hva) in zip(there, pages, strict=True)
    ]


_Inode = tuple[int, int]  # device, inode
_File = tuple[int, int, int]  # and the page offset


def walk(
    pfns: tuple[int, ...],
    pids: tuple[int, ...],
    proc: str = "/proc",
    files: Mapping[_File, int] | None = None,
    scanned: tuple[int, ...] = (),
) -> Iterator[MappedPage | int | None]:
    """Yield the places of ``pfns`` in ``pids``, and where the pages ``files`` (to pfn) are mapped.

    Yields a pid before that process is searched, and None every few milliseconds in between.
    ``scanned``: processes whose page tables have been searched; only their mappings are.
    """
    files = dict(files or {})
    wanted = frozenset(pfns)
    known: set[tuple[int, int]] = set()
    mappings: dict[int, list[Area]] = {}
    for pid in (*scanned, *pids):
        yield pid
        for place in _process(pid, proc, frozenset() if pid in scanned else wanted, mappings):
            if place is not None:
                known.add((place.pid, place.hva))
                if place.file is not None and place.pfn is not None:
                    files[place.file] = place.pfn
            yield place
    pages: dict[_Inode, dict[int, int]] = {}
    for (device, inode, index), pfn in files.items():
        pages.setdefault((device, inode), {})[index] = pfn
    for pid, areas in mappings.items():
        if any((area.device, area.inode) in pages for area in areas):
            yield pid
            for place in _mapped(pid, proc, areas, pages):
                if (place.pid, place.hva) not in known:
                    yield place


class PageTableSearch:
    """A search for ``pfns`` in ``pids``, in a worker process; call ``step`` until ``done``.

    ``huge``: those of huge pages. ``files``: {(device, inode, page offset): pfn}, pages whose
    mappings are searched for as well. ``skipped``: processes that were not searched to the end.
    """

    def __init__(
        self,
        pfns: Collection[int],
        pids: Iterable[int],
        proc: str = "/proc",
        huge: frozenset[int] = frozenset(),
        *,
        files: Mapping[_File, int] | None = None,
        reader: ProcReader = READER,
    ) -> None:
        self.pfns = frozenset(pfns)
        self.huge = huge
        self.skipped: set[int] = set()
        self._files = dict(files or {})
        self.done = not self.pfns and not self._files
        self._proc = proc
        self._reader = reader
        self._to_scan = dict.fromkeys(pids)
        self._scanned: dict[int, None] = {}
        self._stream: Stream | None = None
        self._at: int | None = None  # the process that is being searched

    def step(self, deadline: float) -> list[MappedPage]:
        """Return what is found until ``deadline`` (monotonic seconds), or the end."""
        found: list[MappedPage] = []
        while not self.done:
            try:
                if self._stream is None:
                    begun = time.monotonic()
                    self._stream = self._begin(deadline)
                    deadline += time.monotonic() - begun  # a worker's start does not count
                stream = self._stream
                some, item = stream.next(deadline)
            except Starting:
                break
            except Unreadable:
                self.skipped.update(self._to_scan)
                self.close()
                break
            if isinstance(item, MappedPage):
                found.append(item)
                if item.file is not None and item.pfn is not None:
                    self._files[item.file] = item.pfn
            elif isinstance(item, int):
                self._enter(item)
            if stream.done:
                self.done = True
            elif not some and stream.stalled:
                self._skip_hung()
            elif not some or time.monotonic() >= deadline:
                break
        return found

    def close(self) -> None:
        """End the search early."""
        self.done = True
        if self._stream is not None:
            self._stream.close()

    def _begin(self, deadline: float) -> Stream:
        for pid in [pid for pid in self._to_scan if self._reader.hung_lately(pid)]:
            self._skip(pid)
        pids, scanned = tuple(self._to_scan), tuple(self._scanned)
        arguments = (tuple(self.pfns), pids, self._proc, self._files, scanned)
        return self._reader.stream(deadline, walk, *arguments)

    def _enter(self, pid: int) -> None:
        if self._at in self._to_scan:
            del self._to_scan[self._at]
            self._scanned[self._at] = None
        self._at = pid

    def _skip_hung(self) -> None:
        """The process that is being searched hangs: continue with the others."""
        assert self._stream is not None
        self._stream.close()
        self._stream = None
        if self._at is None:
            self.skipped.update(self._to_scan)
            self.done = True
            return
        self._reader.hung(self._at)
        self._skip(self._at)
        self._at = None

    def _skip(self, pid: int) -> None:
        self._to_scan.pop(pid, None)
        self._scanned.pop(pid, None)
        self.skipped.add(pid)


def _process(
    pid: int, proc: str, pfns: frozenset[int], mappings: dict[int, list[Area]]
) -> Iterator[MappedPage | None]:
    """Yield the places of ``pfns``; put the process's file mappings into ``mappings``."""
    with suppress(OSError):  # it may end at any time
        pagemap = Pagemap(pid, proc)
        try:
            # Guest memory is in the largest areas.
            areas = sorted(pagemap.areas(), key=lambda area: area.start - area.end)
            mappings[pid] = [area for area in areas if area.inode]
            for area in areas if pfns else ():
                yield from _area(pid, pagemap, area, pfns)
        finally:
            pagemap.close()


def _area(
    pid: int, pagemap: Pagemap, area: Area, pfns: frozenset[int]
) -> Iterator[MappedPage | None]:
    for start in range(area.start, area.end, SCAN_BYTES):
        end = min(start + SCAN_BYTES, area.end)
        regions = pagemap.scan(start, end, PAGE_IS_SWAPPED)
        if regions is None:
            yield from _read(pid, pagemap, area, (start, end), pfns)
            continue
        for first, last, what in regions:
            if what & PAGE_IS_HUGE and pagemap.page_size(area) > PAGE:
                yield from _huge(pid, pagemap, area, first, last)
            else:
                yield from _read(pid, pagemap, area, (first, last), pfns)
        yield None


def _huge(pid: int, pagemap: Pagemap, area: Area, first: int, last: int) -> Iterator[MappedPage]:
    size = pagemap.page_size(area)
    for hva in range(first, last, size):
        entries = pagemap.entries(hva, 1)
        # A page under migration comes back; a uffd marker is no loss.
        if not entries or entries[0] & (PM_PRESENT | PM_SWAP | PM_UFFD_WP):
            continue
        yield MappedPage(pid, hva, None, size, file=_file(area, hva))


def _read(
    pid: int, pagemap: Pagemap, area: Area, span: tuple[int, int], pfns: frozenset[int]
) -> Iterator[MappedPage | None]:
    first, last = span
    for start in range(first, last, READ_ENTRIES * PAGE):
        count = min(READ_ENTRIES, (last - start) >> kvm.PAGE_SHIFT)
        for index, pfn in _matches(pagemap.raw(start, count), pfns):
            hva = start + index * PAGE
            yield MappedPage(pid, hva, pfn, PAGE, file=_file(area, hva))
        yield None


def _mapped(
    pid: int, proc: str, areas: Iterable[Area], pages: Mapping[_Inode, Mapping[int, int]]
) -> Iterator[MappedPage]:
    """Yield where a process maps ``pages`` of files and did not touch them.

    A process with another page there (copied on write, or put there since) does not lose anything.
    ``pages``: {(device, inode): {page offset: pfn}}.
    """
    with suppress(OSError):
        pagemap = Pagemap(pid, proc)
        try:
            for area in areas:
                for index, pfn in pages.get((area.device, area.inode), {}).items():
                    hva = area.start + index * PAGE - area.offset
                    entries = pagemap.entries(hva, 1) if area.start <= hva < area.end else ()
                    if not entries:
                        continue
                    if entries[0] & (PM_PRESENT | PM_SWAP) and referenced_pfn(entries[0]) != pfn:
                        continue
                    file = (area.device, area.inode, index)
                    yield MappedPage(pid, hva, pfn, pagemap.page_size(area), "mapping", file)
        finally:
            pagemap.close()


def _file(area: Area, hva: int) -> tuple[int, int, int] | None:
    # The page of a private mapping may be the process's own copy, and not the file's.
    if not area.inode or not area.shared:
        return None
    return area.device, area.inode, area.file_offset(hva) >> kvm.PAGE_SHIFT


def _matches(raw: bytes, pfns: frozenset[int]) -> Iterator[tuple[int, int]]:
    """Yield (index, pfn) of entries that refer to one of ``pfns``, without unpacking them all."""
    if len(pfns) > MAX_NEEDLES or len(raw) < 64 * ENTRY:
        for index, (entry,) in enumerate(struct.iter_unpack("=Q", raw)):
            found = referenced_pfn(entry)
            if found is not None and found in pfns:
                yield index, found
        return
    for pfn in pfns:
        values = [pfn] + [pfn << 5 | kind for kind in SPECIAL_TYPES]
        for value in values:
            # The low six bytes of an entry are the pfn (or type and offset); flags are above.
            needle = (value & (1 << 48) - 1).to_bytes(6, "little")
            at = raw.find(needle)
            while at >= 0:
                if at % 8 == 0:
                    entry = int.from_bytes(raw[at : at + 8], "little")
                    if referenced_pfn(entry) == pfn:
                        yield at // 8, pfn
                at = raw.find(needle, at + 1)
