"""The maps of the eBPF programs: counters read and deleted, records received."""

from __future__ import annotations

import contextlib
import ctypes
import errno
from collections.abc import Callable, Iterator, Sequence
from typing import Any

from kvmtrace.sources.bpf.exits import ExitCount, ExitKeyRecord, RefusalCount, RefusalKeyRecord
from kvmtrace.sources.bpf.records import LOST_PLACES
from kvmtrace.sources.bpf.signals import SigbusCount, SigbusKey


class Maps:
    """The maps of the attached programs: counters that changed since the last call, and records.

    ``lib``: libbcc. ``tables``: bcc's tables, by name.
    """

    def __init__(self, lib: Any, tables: Any) -> None:
        self._lib, self._tables = lib, tables
        self._received: list[bytes] = []
        self._rows: dict[str, Rows] = {}  # by map
        self._last: dict[str, dict[bytes, bytes]] = {}  # by map: its rows as they were read last

    def set_gmem_watched(self) -> None:
        """Record that kvm_gmem_get_pfn has a probe, so that its failures are seen."""
        self._tables["watching_gmem"][ctypes.c_int(0)] = ctypes.c_uint32(1)

    def open_ring(self) -> None:
        """Map the ring buffer."""
        self._tables["ring"].open_ring_buffer(self._receive)

    def _receive(self, _context: Any, data: int, size: int) -> None:
        self._received.append(ctypes.string_at(data, size))

    def wait(self, timeout: float) -> None:
        """Wait for records, at most ``timeout`` seconds; ``take`` returns them."""
        self._tables.ring_buffer_poll(int(timeout * 1000))

    def take(self) -> list[bytes]:
        """The records received since the last call."""
        received, self._received = self._received, []
        return received

    def exits(self) -> list[tuple[ExitKeyRecord, ExitCount]]:
        """Failed KVM_RUNs."""
        return [
            (ExitKeyRecord.from_buffer_copy(key), ExitCount.from_buffer_copy(count))
            for name in ("exits", "overflow")
            for key, count in self._changed(name)
        ]

    def refusals(self) -> list[tuple[RefusalKeyRecord, RefusalCount]]:
        """How often kvm_gmem_get_pfn returned EHWPOISON, by VM and gfn."""
        return [
            (RefusalKeyRecord.from_buffer_copy(key), RefusalCount.from_buffer_copy(count))
            for key, count in self._changed("refusals")
        ]

    def signals(self) -> list[tuple[SigbusKey, SigbusCount]]:
        """Signals that differ in time only."""
        return [
            (SigbusKey.from_buffer_copy(key), SigbusCount.from_buffer_copy(count))
            for key, count in self._changed("signals")
        ]

    def _changed(self, name: str) -> Iterator[tuple[bytes, bytes]]:
        """The rows of a map whose value differs from the one that was read last."""
        if name not in self._rows:
            self._rows[name] = Rows(self._lib, self._tables[name])
        last = self._last.setdefault(name, {})
        for key, value in self._rows[name].rows():
            if last.get(key) != value:
                last[key] = value
                yield key, value

    def forget_exits(self, keys: list[ExitKeyRecord]) -> None:
        """Delete the counters of a VM that is gone."""
        self._delete("exits", keys)
        self._delete("overflow", keys)

    def forget_refusals(self, keys: list[RefusalKeyRecord]) -> None:
        self._delete("refusals", keys)

    def forget_signals(self, keys: list[SigbusKey]) -> None:
        self._delete("signals", keys)

    def _delete(self, name: str, keys: Sequence[ctypes.Structure]) -> None:
        table, last = self._tables[name], self._last.get(name, {})
        for key in keys:
            last.pop(bytes(key), None)
            with contextlib.suppress(KeyError):
                del table[table.Key.from_buffer_copy(key)]

    def activity(self) -> int:
        """A number that changes with everything that is counted."""
        return int(self._tables["activity"][ctypes.c_int(0)].value)

    def lost(self) -> list[int]:
        """Counts in the order of ``records.LOST_PLACES``."""
        table = self._tables["lost"]
        return [int(table[ctypes.c_int(place)].value) for place in range(len(LOST_PLACES))]

    def generation(self, struct: int) -> int:
        """What generation_of() in bpf/common.c returns for this struct kvm; 0 if unknown."""
        try:
            return int(self._tables["generation"][ctypes.c_uint64(struct)].value)
        except KeyError:
            return 0


class Rows:
    """Reads all rows of one of bcc's tables. ``lib``: libbcc.

    By BPF_MAP_LOOKUP_BATCH (kernel/bpf/hashtab.c, Linux 5.6) with room for the whole map. If the
    kernel or libbcc do not have it: key by key, which costs two system calls a row.
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
        # ENOENT: the end of the map was reached. Otherwise rows were added meanwhile, and some are
        # not in the buffers.
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
