"""Metrics of what serve keeps, and counters after a serve that kept less than it counted."""

from __future__ import annotations

from dataclasses import replace

from kvmtrace.model import Latency, Snapshot
from kvmtrace.views.web.metrics import Exporter
from kvmtrace.views.web.since_start import since
from tests.unit.snapshots import HISTORY, small, vm


def samples(snapshot: Snapshot) -> dict[str, float]:
    """{name and labels: value} of the history's metrics."""
    return {
        "|".join([one.name.removeprefix("kvmtrace_history_"), *one.labels.values()]): one.value
        for family in Exporter(lambda: snapshot).collect()
        for one in family.samples
        if one.name.startswith("kvmtrace_history_")
    }


def test_without_a_history_there_are_none() -> None:
    assert samples(small()) == {}


def test_what_is_kept_and_what_not() -> None:
    assert samples(replace(small(), history=HISTORY)) == {
        "writable": 1,
        "bytes": 81920,
        "events_waiting": 0,
        "events_written_total": 12,
        "write_errors_total": 1,
        "events_dropped_total|no_room": 0,
        "events_dropped_total|unwritable": 0,
        "events_deleted_total|age": 3,
        "events_deleted_total|size": 0,
        "oldest_event_timestamp_seconds": 1_790_000_000 - 86_400,
        "last_write_timestamp_seconds": 1_790_000_000 - 1,
    }


def test_times_that_are_not_known_are_absent() -> None:
    empty = replace(HISTORY, oldest_ns=None, last_write_ns=None, is_written=False)
    shown = samples(replace(small(), history=empty))
    assert shown["writable"] == 0
    assert not [name for name in shown if "timestamp" in name]


def test_counts_begin_anew_and_what_is_there_stays() -> None:
    web = vm(
        1, "web", exits={("EFAULT", None): 5}, sigbus={"AR": 2}, undelivered=3, poisoned_pages=1
    )
    idle = vm(2, "idle")
    start = Snapshot(
        vms={1: web, 2: idle},
        poisons={("a", "b"): 4},
        lost={"ring": 7},
        latency=Latency((1,) * 10, 5.0),
    )
    more = replace(web, exits={("EFAULT", None): 6, ("EINVAL", "other"): 1}, undelivered=3)
    new = vm(3, "new", exits={("EFAULT", None): 1})
    now = replace(
        start,
        vms={1: more, 2: idle, 3: new},
        poisons={("a", "b"): 5, ("c", "d"): 1},
        latency=Latency((1,) * 9 + (3,), 7.5),
    )
    counted = since(now, start)
    assert counted.vms[1] == replace(
        more, exits={("EFAULT", None): 1, ("EINVAL", "other"): 1}, sigbus={"AR": 0}, undelivered=0
    )
    assert counted.vms[2] is idle
    assert counted.vms[3] is new
    assert counted.poisons == {("a", "b"): 1, ("c", "d"): 1}
    assert counted.lost == {"ring": 0}
    assert counted.latency == Latency((0,) * 9 + (2,), 2.5)
