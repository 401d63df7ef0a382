"""A scrape and the reader wait for each other for moments only; a snapshot copies what changed."""

from __future__ import annotations

import threading
import time
from typing import Any

import pytest

from kvmtrace.correlate import Correlator
from kvmtrace.correlate.incident import IncidentState
from kvmtrace.events import Exit, Host, Owned, Owner, Poison, Sigbus, VmGone, VmSeen
from kvmtrace.model import Snapshot
from kvmtrace.session import session as module
from kvmtrace.session.session import Session
from tests.unit.fake import T0, FakeSource


def exits(count: int, vm: int = 1) -> list[Exit]:
    return [Exit(T0 + n, vm, 0, 14, 0, False, 7) for n in range(count)]


def test_a_snapshot_does_not_wait_for_a_long_batch(monkeypatch: pytest.MonkeyPatch) -> None:
    session = Session(FakeSource([VmSeen(T0, 1, 9), *exits(5000)]))
    fed, at, found = [0], list[int](), list[Snapshot]()
    real_feed, real_snapshot = session._correlator.feed, session._correlator.snapshot
    asking = threading.Thread(target=lambda: found.append(session.snapshot()))

    def feed(event: Any) -> Any:
        fed[0] += 1
        if fed[0] == 300:
            asking.start()
            while not session._asking:
                pass
        return real_feed(event)

    def snapshot() -> Snapshot:
        at.append(fed[0])
        return real_snapshot()

    monkeypatch.setattr(session._correlator, "feed", feed)
    monkeypatch.setattr(session._correlator, "snapshot", snapshot)
    monkeypatch.setattr(time, "sleep", lambda seconds: asking.join(10))
    assert len(session.pump(0)) == 5001
    asking.join(10)
    assert at == [512]
    assert sum(found[0].vms[1].exits.values()) == 511
    assert sum(session.snapshot().vms[1].exits.values()) == 5000


def test_the_reader_does_not_wait_for_proc(monkeypatch: pytest.MonkeyPatch) -> None:
    session = Session(FakeSource(exits(1)))
    session.pump(0)
    locked: list[bool] = []

    def host_of(_: object) -> Host:
        locked.append(session._model_lock.locked() or session._lock.locked())
        return Host("h", "6.12", "bpf")

    monkeypatch.setattr(module, "host_of", host_of)
    session.snapshot()
    assert locked == [False]


def test_a_vm_that_did_not_change_is_not_copied_again() -> None:
    correlator = Correlator()
    for vm in (1, 2, 3):
        correlator.feed(VmSeen(T0, vm, 100 + vm))
    before = correlator.snapshot().vms
    correlator.feed(VmSeen(T0, 2, 102, "named later"))
    correlator.feed(exits(1, 3)[0])
    after = correlator.snapshot().vms
    assert after[1] is before[1]
    assert after[2].name == "named later"
    assert sum(after[3].exits.values()) == 1
    correlator.feed(exits(1, 3)[0])
    assert sum(correlator.snapshot().vms[3].exits.values()) == 2
    assert sum(after[3].exits.values()) == 1
    correlator.feed(VmGone(T0, 1))
    assert 1 not in correlator.snapshot().vms
    correlator.feed(VmGone(T0, 3))
    assert correlator.snapshot().vms[3].gone


def test_at_the_limit_a_new_page_does_not_rank_all_incidents(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    correlator = Correlator()
    limit = correlator._limits.incidents
    for pfn in range(limit):
        correlator.feed(Owned(T0, pfn, Owner(1, pfn, pfn << 12), "pagemap"))
        correlator.feed(Poison(T0, pfn, "dirty LRU page", "Failed", 9, 1))
    ranked = 0
    real = IncidentState.rank

    def rank(self: IncidentState) -> int:
        nonlocal ranked
        ranked += 1
        return int(real.__get__(self))

    monkeypatch.setattr(IncidentState, "rank", property(rank))
    for n in range(100):
        correlator.feed(Poison(T0 + n, 1 << 20 | n, "dirty LRU page", "Failed", 9, 1))
    assert ranked < 4 * limit
    assert len(correlator.snapshot().incidents) == limit
    assert correlator.snapshot().lost == {"incidents": 100}


def test_a_signal_that_joins_nothing_is_compared_with_none(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    correlator = Correlator()
    for round_ in range(3):
        for page in range(64):
            correlator.feed(Sigbus(T0 + round_, 9, 9, 4, page << 12, sender=9))
    compared = 0
    real = Sigbus.__eq__

    def equal(self: Sigbus, other: object) -> bool:
        nonlocal compared
        compared += 1
        return bool(real(self, other))

    monkeypatch.setattr(Sigbus, "__eq__", equal)
    correlator.feed(Sigbus(T0 + 9, 9, 9, 4, 63 << 12, sender=9))
    assert compared == 0
    kept = list(correlator._pending._signals[9].values())
    assert [one.count for one in kept] == [3] * 63 + [4]
    assert [one.hva for one in kept] == [page << 12 for page in range(64)]
