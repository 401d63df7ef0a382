"""One map in the kernel: created, read, written."""

from __future__ import annotations

import contextlib
import ctypes
import errno
import os
from collections.abc import Iterator
from ctypes import c_char, c_uint32, c_uint64
from typing import Any

from kvmtrace.sources.bpf.compiler import MapDefinition
from kvmtrace.sources.bpf.system_call import bpf, bpf_charged

# include/uapi/linux/bpf.h: enum bpf_cmd
_CREATE, _LOOKUP, _UPDATE, _DELETE, _NEXT_KEY, _LOOKUP_BATCH = 0, 1, 2, 3, 4, 24

NAME_LENGTH = 15


class _Create(ctypes.Structure):
    _fields_ = (
        ("map_type", c_uint32),
        ("key_size", c_uint32),
        ("value_size", c_uint32),
        ("max_entries", c_uint32),
        ("map_flags", c_uint32),
        ("inner_map_fd", c_uint32),
        ("numa_node", c_uint32),
        ("map_name", c_char * (NAME_LENGTH + 1)),
    )


class _Element(ctypes.Structure):
    _fields_ = (
        ("map_fd", c_uint32),
        ("pad", c_uint32),
        ("key", c_uint64),
        ("value_or_next_key", c_uint64),
        ("flags", c_uint64),
    )


class _Batch(ctypes.Structure):
    _fields_ = (
        ("in_batch", c_uint64),
        ("out_batch", c_uint64),
        ("keys", c_uint64),
        ("values", c_uint64),
        ("count", c_uint32),
        ("map_fd", c_uint32),
        ("elem_flags", c_uint64),
        ("flags", c_uint64),
    )


class KernelMap:
    """A map of its own, closed by ``close``. Keys and values are bytes. Raises OSError."""

    def __init__(self, name: str, definition: MapDefinition) -> None:
        self.definition = definition
        self.fd = bpf_charged(
            _CREATE,
            _Create(
                definition.type,
                definition.key_size,
                definition.value_size,
                definition.max_entries,
                definition.flags,
                map_name=name.encode()[:NAME_LENGTH],
            ),
        )
        self._key = ctypes.create_string_buffer(definition.key_size or 1)
        self._value = ctypes.create_string_buffer(definition.value_size or 1)
        at = ctypes.addressof(self._key)
        self._row = _Element(self.fd, 0, at, ctypes.addressof(self._value))
        self._row_key = _Element(self.fd, 0, at)  # the kernel wants the rest to be zeros
        self._batches = True  # as far as is known
        self._buffers: tuple[Any, Any] | None = None

    def lookup(self, key: bytes) -> bytes | None:
        """The value; None if there is none."""
        try:
            self._do(_LOOKUP, key, self._row)
        except FileNotFoundError:
            return None
        return self._value.raw[: self.definition.value_size]

    def update(self, key: bytes, value: bytes) -> None:
        ctypes.memmove(self._value, value, self.definition.value_size)
        self._do(_UPDATE, key, self._row)

    def delete(self, key: bytes) -> None:
        """Delete a row, if there is one."""
        with contextlib.suppress(FileNotFoundError):
            self._do(_DELETE, key, self._row_key)

    def _do(self, command: int, key: bytes, element: _Element) -> None:
        if len(key) != self.definition.key_size:
            raise ValueError(f"a key of {len(key)} bytes, not {self.definition.key_size}")
        ctypes.memmove(self._key, key, len(key))
        bpf(command, element)

    def rows(self) -> Iterator[tuple[bytes, bytes]]:
        """(key, value) of every row.

        By BPF_MAP_LOOKUP_BATCH (kernel/bpf/hashtab.c, Linux 5.6) with room for the whole map. If
        the kernel does not have it: key by key, which costs two system calls a row.
        """
        found = self._by_batch() if self._batches else None
        yield from self._by_key() if found is None else found

    def _by_batch(self) -> list[tuple[bytes, bytes]] | None:
        key_size, value_size = self.definition.key_size, self.definition.value_size
        room = self.definition.max_entries
        if self._buffers is None:
            self._buffers = (c_char * (key_size * room))(), (c_char * (value_size * room))()
        keys, values = self._buffers
        begun = c_uint32()
        batch = _Batch(
            out_batch=ctypes.addressof(begun),
            keys=ctypes.addressof(keys),
            values=ctypes.addressof(values),
            count=room,
            map_fd=self.fd,
        )
        try:
            bpf(_LOOKUP_BATCH, batch)
        except FileNotFoundError:
            pass  # the end of the map was reached
        except OSError as error:
            self._batches = error.errno == errno.ENOSPC
            return None
        else:
            return None  # rows were added meanwhile, and some are not in the buffers
        of_keys, of_values = memoryview(keys).cast("B"), memoryview(values).cast("B")
        return [
            (
                bytes(of_keys[n * key_size : (n + 1) * key_size]),
                bytes(of_values[n * value_size : (n + 1) * value_size]),
            )
            for n in range(batch.count)
        ]

    def _by_key(self) -> list[tuple[bytes, bytes]]:
        """A row that is deleted meanwhile makes the kernel begin again: each is taken once."""
        found: dict[bytes, bytes] = {}
        key = ctypes.create_string_buffer(self.definition.key_size)
        following = ctypes.create_string_buffer(self.definition.key_size)
        step = _Element(self.fd, 0, 0, ctypes.addressof(following))
        for _ in range(2 * self.definition.max_entries):
            try:
                bpf(_NEXT_KEY, step)
            except FileNotFoundError:
                break
            key.raw = following.raw
            step.key = ctypes.addressof(key)
            value = self.lookup(key.raw)
            if value is not None:
                found[key.raw] = value
        return list(found.items())

    def close(self) -> None:
        """For good; programs that use the map keep it alive."""
        os.close(self.fd)
