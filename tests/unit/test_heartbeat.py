"""Time passes without events, and what only time decides is reported."""

from __future__ import annotations

from kvmtrace.correlate import Correlator
from kvmtrace.correlate.vms import QUIET_NS
from kvmtrace.enrich.heartbeat import FIRST_NS, Heartbeat
from kvmtrace.enrich.pipeline import EnrichedSource
from kvmtrace.events import Event, GmemRefusal, Tick, VmSeen
from tests.unit.fake import SECOND, T0, FakeSource


class Clock:
    def __init__(self) -> None:
        self.now = T0

    def __call__(self) -> int:
        return self.now


def test_ticks_become_rarer() -> None:
    clock = Clock()
    source = EnrichedSource(FakeSource([VmSeen(T0, 1, 4001)]), [Heartbeat()], clock)
    events: list[Event] = []
    for second in range(100):
        clock.now = T0 + second * SECOND
        events += source.poll(0.001)
    assert events[0] == VmSeen(T0, 1, 4001)
    assert [(event.ts - T0) // SECOND for event in events[1:]] == [6, 12, 24, 48, 96]
    assert all(isinstance(event, Tick) for event in events[1:])


def test_an_event_starts_the_intervals_anew() -> None:
    clock = Clock()
    source = EnrichedSource(
        FakeSource([VmSeen(T0, 1, 4001)], [], [VmSeen(T0, 2, 4002)]), [Heartbeat()], clock
    )
    source.poll(0.001)
    clock.now += FIRST_NS
    assert source.poll(0.001) == [Tick(clock.now)]
    clock.now += SECOND
    source.poll(0.001)
    clock.now += FIRST_NS - 1
    assert source.poll(0.001) == []
    clock.now += 1
    assert source.poll(0.001) == [Tick(clock.now)]


def test_an_undelivered_refusal_is_counted_without_another_event() -> None:
    clock = Clock()
    source = EnrichedSource(
        FakeSource([VmSeen(T0, 1, 4001), GmemRefusal(T0, 1, 8)]), [Heartbeat()], clock
    )
    correlator = Correlator()
    undelivered = []
    for _ in range(2):
        for event in source.poll(0.001):
            correlator.feed(event)
        undelivered.append(correlator.snapshot().vms[1].undelivered)
        clock.now += FIRST_NS
    assert undelivered == [0, 1]
    assert FIRST_NS > QUIET_NS
