"""Read /proc/PID/maps and /proc/PID/pagemap: which pages a process has mapped, poisoned ones too.

Documentation/admin-guide/mm/pagemap.rst. After memory_failure a page table has a "hwpoison" swap
entry with the pfn as its offset (include/linux/swap.h, mm/memory-failure.c). pagemap shows a
poisoned hugetlb page like one that is not mapped; PAGEMAP_SCAN reports it as swapped.
"""

from __future__ import annotations

import ctypes
import errno
import fcntl
import os
import struct
from collections.abc import Iterator
from dataclasses import dataclass

from kvmtrace import kvm

PAGE = 1 << kvm.PAGE_SHIFT
ENTRY = 8

# Bits of an entry.
PM_PRESENT = 1 << 63
PM_SWAP = 1 << 62
PM_UFFD_WP = 1 << 57
_PFN = (1 << 55) - 1
_SWAP_TYPE = 0x1F  # MAX_SWAPFILES_SHIFT is 5

# Swap types of neither swap devices nor markers. Of 32 types the last 6 to 10 are special: hwpoison
# 1, migration 3, device-private 3 or 4, then markers (2 in 6.1, 1 since). Seen: hwpoison is 24 on
# 7.3, 23 with four device types, 22 on 6.1 with those. A marker's offset is not a page.
SPECIAL_TYPES = range(22, 30)

# include/uapi/linux/fs.h: _IOWR('f', 16, struct pm_scan_arg), Linux 6.7
_PAGEMAP_SCAN = 0xC0606610
PAGE_IS_PRESENT = 1 << 3
PAGE_IS_SWAPPED = 1 << 4
PAGE_IS_HUGE = 1 << 6
_REGIONS = 512


class _Region(ctypes.Structure):
    _fields_ = (("start", ctypes.c_uint64), ("end", ctypes.c_uint64), ("what", ctypes.c_uint64))


class _ScanArg(ctypes.Structure):
    _fields_ = tuple(
        (name, ctypes.c_uint64)
        for name in (
            *("size", "flags", "start", "end", "walk_end", "vec", "vec_len", "max_pages"),
            *("category_inverted", "category_mask", "category_anyof_mask", "return_mask"),
        )
    )


@dataclass(frozen=True, slots=True)
class Area:
    """One line of /proc/PID/maps: bytes [start, end), the file behind it and the offset there."""

    start: int
    end: int
    shared: bool
    offset: int
    device: int
    inode: int
    is_guest_memfd: bool = False

    def file_offset(self, hva: int) -> int:
        """Return the offset of ``hva`` in the file, in bytes."""
        return self.offset + hva - self.start


def parse_maps(maps: bytes | str) -> list[Area]:
    """Return the areas in which a process can have memory of its own.

    Users choose file names, in which the kernel escapes only the newline (fs/proc/task_mmu.c). A
    line that cannot be parsed is left out.
    """
    if isinstance(maps, str):
        maps = maps.encode(errors="surrogateescape")
    return [area for line in maps.split(b"\n") if (area := _area_of(line)) is not None]


# Pages of the kernel, which memory_failure does not unmap. All vCPUs share one inode.
_NOT_OF_ITS_OWN = (b"[v", b"[uprobes", b"anon_inode:kvm-vcpu", b"anon_inode:[kvm-vcpu")
# Each file has its own inode (6.18), later in a file system of its own (7.2).
_GUEST_MEMFD = (b"anon_inode:[kvm-gmem]", b"/[kvm-gmem] (deleted)")


def _area_of(line: bytes) -> Area | None:
    try:
        span, perms, offset, device, inode, *path = line.split(None, 5)
        if path and path[0].startswith(_NOT_OF_ITS_OWN):
            return None
        start, end = (int(x, 16) for x in span.split(b"-"))
        major, minor = (int(x, 16) for x in device.split(b":"))
        shared = perms[3:4] == b"s"
        return Area(
            start,
            end,
            shared,
            int(offset, 16),
            os.makedev(major, minor),
            int(inode),
            bool(path) and path[0].rstrip() in _GUEST_MEMFD,
        )
    except (ValueError, OverflowError):
        return None


def referenced_pfn(entry: int) -> int | None:
    """Return the pfn of a pagemap entry: mapped, poisoned or under migration; else None."""
    if entry & PM_PRESENT:
        return entry & _PFN or None  # 0: hidden without CAP_SYS_ADMIN
    return poisoned(entry)


def poisoned(entry: int) -> int | None:
    """Return the pfn of a special swap entry (hwpoison or migration); else None."""
    if entry & PM_PRESENT or not entry & PM_SWAP:
        return None
    value = entry & _PFN
    return value >> 5 if value & _SWAP_TYPE in SPECIAL_TYPES else None


class Pagemap:
    """The open page table of a process. Methods raise OSError once the process is gone."""

    def __init__(self, pid: int, proc: str = "/proc") -> None:
        self._directory = f"{proc}/{pid}"
        self._fd = os.open(f"{self._directory}/pagemap", os.O_RDONLY | os.O_CLOEXEC)
        self._vec = (_Region * _REGIONS)()

    def close(self) -> None:
        os.close(self._fd)

    def areas(self) -> list[Area]:
        with open(f"{self._directory}/maps", "rb") as maps:
            return parse_maps(maps.read())

    def page_size(self, area: Area) -> int:
        """Return the page size of an area in bytes; hugetlbfs reports it by statfs."""
        if not area.inode:
            return PAGE
        try:
            path = f"{self._directory}/map_files/{area.start:x}-{area.end:x}"
            return max(PAGE, os.statvfs(path).f_bsize)
        except OSError:
            return PAGE

    def entries(self, start: int, count: int) -> tuple[int, ...]:
        """Return ``count`` entries from address ``start`` on.

        Fewer at the end of the address space.
        """
        data = self.raw(start, count)
        return struct.unpack(f"={len(data) // ENTRY}Q", data)

    def raw(self, start: int, count: int) -> bytes:
        """As ``entries``, in the kernel's form: 8 bytes each."""
        data = os.pread(self._fd, count * ENTRY, (start >> kvm.PAGE_SHIFT) * ENTRY)
        return data[: len(data) // ENTRY * ENTRY]

    def scan(self, start: int, end: int, mask: int) -> Iterator[tuple[int, int, int]] | None:
        """Yield regions (start, end, PAGE_IS_* bits) in which all of ``mask`` holds.

        Returns None if this kernel has no PAGEMAP_SCAN (before 6.7).
        """
        first = self._scan_once(start, end, mask)
        return None if first is None else self._rest(first, end, mask)

    def _rest(
        self, found: tuple[list[tuple[int, int, int]], int], end: int, mask: int
    ) -> Iterator[tuple[int, int, int]]:
        while True:
            regions, at = found
            yield from regions
            more = self._scan_once(at, end, mask) if at < end else None
            if more is None or more[1] <= at:
                return
            found = more

    def _scan_once(
        self, start: int, end: int, mask: int
    ) -> tuple[list[tuple[int, int, int]], int] | None:
        arg = _ScanArg(
            size=ctypes.sizeof(_ScanArg),
            start=start,
            end=end,
            vec=ctypes.addressof(self._vec),
            vec_len=_REGIONS,
            category_mask=mask,
            return_mask=PAGE_IS_PRESENT | PAGE_IS_SWAPPED | PAGE_IS_HUGE,
        )
        try:
            count = fcntl.ioctl(self._fd, _PAGEMAP_SCAN, arg)
        except OSError as error:
            if error.errno in (errno.ENOTTY, errno.EINVAL):
                return None
            raise
        regions = [(r.start, r.end, r.what) for r in self._vec[:count]]
        return regions, arg.walk_end
