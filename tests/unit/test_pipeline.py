"""The pipeline: one read of the source, then every stage once, from left to right."""

from __future__ import annotations

import pytest

from kvmtrace.enrich.pipeline import EnrichedSource
from kvmtrace.enrich.stage import Stage
from kvmtrace.events import Event, Found, Tick, VmSeen
from tests.unit.fake import T0, FakeSource


class Recorder(Stage):
    """Notes its calls, and adds one page."""

    def __init__(self, calls: list[str], pfn: int, wait: float) -> None:
        self._calls, self._pfn, self._wait = calls, pfn, wait

    def max_wait(self) -> float:
        return self._wait

    def before_read(self, now: int) -> None:
        self._calls.append(f"{self._pfn} before {now - T0}")

    def process(self, events: list[Event], now: int, *, last: bool = False) -> list[Event]:
        self._calls.append(f"{self._pfn} at {now - T0} with {len(events)}{' last' * last}")
        return [*events, Found(now, self._pfn)]


class Slow(FakeSource):
    """A source whose read takes 5 ns."""

    clock = T0

    def poll(self, timeout: float) -> list[Event]:
        self.timeout = timeout
        self.clock += 5
        return super().poll(timeout)


@pytest.mark.parametrize(("timeout", "waited", "last"), [(1, 0.25, ""), (0, 0, " last")])
def test_stages_run_in_order_on_one_read(timeout: float, waited: float, last: str) -> None:
    inner = Slow([Tick(T0 + 2), VmSeen(T0 + 3, 1, 7)])
    calls: list[str] = []
    stages = [Recorder(calls, 1, 0.5), Recorder(calls, 2, 0.25)]
    events = EnrichedSource(inner, stages, lambda: inner.clock).poll(timeout)
    assert inner.timeout == waited
    assert calls == ["1 before 0", "2 before 0", f"1 at 5 with 2{last}", f"2 at 5 with 3{last}"]
    added = [Found(T0 + 5, 1), Found(T0 + 5, 2)]
    assert events == [VmSeen(T0 + 3, 1, 7), Tick(T0 + 2), *added]  # VMs first


def test_without_stages() -> None:
    assert EnrichedSource(FakeSource([Tick(T0)]), []).poll(0) == [Tick(T0)]
