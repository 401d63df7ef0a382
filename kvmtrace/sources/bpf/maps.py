"""The maps of the eBPF programs: counters read and deleted, records received."""

from __future__ import annotations

import ctypes
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence

from kvmtrace.sources.bpf.exits import ExitCount, ExitKeyRecord, RefusalCount, RefusalKeyRecord
from kvmtrace.sources.bpf.kernel_map import KernelMap
from kvmtrace.sources.bpf.records import LOST_PLACES
from kvmtrace.sources.bpf.ring import RingBuffer
from kvmtrace.sources.bpf.signals import SigbusCount, SigbusKey

_FIRST = bytes(4)  # the key of an array's first row


class Maps:
    """The maps of the attached programs: counters that changed since the last call, and records.

    ``maps``: as they were loaded, by name. ``before_reading`` is called before counters are read.
    Raises OSError if the ring buffer cannot be mapped.
    """

    def __init__(
        self, maps: Mapping[str, KernelMap], before_reading: Callable[[], None] = lambda: None
    ) -> None:
        self._maps = maps
        self._before_reading = before_reading
        self._ring = RingBuffer(maps["ring"].fd, maps["ring"].definition.max_entries)
        self._last: dict[str, dict[bytes, bytes]] = {}  # by map: its rows as they were read last

    def set_gmem_watched(self) -> None:
        """Record that kvm_gmem_get_pfn has a probe, so that its failures are seen."""
        self._maps["watching_gmem"].update(_FIRST, (1).to_bytes(4, sys.byteorder))

    def wait(self, timeout: float) -> None:
        """Wait for records, at most ``timeout`` seconds."""
        self._ring.wait(timeout)

    def take(self) -> list[bytes]:
        """The records since the last call."""
        return self._ring.read()

    def exits(self) -> list[tuple[ExitKeyRecord, ExitCount]]:
        """Failed KVM_RUNs."""
        self._before_reading()
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
        last = self._last.setdefault(name, {})
        for key, value in self._maps[name].rows():
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
        last = self._last.get(name, {})
        for key in map(bytes, keys):
            last.pop(key, None)
            self._maps[name].delete(key)

    def activity(self) -> int:
        """A number that changes with everything that is counted."""
        return _number(self._maps["activity"].lookup(_FIRST))

    def lost(self) -> list[int]:
        """Counts in the order of ``records.LOST_PLACES``."""
        places = (place.to_bytes(4, sys.byteorder) for place in range(len(LOST_PLACES)))
        return [_number(self._maps["lost"].lookup(place)) for place in places]

    def generation(self, struct: int) -> int:
        """What generation_of() in bpf/common.c returns for this struct kvm; 0 if unknown."""
        return _number(self._maps["generation"].lookup(struct.to_bytes(8, sys.byteorder)))

    def close(self) -> None:
        """Unmap the ring buffer."""
        self._ring.close()


def _number(value: bytes | None) -> int:
    """0 for a row that is not there."""
    return int.from_bytes(value or b"", sys.byteorder)
