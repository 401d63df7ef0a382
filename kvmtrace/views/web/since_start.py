"""Counts of this serve alone, where those of the one before it may be too low.

A serve that is killed has counted what it could no longer keep. The next one goes on from what was
kept: to Prometheus, a counter that decreases began anew, and all that it had would be counted a
second time. So the counters do begin anew, at 0.
"""

from __future__ import annotations

from collections.abc import Hashable, Mapping
from dataclasses import replace
from typing import TypeVar

from kvmtrace.model import Latency, Snapshot, Vm

K = TypeVar("K", bound=Hashable)


def since(snapshot: Snapshot, start: Snapshot) -> Snapshot:
    """The snapshot with the counts since ``start``; what is there now is unchanged."""
    return replace(
        snapshot,
        vms={key: _vm(vm, start.vms.get(key)) for key, vm in snapshot.vms.items()},
        poisons=_more(snapshot.poisons, start.poisons),
        lost=_more(snapshot.lost, start.lost),
        latency=_latency(snapshot.latency, start.latency),
    )


def _vm(vm: Vm, start: Vm | None) -> Vm:
    if start is None or not (start.exits or start.sigbus or start.undelivered):
        return vm
    return replace(
        vm,
        exits=_more(vm.exits, start.exits),
        sigbus=_more(vm.sigbus, start.sigbus),
        undelivered=max(0, vm.undelivered - start.undelivered),
    )


def _more(now: Mapping[K, int], start: Mapping[K, int]) -> dict[K, int]:
    return {key: max(0, count - start.get(key, 0)) for key, count in now.items()}


def _latency(now: Latency, start: Latency) -> Latency:
    counts = (max(0, one - other) for one, other in zip(now.counts, start.counts, strict=True))
    return Latency(tuple(counts), max(0.0, now.sum_seconds - start.sum_seconds))
