"""Correlators that know many VMs and incidents, and their events."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace

from kvmtrace.correlate import Correlator
from kvmtrace.correlate.limits import Limits
from kvmtrace.events import Event, Exit, Owned, Owner, Poison, Sigbus, VmSeen

T0 = 1_790_000_000_000_000_000


def vms(count: int) -> list[Event]:
    """Return a VmSeen of each VM."""
    uuid = "c7a5fdbd-edaf-9455-926a-{:012x}"
    return [
        VmSeen(T0, vm, 4000 + vm, f"instance-{vm:05}", uuid.format(vm), "qemu")
        for vm in range(1, count + 1)
    ]


def poisons(count: int, of: int) -> Iterator[Event]:
    """Yield ``count`` poisoned pages of ``of`` VMs: the poison, its owner, a signal and an exit."""
    for number in range(count):
        ts, vm, pfn = T0 + 1_000_000 * (number + 1), 1 + number % of, 0x100000 + number
        yield Owned(ts, pfn, Owner(vm, number, 0x7F0000000000 + (number << 12)), via="pagemap")
        yield Poison(ts, pfn, "dirty LRU page", "Recovered", 9, 3, tid=4000 + vm)
        yield Sigbus(
            ts + 1, 4000 + vm, 4000 + vm, 4, 0x7F0000000000 + (number << 12), vm=vm, vcpu=0
        )
        yield Exit(
            *(ts + 2, vm, 0, 133, 39, True, 4000 + vm),
            flags=0,
            gpa=number << 12,
            size=4096,
            gfn=number,
            gmem=133,
        )


def correlator(count: int, incidents: int = 0) -> Correlator:
    """Return a correlator with so many VMs and incidents."""
    found = Correlator(Limits(incidents=max(1, incidents)))
    for event in (*vms(count), *poisons(incidents, count)):
        found.feed(event)
    return found


def again(count: int, incidents: int, at: int) -> list[Event]:
    """Return events ``at`` ns after the last ones that change every VM and every incident."""
    later = 1_000_000_000_000 + at
    conversions = [
        Exit(T0 + later, vm, 1, 14, 39, True, 5000 + vm, flags=8, gpa=4096, size=4096, gmem=0)
        for vm in range(1, count + 1)
    ]
    deliveries = (one for one in poisons(incidents, count) if isinstance(one, Exit))
    return [*conversions, *(replace(one, ts=one.ts + later) for one in deliveries)]
