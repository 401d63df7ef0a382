"""Time goes on where nothing happens, and what only time decides is reported."""

from __future__ import annotations

from kvmtrace.correlate import Correlator
from kvmtrace.correlate.vms import QUIET_NS
from kvmtrace.enrich import Heartbeat
from kvmtrace.enrich.heartbeat import FIRST_NS
from kvmtrace.events import Event, GmemRefusal, Tick, VmSeen
from tests.unit.fake import SECOND, T0, FakeSource


class Clock:
    def __init__(self) -> None:
        self.now = T0

    def __call__(self) -> int:
        return self.now


def test_silence_is_told_ever_more_rarely() -> None:
    clock = Clock()
    source = Heartbeat(FakeSource([VmSeen(T0, 1, 4001)]), clock)
    told: list[Event] = []
    for second in range(100):
        clock.now = T0 + second * SECOND
        told += source.poll(0.001)
    assert told[0] == VmSeen(T0, 1, 4001)
    assert [(event.ts - T0) // SECOND for event in told[1:]] == [6, 12, 24, 48, 96]
    assert all(isinstance(event, Tick) for event in told[1:])


def test_what_happens_starts_it_anew() -> None:
    clock = Clock()
    source = Heartbeat(FakeSource([VmSeen(T0, 1, 4001)], [], [VmSeen(T0, 2, 4002)]), clock)
    source.poll(0.001)
    clock.now += FIRST_NS
    assert source.poll(0.001) == [Tick(clock.now)]
    clock.now += SECOND
    source.poll(0.001)
    clock.now += FIRST_NS - 1
    assert source.poll(0.001) == []
    clock.now += 1
    assert source.poll(0.001) == [Tick(clock.now)]


def test_a_refusal_that_nobody_tells_of_is_known_without_another_event() -> None:
    clock = Clock()
    source = Heartbeat(FakeSource([VmSeen(T0, 1, 4001), GmemRefusal(T0, 1, 8)]), clock)
    correlator = Correlator()
    undelivered = []
    for _ in range(2):
        for event in source.poll(0.001):
            correlator.feed(event)
        undelivered.append(correlator.snapshot().vms[1].undelivered)
        clock.now += FIRST_NS
    assert undelivered == [0, 1]
    assert FIRST_NS > QUIET_NS
