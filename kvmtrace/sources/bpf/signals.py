"""Signals by the eBPF programs' counters: what no record reported is reported by its number."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Iterable, Iterator
from typing import Any, NamedTuple

from kvmtrace.events import Sigbus
from kvmtrace.sources.bpf import records

_MAX_KNOWN = 4096

_Same = tuple[int, int, int, int | None]  # sender, target thread, code, address


class SignalCounts:
    """Each signal is reported once: by its record, or by the counters."""

    def __init__(self) -> None:
        self._told: dict[bytes, int] = {}
        self._keys: dict[bytes, records.SigbusKey] = {}
        self._known: OrderedDict[_Same, Sigbus] = OrderedDict()

    def record(self, record: Any) -> int:
        """How many signals a record stands for; 0 if the counters reported it."""
        if not record.total:
            return 1  # the map is full
        key = records.SigbusKey(
            *(record.h.kvm, record.h.gen, record.hva, record.code, record.lsb),
            *(record.target_tid, record.target_tgid, record.vcpu, record.h.tid),
        )
        return self._tell(key, record.total)

    def owed(
        self, counted: Iterable[tuple[records.SigbusKey, records.SigbusCount]]
    ) -> Iterator[tuple[Any, int, int]]:
        """(something like a record, how many, when) of what no record will report."""
        for key, count in counted:
            # Up to ``sent`` records are on their way.
            fresh = self._tell(key, count.total) if count.total > count.sent else 0
            if fresh:
                header = _Header(count.last_ts, key.kvm, key.gen, key.sender, key.target_tgid)
                yield _RecordFromKey(header, key), fresh, count.last_ts

    def learn(self, signal: Sigbus) -> None:
        """What is known of the latest signal of its kind."""
        same = (signal.sender or 0, signal.tid, signal.code, signal.hva)
        self._known[same] = signal
        self._known.move_to_end(same)
        while len(self._known) > _MAX_KNOWN:
            self._known.popitem(last=False)

    def known(self, like: Any) -> Sigbus | None:
        """The latest signal of this kind."""
        return self._known.get((like.h.tid, like.target_tid, like.code, like.hva))

    def forget(self, struct: tuple[int, int]) -> list[records.SigbusKey]:
        """The VM is gone; the keys of its signals."""
        keys = {raw: key for raw, key in self._keys.items() if (key.kvm, key.gen) == struct}
        for raw in keys:
            del self._keys[raw], self._told[raw]
        return list(keys.values())

    def _tell(self, key: records.SigbusKey, total: int) -> int:
        raw = bytes(key)
        count = total - self._told.get(raw, 0)
        if count <= 0:
            return 0
        self._told[raw], self._keys[raw] = total, key
        return count


class _Header(NamedTuple):
    ts: int
    kvm: int
    gen: int
    tid: int
    tgid: int


class _RecordFromKey:
    """A key, to be read as the record of such a signal."""

    def __init__(self, header: _Header, key: records.SigbusKey) -> None:
        self.h = header
        self.hva, self.code, self.lsb = key.hva, key.code, key.lsb
        self.target_tid, self.target_tgid, self.vcpu = key.target_tid, key.target_tgid, key.vcpu
        self.comm = b""
