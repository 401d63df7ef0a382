"""Poisoned pages and memory failures as the kernel counts and marks them, for the whole host."""

from __future__ import annotations

import errno
import re
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

from kvmtrace import kvm

# include/uapi/linux/kernel-page-flags.h: bit 19, in the third byte of a little-endian entry
_KPF_HWPOISON_BYTE, _KPF_HWPOISON = 2, 1 << 3
_MARK = bytes(1 if value & _KPF_HWPOISON else 0 for value in range(256))


def hardware_corrupted_bytes(meminfo: str = "/proc/meminfo") -> int | None:
    """Return HardwareCorrupted of /proc/meminfo in bytes; None if the kernel does not count it."""
    try:
        with open(meminfo, encoding="ascii", errors="replace") as lines:
            found = re.search(r"^HardwareCorrupted: *([0-9]{1,15})\b", lines.read(), re.MULTILINE)
    except OSError:
        return None
    return int(found[1]) * 1024 if found else None


def failure_counts(sys: str = "/sys") -> tuple[tuple[str, int], ...]:
    """Return ``failures_by_node``, summed over all nodes: (counter, pages), by name."""
    sums: Counter[str] = Counter()
    for counts in failures_by_node(sys).values():
        sums.update(counts)
    return tuple(sorted(sums.items()))


def failures_by_node(sys: str = "/sys") -> dict[str, dict[str, int]]:
    """Return {node: {counter: pages}} of memory_failure; {} before Linux 6.3.

    Raises OSError if there are no file descriptors left: a partial sum would look like a count that
    went down.
    """
    found: dict[str, dict[str, int]] = {}
    for path in sorted(Path(sys, "devices/system/node").glob("node[0-9]*/memory_failure/*")):
        try:
            found.setdefault(path.parts[-3], {})[path.name] = int(path.read_text())
        except ValueError:
            continue
        except OSError as error:
            if error.errno in (errno.EMFILE, errno.ENFILE):
                raise
            continue  # the node went offline
    return found


def ram_ranges(iomem: str = "/proc/iomem") -> list[tuple[int, int]]:
    """Return the page frames [first, end) of System RAM; [] if the addresses are hidden.

    Memory that a driver added (kmem, virtio_mem) is indented below that driver's device.
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
    """Yield the indices of poisoned pages in a part of /proc/kpageflags."""
    marks = flags[_KPF_HWPOISON_BYTE::8].translate(_MARK)
    at = marks.find(1)
    while at >= 0:
        yield at
        at = marks.find(1, at + 1)
