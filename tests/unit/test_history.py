"""The log that a later comer gets, and who may ask for it."""

from __future__ import annotations

import os

import pytest
from click.testing import CliRunner
from hypothesis import given, settings

from kvmtrace import cli, door, sources
from kvmtrace.cli.attaching import open_door
from kvmtrace.correlate import Correlator
from kvmtrace.events import Event, Exit, Sigbus, VcpuState, VmGone, VmSeen
from kvmtrace.history import EventLog
from kvmtrace.live import Session
from kvmtrace.model import Snapshot
from tests.property.test_correlate import LOGS
from tests.unit.fake import SECOND, T0, FakeSource
from tests.unit.test_explain import STORY


def model(events: list[Event]) -> Snapshot:
    correlator = Correlator()
    for event in events:
        correlator.feed(event)
    return correlator.snapshot()


def log_of(events: list[Event], limit: int = 1000) -> list[Event]:
    log = EventLog(limit)
    for event in events:
        log.add(event)
    return log.events()


def test_the_same_story_later() -> None:
    assert model(log_of(list(STORY))).incidents == model(list(STORY)).incidents


def test_a_storm_is_three_events_and_exact() -> None:
    storm: list[Event] = [VmSeen(T0, 1, 4001, "mad")]
    storm += [Exit(T0 + n, 1, 0, 133, 39, True, 7, gfn=8, count=3) for n in range(10_000)]
    storm += [Exit(T0, 1, 0, 14, 39, True, 7, gpa=n << 12, gfn=n, gmem=0) for n in range(10_000)]
    log = log_of(storm)
    assert len(log) == 5
    assert model(log).vms[1].exits == model(storm).vms[1].exits


def test_bounded_and_what_went_is_said() -> None:
    many: list[Event] = [
        Sigbus(T0 + n, 4001, n, 4, 0x7F0000000000, vm=1, vcpu=0) for n in range(1000)
    ]
    log = log_of(many, limit=100)
    assert len(log) == 101
    assert model(log).lost == {"history": 900}


def test_a_long_loop_does_not_push_its_poison_out() -> None:
    storm: list[Event] = list(STORY)
    for n in range(20_000):
        at = T0 + 20 * SECOND + n * SECOND
        storm.append(VcpuState(at, 1, 78, "running", 0, 5))
        storm.append(Sigbus(at, 4001, 78, 4, 0x7F0000008000, 12, 78, vm=1, vcpu=0, gfn=8))
    (incident,) = model(log_of(storm, limit=200)).incidents
    assert incident.pfn == 0x103275
    assert incident.state == "looping"


def test_uneventful_vms_leave_nothing() -> None:
    assert log_of([VmSeen(T0, 1, 4001), VmGone(T0, 1)]) == []


@given(LOGS)
@settings(max_examples=100)
def test_any_log_can_be_kept(events: list[Event]) -> None:
    kept = log_of(events, limit=20)
    assert len(kept) <= 20 + 4 + 1
    model(kept)


def test_asking_at_the_door() -> None:
    name = f"\0kvmtrace-test-{os.getpid()}"
    assert door.ask(name) is None
    answering = door.Door(lambda: "line\n" * 100_000, name)
    try:
        assert door.ask(name) == "line\n" * 100_000
        with pytest.raises(OSError, match="in use"):
            door.Door(lambda: "", name)
    finally:
        answering.close()
    assert door.ask(name) is None


def test_explain_asks_who_was_there_before(monkeypatch: pytest.MonkeyPatch) -> None:
    """Through `serve`'s door; without one, it attaches itself."""
    session = Session(FakeSource(STORY))
    session.pump(0)
    name = f"\0kvmtrace-test-{os.getpid()}"
    monkeypatch.setattr(door, "NAME", name)
    monkeypatch.setattr(sources, "open_source", lambda kind: FakeSource(STORY))
    arguments = ["explain", "web-1", "--duration", "0.1"]
    alone = CliRunner().invoke(cli.cli, arguments)
    assert "Incident 103275-1" in alone.output
    monkeypatch.setattr(sources, "open_source", lambda kind: pytest.fail("attached"))
    with open_door(session), open_door(session):  # the second one has to do without
        asked = CliRunner().invoke(cli.cli, arguments)
    assert asked.output.splitlines()[0] == alone.output.splitlines()[0]
    assert "stopped" in asked.output


def test_strangers_are_not_believed(monkeypatch: pytest.MonkeyPatch) -> None:
    name = f"\0kvmtrace-test-{os.getpid()}"
    answering = door.Door(lambda: "secret", name)
    try:
        monkeypatch.setattr(door, "_trusted", lambda peer: False)
        assert door.ask(name) is None
    finally:
        answering.close()
