"""``Correlator.snapshot()`` by number of VMs and incidents, and events that have to search."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from kvmtrace.correlate import Correlator
from kvmtrace.correlate.limits import Limits
from kvmtrace.events import Event, Exit, Poison, Sigbus
from tests.bench.models import T0, again, correlator, poisons, vms
from tests.bench.timing import REPEATS, best, table

SIZES = ((10, 0), (1000, 0), (10_000, 0), (10, 1000), (1000, 1000), (1000, 10_000))
EVENTS = 5000
INCIDENTS = Limits().incidents


def measure() -> list[str]:
    """Measure CPU milliseconds of snapshots, and CPU microseconds of an event."""
    head = ("VMs", "incidents", "snapshot, ms", "all changed, ms", "each, µs", "held at most, ms")
    return [
        "Snapshots if nothing has changed since the last one, and if every VM and every incident "
        "has; how long at most the reader of events waits for the latter.",
        "",
        *table(head, [_row(*size) for size in SIZES]),
        "",
        *table(("an event for the correlator", "µs"), _events()),
    ]


def _row(count: int, incidents: int) -> tuple[str, ...]:
    model = correlator(count, incidents)
    same = best(model.snapshot)
    costs: list[float] = []
    held: list[float] = []
    for number in range(REPEATS):
        _change(model, count, incidents, 2 * number)
        costs.append(best(model.snapshot, 1))
        _change(model, count, incidents, 2 * number + 1)
        takes = [best(copy, 1) for copy in model.copying()]  # as Session.snapshot does
        held.append(max([*takes, best(model.snapshot, 1)]))
    cost = min(costs)
    each = 1e6 * cost / (count + incidents)
    numbers = (f"{1e3 * same:.2f}", f"{1e3 * cost:.2f}", f"{each:.1f}", f"{1e3 * min(held):.2f}")
    return f"{count:,}", f"{incidents:,}", *numbers


def _change(model: Correlator, count: int, incidents: int, at: int) -> None:
    for event in again(count, incidents, at):
        model.feed(event)


def _events() -> list[tuple[str, str]]:
    full = [*vms(1000), *poisons(INCIDENTS, 1000)]
    one_vm = [*vms(10), *poisons(100, 1)]
    at = 0x7F0000000000
    last = T0 + 1_000_000_000_000
    kinds: dict[str, tuple[Sequence[Event], Callable[[int], Event]]] = {
        "exit of a known page": (
            one_vm,
            lambda n: Exit(
                *(last + n, 1, 0, 133, 39, True, 4001),
                flags=0,
                gpa=7 << 12,
                size=4096,
                gfn=7,
                gmem=133,
            ),
        ),
        "SIGBUS to a VM with 100 incidents, the last of them": (
            one_vm,
            lambda n: Sigbus(last + n, 4001, 4001, 4, at + (99 << 12), vm=1, vcpu=0),
        ),
        "SIGBUS to a process of 1,000 VMs, without its VM": (
            full,
            lambda n: Sigbus(last + n, 4500, 4500, 4, at, pfn=0x100000 + 499),
        ),
        "SIGBUS that joins nothing, 64 of its thread kept": (
            one_vm,
            lambda n: Sigbus(last + n, 9, 9, 4, (n % 64) << 12, sender=9),
        ),
        "poison of a new page at the limit of incidents": (
            full,
            lambda n: Poison(last + n, 0x900000 + n, "dirty LRU page", "Failed", 9, 1, tid=1),
        ),
    }
    return [(name, f"{1e6 * _cost(*of):.1f}") for name, of in kinds.items()]


def _cost(before: Sequence[Event], kind: Callable[[int], Event]) -> float:
    """Return the CPU seconds of an event of this kind, after the events ``before``."""
    costs = []
    for _ in range(REPEATS):
        model = Correlator()
        for event in before:
            model.feed(event)
        events = [kind(number) for number in range(EVENTS)]
        costs.append(best(lambda m=model, e=events: [m.feed(one) for one in e], 1))  # type: ignore[misc]
    return min(costs) / EVENTS
