"""Maps: rows that changed, and all rows in one call or, where that is refused, one by one."""

from __future__ import annotations

import ctypes
import errno
from collections.abc import Iterator
from typing import Any

from kvmtrace.sources.bpf.exits import ExitCount, ExitKeyRecord
from kvmtrace.sources.bpf.maps import Maps, Rows

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


class Dictionary(dict[Any, Any]):
    """bcc's table of ``exits`` or ``overflow``, by the bytes of keys."""

    Key, Leaf, max_entries, map_fd = ExitKeyRecord, ExitCount, 8, 42

    def items(self) -> Any:
        return [(self.Key.from_buffer_copy(key), value) for key, value in super().items()]

    def __delitem__(self, key: Any) -> None:
        super().__delitem__(bytes(key))


def test_rows_that_did_not_change_are_not_read_again() -> None:
    one, other, rest = (ExitKeyRecord(vcpu=vcpu) for vcpu in (1, 2, 3))
    exits = Dictionary({bytes(one): ExitCount(1), bytes(other): ExitCount(1)})
    overflow = Dictionary({bytes(rest): ExitCount(7)})
    maps = Maps(object(), {"exits": exits, "overflow": overflow})

    def read() -> list[tuple[int, int]]:
        return [(key.vcpu, count.total) for key, count in maps.exits()]

    assert read() == [(1, 1), (2, 1), (3, 7)]
    assert read() == []
    exits[bytes(other)] = ExitCount(2)
    assert read() == [(2, 2)]
    # Once deleted, a row with the same key is a new one. One that is not there is no error.
    maps.forget_exits([other, rest, ExitKeyRecord(vcpu=4)])
    assert (list(exits), list(overflow)) == ([bytes(one)], [])
    exits[bytes(other)] = ExitCount(2)
    assert read() == [(2, 2)]


def test_records_are_taken_once() -> None:
    class Ring:
        def open_ring_buffer(self, receive: Any) -> None:
            for record in (b"first", b"second"):
                receive(None, ctypes.addressof(ctypes.create_string_buffer(record)), len(record))

    maps = Maps(object(), {"ring": Ring()})
    maps.open_ring()
    assert maps.take() == [b"first", b"second"]
    assert maps.take() == []
