"""The ring buffer: records in their order, while the kernel writes more.

The memory is laid out as the kernel does (kernel/bpf/ringbuf.c): the reader's page, the writer's,
the data.
"""

from __future__ import annotations

import mmap
import os
import select
import struct
from collections.abc import Iterator

import pytest

from kvmtrace.sources.bpf.ring import RingBuffer

PAGE, SIZE = mmap.PAGESIZE, mmap.PAGESIZE
BUSY, DISCARDED = 1 << 31, 1 << 30


class Kernel:
    """The writer's side."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.file = os.memfd_create("ring")
        os.ftruncate(self.file, 2 * PAGE + SIZE)
        self.memory = mmap.mmap(self.file, 0)
        self.written = 0

        class NoPoll:
            def register(self, *_: int) -> None: ...
            def close(self) -> None: ...

        monkeypatch.setattr(select, "epoll", NoPoll)  # a file cannot be polled
        self.ring = RingBuffer(self.file, SIZE)

    def put(self, record: bytes, flags: int = 0) -> int:
        """Where its head is."""
        place = self.written % SIZE
        whole = struct.pack("=II", len(record) | flags, 0) + record
        whole += bytes(-len(whole) % 8)
        for number, byte in enumerate(whole):
            self.memory[2 * PAGE + (place + number) % SIZE] = byte
        self.written += len(whole)
        self.memory[PAGE : PAGE + 8] = struct.pack("=Q", self.written)
        return place

    def commit(self, place: int) -> None:
        at = 2 * PAGE + place
        (head,) = struct.unpack("=I", self.memory[at : at + 4])
        self.memory[at : at + 4] = struct.pack("=I", head & ~BUSY)

    @property
    def read_to(self) -> int:
        return int(struct.unpack("=Q", self.memory[:8])[0])


@pytest.fixture
def kernel(monkeypatch: pytest.MonkeyPatch) -> Iterator[Kernel]:
    made = Kernel(monkeypatch)
    yield made
    made.ring.close()
    made.memory.close()
    os.close(made.file)


def test_records_are_taken_once_and_in_order(kernel: Kernel) -> None:
    assert kernel.ring.read() == []
    for number in range(3):
        kernel.put(b"record %d" % number)
    assert kernel.ring.read() == [b"record 0", b"record 1", b"record 2"]
    assert kernel.ring.read() == []
    assert kernel.read_to == kernel.written


def test_the_end_of_the_buffer_cuts_no_record(kernel: Kernel) -> None:
    for number in range(100):
        record = bytes([number]) * (90 + number)
        kernel.put(record)
        assert kernel.ring.read() == [record]
    assert kernel.written > 3 * SIZE


def test_what_is_being_written_is_waited_for(kernel: Kernel) -> None:
    kernel.put(b"first")
    place = kernel.put(b"second", BUSY)
    kernel.put(b"third")
    assert kernel.ring.read() == [b"first"]
    assert kernel.ring.read() == []
    kernel.commit(place)
    assert kernel.ring.read() == [b"second", b"third"]


def test_what_was_taken_back_is_skipped(kernel: Kernel) -> None:
    kernel.put(b"never mind", DISCARDED)
    kernel.put(b"second")
    assert kernel.ring.read() == [b"second"]


def test_a_full_buffer(kernel: Kernel) -> None:
    records = [b"%08d" % number for number in range(SIZE // 16)]
    for record in records:
        kernel.put(record)
    assert kernel.ring.read() == records
