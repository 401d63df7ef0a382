"""Poison from before kvmtrace started, and the kernel's own account of what it handled.

Counts: /sys/devices/system/node/nodeN/memory_failure (Linux 6.3) and HardwareCorrupted of
/proc/meminfo. Pages: KPF_HWPOISON in /proc/kpageflags, read only where the counts say that there
is something to find: 8 bytes for every page, 2 GiB on a host of 1 TiB, so in slices.
"""

from __future__ import annotations

import errno
import os
import re
import time
from collections.abc import Iterator
from pathlib import Path

from kvmtrace import kvm
from kvmtrace.events import Event, Found, KernelCounts, Lost
from kvmtrace.model import MAX_INCIDENTS

COUNTS_SECONDS = 5.0
SETTLE_SECONDS = 1.0  # memory_failure marks a page first and reports it last
READ_PAGES = 1 << 15  # a few milliseconds
MAX_FOUND = MAX_INCIDENTS  # each is an incident

# include/uapi/linux/kernel-page-flags.h: bit 19, in the third byte of a little-endian entry
_KPF_HWPOISON_BYTE, _KPF_HWPOISON = 2, 1 << 3
_MARK = bytes(1 if value & _KPF_HWPOISON else 0 for value in range(256))


def hardware_corrupted_bytes(meminfo: str = "/proc/meminfo") -> int | None:
    """HardwareCorrupted of /proc/meminfo in bytes; None where the kernel does not count it."""
    try:
        with open(meminfo, encoding="ascii", errors="replace") as lines:
            found = re.search(r"^HardwareCorrupted: *([0-9]{1,15})\b", lines.read(), re.MULTILINE)
    except OSError:
        return None
    return int(found[1]) * 1024 if found else None


def failure_counts(sys: str = "/sys") -> tuple[tuple[str, int], ...]:
    """memory_failure's counters, all nodes together, by the files' names; () before 6.3.

    Raises OSError where descriptors are out: half a sum would be one that went down.
    """
    sums: dict[str, int] = {}
    for path in sorted(Path(sys, "devices/system/node").glob("node*/memory_failure/*")):
        try:
            sums[path.name] = sums.get(path.name, 0) + int(path.read_text())
        except ValueError:
            continue
        except OSError as error:
            if error.errno in (errno.EMFILE, errno.ENFILE):
                raise
            continue  # the node went offline
    return tuple(sorted(sums.items()))


def ram_ranges(iomem: str = "/proc/iomem") -> list[tuple[int, int]]:
    """Page frames [first, end) of System RAM; [] where the addresses are hidden.

    What a driver brought (kmem, virtio_mem) is listed below that driver's device.
    """
    ranges = []
    pattern = re.compile(r"^ *([0-9a-f]{1,16})-([0-9a-f]{1,16}) : System RAM", re.MULTILINE)
    try:
        text = Path(iomem).read_text(encoding="utf-8", errors="replace")
    except OSError:
        return []
    for match in pattern.finditer(text):
        first, last = int(match[1], 16), int(match[2], 16)
        if last > first:
            ranges.append((first >> kvm.PAGE_SHIFT, (last + 1) >> kvm.PAGE_SHIFT))
    return ranges


def poisoned_in(flags: bytes) -> Iterator[int]:
    """Indices of the poisoned pages in a piece of /proc/kpageflags."""
    marks = flags[_KPF_HWPOISON_BYTE::8].translate(_MARK)
    at = marks.find(1)
    while at >= 0:
        yield at
        at = marks.find(1, at + 1)


class ExistingPoison:
    """``counts`` when they changed; ``look`` at pages, a slice of memory at a time."""

    def __init__(self, proc: str = "/proc", sys: str = "/sys") -> None:
        self._proc, self._sys = proc, sys
        self._last: tuple[tuple[tuple[str, int], ...], int | None] | None = None
        self._next_counts = 0.0
        self._pages: Iterator[list[int]] | None = None
        self._settling: list[tuple[float, list[int]]] = []
        self._beyond = 0  # found, and not to be reported

    def look(
        self, ts: int, deadline: float, seen: frozenset[int], *, last: bool = False
    ) -> list[Event]:
        """Pages until ``deadline`` (monotonic seconds). ``seen``: pfns that events have.

        A page is reported a while after it was found marked, as it may be one that is just being
        poisoned: its event comes meanwhile. ``last``: report all.
        """
        while self._pages is not None:
            pfns = next(self._pages, None)
            if pfns is None:
                self._pages = None
            else:
                self.settle(pfns)
            if time.monotonic() >= deadline:
                break
        events: list[Event] = []
        if self._beyond:
            events.append(Lost(ts, "found_pages", self._beyond))
            self._beyond = 0
        while self._settling and (last or self._settling[0][0] <= time.monotonic()):
            events += [Found(ts, pfn) for pfn in self._settling.pop(0)[1] if pfn not in seen]
        return events

    def settle(self, pfns: list[int]) -> None:
        """Poisoned pages that a thread ran into: reported like those that ``look`` finds."""
        if pfns:
            self._settling.append((time.monotonic() + SETTLE_SECONDS, pfns))

    def counts(self, ts: int) -> list[Event]:
        """The kernel's account, if it was due and has changed.

        To be read before events are: the kernel reports a page before it counts it
        (action_result), so what is counted here and is not among them was missed.
        """
        if time.monotonic() < self._next_counts:
            return []
        self._next_counts = time.monotonic() + COUNTS_SECONDS
        try:
            failures = failure_counts(self._sys)
        except OSError:
            return []  # next time
        corrupted = hardware_corrupted_bytes(f"{self._proc}/meminfo")
        first, changed = self._last is None, (failures, corrupted) != self._last
        if not changed:
            return []
        self._last = failures, corrupted
        if first and (corrupted or dict(failures).get("total")):
            self._pages = self._poisoned_pages()
        return [KernelCounts(ts, failures, corrupted, at_start=first)]

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
                    self._beyond += max(0, len(pfns) - room)
                    yield pfns[:room]
                    room -= min(room, len(pfns))
        except OSError:
            return
        finally:
            os.close(fd)
