"""All rows of a map: in one call, or one by one where the kernel or libbcc refuse that."""

from __future__ import annotations

import ctypes
import errno
from collections.abc import Iterator
from typing import Any

from kvmtrace.sources.bpf.maps import Rows

KEYS = [b"key%d" % n for n in range(3)]
VALUES = [b"value%d  " % n for n in range(3)]


class Table:
    """bcc's: four bytes to eight."""

    Key, Leaf, max_entries, map_fd = ctypes.c_char * 4, ctypes.c_char * 8, 8, 42

    def __init__(self) -> None:
        self.walked = 0

    def items(self) -> Iterator[tuple[Any, Any]]:
        self.walked += 1
        for key, value in zip(KEYS, VALUES, strict=True):
            yield self.Key.from_buffer_copy(key), self.Leaf.from_buffer_copy(value)


class Lib:
    """libbcc, with a kernel behind it that answers ``error``."""

    def __init__(self, error: int) -> None:
        self.error, self.calls = error, 0

    def bpf_lookup_batch(self, *arguments: Any) -> int:
        self.calls += 1
        fd, at, _, keys, values, count = arguments
        assert (fd, at, count._obj.value) == (42, None, 8)
        ctypes.memmove(keys._obj, b"".join(KEYS), 12)
        ctypes.memmove(values._obj, b"".join(VALUES), 24)
        count._obj.value = 3
        ctypes.set_errno(self.error)
        return -1 if self.error else 0


WANTED = list(zip(KEYS, VALUES, strict=True))


def test_one_call_reads_a_map() -> None:
    lib, table = Lib(errno.ENOENT), Table()
    rows = Rows(lib, table)
    assert list(rows.rows()) == list(rows.rows()) == WANTED
    assert (lib.calls, table.walked) == (2, 0)


def test_what_the_kernel_does_not_know_is_asked_once() -> None:
    lib, table = Lib(errno.EINVAL), Table()
    rows = Rows(lib, table)
    assert list(rows.rows()) == list(rows.rows()) == WANTED
    assert (lib.calls, table.walked) == (1, 2)


def test_half_a_map_is_not_believed() -> None:
    for error in (0, errno.ENOSPC):
        lib, table = Lib(error), Table()
        rows = Rows(lib, table)
        assert list(rows.rows()) == list(rows.rows()) == WANTED
        assert (lib.calls, table.walked) == (2, 2)


def test_an_older_libbcc_has_no_such_call() -> None:
    table = Table()
    assert list(Rows(object(), table).rows()) == WANTED
    assert table.walked == 1
