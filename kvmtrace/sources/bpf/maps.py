"""All rows of a BPF hash map, in one system call where that can be had."""

from __future__ import annotations

import ctypes
import errno
from collections.abc import Callable, Iterator
from typing import Any


class Rows:
    """Reads one of bcc's tables. ``lib``: libbcc.

    By BPF_MAP_LOOKUP_BATCH (kernel/bpf/hashtab.c, Linux 5.6) with room for the whole map; where
    kernel or libbcc refuse that, key by key, which costs two system calls a row.
    """

    def __init__(self, lib: Any, table: Any) -> None:
        self._lookup = getattr(lib, "bpf_lookup_batch", None)
        self._table = table
        self._sizes = ctypes.sizeof(table.Key), ctypes.sizeof(table.Leaf)
        self._room = int(table.max_entries)
        self._buffers: tuple[Any, Any] | None = None

    def rows(self) -> Iterator[tuple[bytes, bytes]]:
        """(key, value) of every row, as bytes."""
        found = None if self._lookup is None else self._batch(self._lookup)
        if found is None:
            found = [(bytes(key), bytes(value)) for key, value in self._table.items()]
        yield from found

    def _batch(self, lookup: Callable[..., int]) -> list[tuple[bytes, bytes]] | None:
        key_size, value_size = self._sizes
        if self._buffers is None:
            self._buffers = (
                (ctypes.c_char * (key_size * self._room))(),
                (ctypes.c_char * (value_size * self._room))(),
            )
        keys, values = self._buffers
        begun, count = ctypes.c_uint32(0), ctypes.c_uint32(self._room)
        failed = lookup(
            self._table.map_fd,
            None,
            ctypes.byref(begun),
            ctypes.byref(keys),
            ctypes.byref(values),
            ctypes.byref(count),
        )
        why = ctypes.get_errno() if failed else 0
        # ENOENT: the end of the map. Without it this is not all: rows came while it was read.
        if why != errno.ENOENT:
            if why not in (0, errno.ENOSPC):
                self._lookup = None
            return None
        of_keys, of_values = memoryview(keys).cast("B"), memoryview(values).cast("B")
        return [
            (
                bytes(of_keys[n * key_size : (n + 1) * key_size]),
                bytes(of_values[n * value_size : (n + 1) * value_size]),
            )
            for n in range(count.value)
        ]
