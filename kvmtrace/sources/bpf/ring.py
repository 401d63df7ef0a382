"""The ring buffer of the eBPF programs, read from mapped memory (kernel/bpf/ringbuf.c).

Waiting is one epoll_wait; a record costs no system call.
"""

from __future__ import annotations

import mmap
import select
import threading

_BUSY, _DISCARDED = 1 << 31, 1 << 30
_LENGTH = _DISCARDED - 1
_HEADER = 8  # bytes: length with the two flags, and a number of the kernel's own


class RingBuffer:
    """Reads one ring buffer map. ``size``: of its data, a power of two in bytes. Raises OSError.

    For one thread at a time.
    """

    def __init__(self, fd: int, size: int) -> None:
        page = mmap.PAGESIZE
        self._size = size
        # The reader's page; the writer's page and the data. The kernel offers the data twice in a
        # row, so that no record is cut in two. What is mapped counts as memory of this process.
        self._mappings = (
            mmap.mmap(fd, page, mmap.MAP_SHARED, mmap.PROT_READ | mmap.PROT_WRITE, offset=0),
            mmap.mmap(fd, page + size, mmap.MAP_SHARED, mmap.PROT_READ, offset=page),
        )
        # Numbers of the machine's word: each is loaded and stored at once.
        self._read_to = memoryview(self._mappings[0]).cast("Q")
        self._written_to = memoryview(self._mappings[1]).cast("Q")
        self._heads = memoryview(self._mappings[1])[page:].cast("I")
        self._data = memoryview(self._mappings[1])[page:]
        self._lock = threading.Lock()
        self._epoll = select.epoll()
        self._epoll.register(fd, select.EPOLLIN)

    def wait(self, timeout: float) -> None:
        """Until there are records, at most ``timeout`` seconds."""
        self._epoll.poll(timeout)

    def read(self) -> list[bytes]:
        """The records that are there, in order; at most a ring full of them."""
        records: list[bytes] = []
        heads, data, mask = self._heads, self._data, self._size - 1
        at = first = self._read_to[0]
        while at - first < self._size:
            written = self._written_to[0]
            self._order()
            begun, found = at, []
            while at < written:
                place = at & mask
                head = heads[place >> 2]
                if head & _BUSY:
                    break
                length = head & _LENGTH
                if not head & _DISCARDED:
                    found.append((place + _HEADER, place + _HEADER + length))
                at += (_HEADER + length + 7) & ~7
            if at == begun:
                break
            self._order()
            records += [
                bytes(data[start:end])
                if end <= self._size
                else bytes(data[start:]) + bytes(data[: end - self._size])
                for start, end in found
            ]
            self._order()
            self._read_to[0] = at
        return records

    def _order(self) -> None:
        """Keep the CPU (arm64) from loading what follows before what precedes.

        Releasing a lock and taking it again does: memory-barriers.txt has no word for Python.
        """
        with self._lock:
            pass
        with self._lock:
            pass

    def close(self) -> None:
        """Unmap it."""
        self._epoll.close()
        for view in (self._read_to, self._written_to, self._heads, self._data):
            view.release()
        for mapping in self._mappings:
            mapping.close()
