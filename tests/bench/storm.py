"""What user space does in a second of a storm: records and counters of eBPF to the model."""

from __future__ import annotations

import os
import time

from kvmtrace.correlate import Correlator
from kvmtrace.session.history import CompactLog
from kvmtrace.sources import limits
from kvmtrace.sources.bpf import records
from kvmtrace.sources.bpf.compiler import MapDefinition
from kvmtrace.sources.bpf.exits import ExitCount, ExitKeyRecord, ExitRecord
from kvmtrace.sources.bpf.kernel_map import KernelMap
from kvmtrace.sources.bpf.maps import Maps
from kvmtrace.sources.bpf.translator import BpfTranslator
from tests.bench.timing import table

SIZES = (1, 100, 800, 4096)
SECONDS = 8
_PID = os.getpid()
_EXITS_A_SECOND = 100_000


class _Counters(Maps):
    """Counters as the programs keep them, and no records: the programs do not run."""

    def __init__(self) -> None:
        def made(name: str, key: int, value: int) -> KernelMap:
            return KernelMap(name, MapDefinition(1, key, value, limits.MAX_KEYS, 0))

        key, value = (len(bytes(one())) for one in (ExitKeyRecord, ExitCount))
        names = ("overflow", "refusals", "signals", "activity", "lost")
        self._maps = {"exits": made("exits", key, value)}
        self._maps |= {name: made(name, 4, 8) for name in names}
        self._last = {}
        self._before_reading = lambda: None

    def count(self, keys: list[ExitKeyRecord], second: int, now: int) -> None:
        """Each vCPU has failed some thousand times more."""
        each = _EXITS_A_SECOND // len(keys) + 1
        for key in keys:
            counted = ExitCount(total=second * each, last_ts=now, tid=key.vcpu + 1, tgid=_PID)
            self._maps["exits"].update(bytes(key), bytes(counted))
        self._maps["activity"].update(bytes(4), second.to_bytes(8, "little"))

    def close(self) -> None:
        for one in self._maps.values():
            one.close()


def measure() -> list[str]:
    """Measure CPU milliseconds of a second, by number of pages and vCPUs that are failing."""
    try:
        rows = [_row(size) for size in SIZES]
    except OSError as error:
        return [f"A storm: not measured ({os.strerror(error.errno or 0)})."]
    head = ("pages failing at once", "records a second", "CPU, ms a second", "of a CPU")
    return [
        "A storm, natively: what the programs send and count in a second, translated, correlated "
        "and kept for those who join.",
        "",
        *table(head, rows),
    ]


def _row(size: int) -> tuple[str, ...]:
    keys = [
        ExitKeyRecord(
            kvm=1 + number // 64,
            gen=1,
            gpa=number << 12,
            size=4096,
            gfn=number,
            ret=-133,
            reason=39,
            gmem=-133,
            vcpu=number % 64,
            annotated=1,
        )
        for number in range(size)
    ]
    burst = limits.EMIT_BURST * 1_000_000_000 // limits.EMIT_WINDOW_NS
    sent = min(size * 1_000_000_000 // limits.EMIT_INTERVAL_NS, burst)
    counters, costs = _Counters(), []
    translator, correlator, log = BpfTranslator(0, ({}, {})), Correlator(), CompactLog()
    for second in range(1, SECONDS + 1):
        now = second * 1_000_000_000
        counters.count(keys, second, now)
        read = int(1 / limits.GATHER_SECONDS)
        raw = _records(keys, now, second, sent)
        parts = [raw[part * sent // read : (part + 1) * sent // read] for part in range(read)]
        translator._next_read = 0.0
        began = time.process_time()
        for part in filter(None, parts):
            events = translator.translate(part, counters)
            events += translator.counters(counters)
            for event in events:
                log.add(event)
                correlator.feed(event)
        costs.append(time.process_time() - began)
    counters.close()
    cost = min(costs[1:])
    return f"{size:,}", f"{sent:,}", f"{1e3 * cost:.1f}", f"{100 * cost:.2f} %"


def _records(keys: list[ExitKeyRecord], now: int, second: int, sent: int) -> list[bytes]:
    each = _EXITS_A_SECOND // len(keys) + 1
    found = []
    for number in range(sent):
        key = keys[number % len(keys)]
        total = (second - 1) * each + 1 + number // len(keys)
        header = records.Header(
            ts=now + number, kvm=key.kvm, gen=1, type=records.EXIT, tid=key.vcpu + 1, tgid=_PID
        )
        found.append(bytes(ExitRecord(h=header, key=key, total=total)))
    return found
