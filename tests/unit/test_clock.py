"""One clock for events, lookups and ages in views, whatever happens to the wall clock."""

from __future__ import annotations

import ast
import io
import json
import re
import time
import urllib.request
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

import kvmtrace
from kvmtrace.correlate import Correlator
from kvmtrace.correlate.limits import Limits
from kvmtrace.events import (
    LAST_NS,
    ClockStep,
    Event,
    Exit,
    GmemRefusal,
    Lost,
    Owned,
    Owner,
    Poison,
    VmSeen,
    elapsed,
    wall_time,
)
from kvmtrace.linux import clock
from kvmtrace.model import CorrelatedEvent, Snapshot
from kvmtrace.session.session import Session, host_of
from kvmtrace.sources.recording import RecordingSource, Writer
from kvmtrace.sources.remote import RemoteSource
from kvmtrace.views import event_lines, json_output
from kvmtrace.views.explain import as_object, explain_text
from kvmtrace.views.tables.table import table_text
from kvmtrace.views.web import landing, metrics
from tests.unit import serving
from tests.unit.fake import SECOND, T0, FakeSource
from tests.unit.serving import open_door

DAY = 86400 * SECOND


def test_nothing_but_the_clock_reads_the_wall_clock() -> None:
    """An archive's own date (bundle) is the only other use."""
    package = Path(kvmtrace.__file__).parent
    users = {
        path.relative_to(package).as_posix()
        for path in package.rglob("*.py")
        for node in ast.walk(ast.parse(path.read_text()))
        if isinstance(node, ast.Attribute)
        and ast.unparse(node) in ("time.time", "time.time_ns", "datetime.now")
    }
    assert users <= {"linux/clock.py", "cli/bundle.py"}


@pytest.fixture
def stepped(monkeypatch: pytest.MonkeyPatch) -> None:
    """NTP steps the wall clock by a day after kvmtrace has started."""
    clock.epoch_offset_ns()
    real = time.time_ns
    monkeypatch.setattr(time, "time_ns", lambda: real() + 86400 * SECOND)


@pytest.mark.usefixtures("stepped")
def test_ages_go_by_the_clock_of_the_events() -> None:
    session = Session(FakeSource([Poison(clock.now_ns(), 0x55, "dirty LRU page", "Failed")]))
    session.pump(0)
    server = serving.serve("127.0.0.1:0", session)
    try:
        with urllib.request.urlopen(server.url) as answer:
            html = answer.read().decode()
    finally:
        server.close()
    assert re.search(r'<td data-head="SINCE"[^>]*>\d+ s</td>', html)
    assert " d ago" not in html


@pytest.mark.usefixtures("stepped")
def test_a_serves_events_have_the_serves_clock() -> None:
    class Joined(FakeSource):
        epoch_offset_ns = clock.epoch_offset_ns() - 3600 * SECOND

    session, own = Session(Joined()), Session(FakeSource())
    assert 3599 * SECOND < own.now() - session.now() < 3601 * SECOND
    assert host_of(FakeSource()).epoch_offset_ns == clock.epoch_offset_ns()


def test_a_loss_by_another_clock_does_not_end_a_loop() -> None:
    """As in recordings of older versions."""
    correlator = Correlator()
    begin: list[Event] = [
        VmSeen(T0, 1, 7, "web-1"),
        Poison(T0, 5, "dirty LRU page", "Failed", tid=3),
        Owned(T0, 5, Owner(1, 8), "pagemap"),
    ]
    tenth = SECOND // 10
    loops = [Exit(T0 + n * tenth, 1, 0, 133, 39, True, 9, gfn=8, gmem=133) for n in range(10)]
    for event in (*begin, *loops, Lost(T0 + 3600 * SECOND, "poison_missed", 1)):
        correlator.feed(event)
    (incident,) = correlator.snapshot().incidents
    assert (incident.state, incident.verdict) == ("looping", "looping")


# -- steps, by a made-up clock


class Clocks:
    """The kernel's clocks, in nanoseconds. ``torn``: a read of one takes that long, once."""

    def __init__(self) -> None:
        self.monotonic = 1000 * SECOND
        self.realtime = T0
        self.suspended = 50 * SECOND
        self.torn = 0

    def tick(self, ns: int) -> None:
        self.monotonic += ns
        self.realtime += ns

    def suspend(self, ns: int) -> None:
        self.realtime += ns
        self.suspended += ns

    def time_ns(self) -> int:
        read = self.realtime
        torn, self.torn = self.torn, 0
        self.tick(torn)
        return read

    def monotonic_ns(self) -> int:
        return self.monotonic

    def clock_gettime_ns(self, which: int) -> int:
        assert which == time.CLOCK_BOOTTIME
        return self.monotonic + self.suspended


@pytest.fixture
def clocks(monkeypatch: pytest.MonkeyPatch) -> Iterator[Clocks]:
    caches = (clock.epoch_offset_ns, clock._start)
    made_up = Clocks()
    for name in ("time_ns", "monotonic_ns", "clock_gettime_ns"):
        monkeypatch.setattr(time, name, getattr(made_up, name))
    for cache in caches:
        cache.cache_clear()
    yield made_up
    monkeypatch.undo()
    for cache in caches:
        cache.cache_clear()


@pytest.mark.parametrize("step", [DAY, -3600 * SECOND, SECOND // 50])
def test_a_step_is_noticed_once(clocks: Clocks, step: int) -> None:
    steps = clock.Steps()
    clocks.tick(SECOND)
    assert steps.look() is None
    clocks.tick(SECOND)
    clocks.realtime += step
    clocks.tick(SECOND)
    assert steps.look() == ClockStep(T0 + SECOND, step, step)
    clocks.tick(SECOND)
    assert steps.look() is None
    clocks.realtime -= step
    assert steps.look() == ClockStep(T0 + 4 * SECOND, -step, 0)


def test_the_time_between_two_readings_is_not_part_of_a_step(clocks: Clocks) -> None:
    """A day less 300 ns would be shown as 23 hours."""
    steps = clock.Steps()
    clocks.realtime += DAY - 300
    assert steps.look() == ClockStep(T0, DAY, DAY)
    assert steps.look() is None


def test_a_step_before_the_first_look_is_noticed(clocks: Clocks) -> None:
    """Programs are compiled and attached between the two."""
    clock.epoch_offset_ns()
    clocks.tick(SECOND)
    clocks.realtime += DAY
    assert clock.Steps().look() == ClockStep(T0, DAY, DAY)


def test_a_thread_that_waits_for_a_cpu_is_no_step(clocks: Clocks) -> None:
    steps = clock.Steps()
    clocks.torn = 5 * SECOND
    assert steps.look() is None
    clocks.torn, clocks.realtime = 5 * SECOND, clocks.realtime + DAY
    assert steps.look() is None
    assert steps.look() == ClockStep(T0, DAY, DAY)


def test_the_offset_is_exact_although_the_thread_waited(clocks: Clocks) -> None:
    clocks.torn = SECOND
    clock.epoch_offset_ns()
    assert clock.now_ns() == clocks.realtime


def test_a_suspension_is_a_step_with_its_duration(clocks: Clocks) -> None:
    steps = clock.Steps()
    clocks.suspend(8 * 3600 * SECOND)
    (step,) = filter(None, [steps.look()])
    assert step == ClockStep(T0, 8 * 3600 * SECOND, 8 * 3600 * SECOND, 8 * 3600 * SECOND)
    assert elapsed(T0 - SECOND, T0 + SECOND, [step]) == 8 * 3600 * SECOND + 2 * SECOND
    assert elapsed(T0, T0 + SECOND, [step]) == SECOND


def test_the_time_of_day_is_that_of_the_steps_until_then() -> None:
    steps = [ClockStep(100, 50, 50), ClockStep(200, -80, -30), ClockStep(300, -1000, -1030)]
    assert [wall_time(ts, steps) for ts in (99, 100, 199, 200, 300)] == [99, 150, 249, 170, 0]
    # Of those that were forgotten the next one knows.
    assert [wall_time(ts, steps[1:]) for ts in (199, 200)] == [249, 170]
    assert wall_time(100, [ClockStep(0, LAST_NS, LAST_NS)]) == LAST_NS


class Machine(FakeSource):
    """A source of one VM; ``poisons`` and other events come with the next poll."""

    def __init__(self, clocks: Clocks) -> None:
        super().__init__([VmSeen(clock.now_ns(), 1, 4001, "web-1", None, "qemu")])
        self.clocks = clocks
        self.said: list[Event] = []

    def poll(self, timeout: float) -> list[Event]:
        said, self.said = self.said, []
        return super().poll(0) + said

    def poison(self, pfn: int) -> None:
        """A page fails, and its VMM is notified 0.1 s later."""
        at = clock.now_ns()
        self.said += [
            Poison(at, pfn, "dirty LRU page", "Failed", tid=7),
            Owned(at, pfn, Owner(1, pfn), "pagemap"),
            Exit(at + SECOND // 10, 1, 0, 133, 39, True, 9, flags=0, gfn=pfn, gmem=0),
        ]
        self.clocks.tick(SECOND // 5)


@pytest.fixture(params=[DAY, -3600 * SECOND], ids=["a day on", "an hour back"])
def stepped_session(
    clocks: Clocks, request: pytest.FixtureRequest
) -> tuple[Session, list[CorrelatedEvent], int]:
    """A page fails, the clock is stepped, another page fails, all seconds apart."""
    machine = Machine(clocks)
    session = Session(machine)
    batch = session.pump(0)
    for pfn in (0x10, 0x20):
        clocks.tick(3 * SECOND)
        machine.poison(pfn)
        batch += session.pump(0)
        if pfn == 0x10:
            clocks.tick(SECOND)
            clocks.realtime += request.param
    return session, batch, request.param


def times(snapshot: Snapshot) -> dict[str, object]:
    """All times in a snapshot as JSON has them."""
    shown = json_output.top(snapshot)
    return {key: shown[key] for key in ("vms", "incidents", "clock_steps")}


def test_new_events_have_the_new_time_and_old_ones_theirs(
    stepped_session: tuple[Session, list[CorrelatedEvent], int],
) -> None:
    session, batch, step = stepped_session
    ts = {
        one["pfn"]: one["poisoned_ts"] for one in json_output.top(session.snapshot())["incidents"]
    }
    # 3 s, 0.2 s until the reader sees it, 1 s, 3 s
    assert ts == {
        0x10: json_output.rfc3339(T0 + 3 * SECOND),
        0x20: json_output.rfc3339(T0 + 7 * SECOND + SECOND // 5 + step),
    }
    of_lines = [json.loads(line) for one in batch if (line := event_lines.json_text(one))]
    assert {one["pfn"]: one["ts"] for one in of_lines if one["kind"] == "poison"} == ts
    (line,) = (one for one in of_lines if one["kind"] == "clock")
    assert line == {
        "ts": json_output.rfc3339(T0 + 3 * SECOND + SECOND // 5 + step),
        "kind": "clock",
        "step_ns": step,
    }
    assert json_output.top(session.snapshot())["clock_steps"] == [
        {key: value for key, value in line.items() if key != "kind"}
    ]


def test_ages_and_joins_do_not_see_the_step(
    stepped_session: tuple[Session, list[CorrelatedEvent], int], clocks: Clocks
) -> None:
    session, _, _ = stepped_session
    clocks.tick(2 * SECOND)
    snapshot, now = session.snapshot(), session.now()
    html = landing.render(snapshot, now)
    ages = re.findall(r'<td data-head="SINCE"[^>]*>(.*?)</td>', html)
    assert sorted(ages) == ["2 s", "6 s"]
    assert " d ago" not in html
    assert " h ago" not in html
    for incident in snapshot.incidents:
        assert incident.first_delivery_ts is not None
        assert incident.poisoned_ts is not None
        assert incident.first_delivery_ts - incident.poisoned_ts == SECOND // 10
    assert snapshot.latency.sum_seconds == pytest.approx(0.2)


def test_the_step_is_shown(stepped_session: tuple[Session, list[CorrelatedEvent], int]) -> None:
    session, batch, step = stepped_session
    snapshot = session.snapshot()
    words = "stepped by " + ("+24 h" if step > 0 else "-60 min")
    assert words in landing.render(snapshot, session.now())
    assert words in table_text(snapshot, now=session.now(), width=120)
    assert sum(words in (event_lines.event_text(one) or "") for one in batch) == 1
    series = list(metrics.Exporter(lambda: snapshot).collect())
    (count,) = (one.samples[0].value for one in series if one.name == "kvmtrace_clock_steps")
    assert count == 1


@pytest.mark.parametrize("step", [DAY, -3600 * SECOND])
def test_a_step_within_a_story_is_part_of_it(clocks: Clocks, step: int) -> None:
    machine = Machine(clocks)
    session = Session(machine)
    machine.poison(0x10)
    session.pump(0)
    clocks.realtime += step
    clocks.tick(SECOND)
    machine.poison(0x10)
    session.pump(0)
    snapshot = session.snapshot()
    text = explain_text(snapshot.incidents[0], snapshot)
    clock = "14:13:20" if step > 0 else "13:13:20"
    assert f"  {clock}  the wall clock was stepped by {'+' if step > 0 else '-'}" in text
    assert ("\n  2026-09-22\n" in text) == (step > 0)
    moments = as_object(snapshot.incidents[0], snapshot)["timeline"]
    (at,) = (moment["ts"] for moment in moments if "stepped" in moment["what"])
    assert at == json_output.rfc3339(T0 + SECOND // 5 + step)


@pytest.mark.usefixtures("clocks")
def test_recordings_and_joiners_have_the_same_times(
    stepped_session: tuple[Session, list[CorrelatedEvent], int], tmp_path: Path
) -> None:
    session, batch, step = stepped_session
    serve = session.snapshot()
    file = io.StringIO()
    Writer(file, session.host()).write([one.event for one in batch], ())
    path = tmp_path / "recording"
    path.write_text(file.getvalue())
    source = RecordingSource(str(path))
    replay = Session(source)
    replay.pump(0)
    assert times(replay.snapshot()) == times(serve)
    assert replay.snapshot().steps == serve.steps
    # Who reads the lines themselves finds the time of day in them.
    records = [json.loads(line) for line in file.getvalue().splitlines()]
    ts = {one["pfn"]: one["ts"] for one in records if one.get("kind") == "poison"}
    assert ts == {0x10: T0 + 3 * SECOND, 0x20: T0 + 7 * SECOND + SECOND // 5 + step}
    with open_door(session):
        joined = RemoteSource.connect()
        assert joined is not None
        joiner = Session(joined)
        joiner.pump(0)
        assert times(joiner.snapshot()) == times(serve)
        assert joiner.now() == session.now()
        assert joiner.host().epoch_offset_ns == session.host().epoch_offset_ns
        joiner.close()
    source.close()


def test_only_sources_of_this_host_follow_its_clock(clocks: Clocks, tmp_path: Path) -> None:
    class Joined(FakeSource):
        epoch_offset_ns = clock.epoch_offset_ns()

    file = io.StringIO()
    Writer(file, host_of(FakeSource())).write([Poison(T0, 5, "a", "x")], ())
    (tmp_path / "r").write_text(file.getvalue())
    sources: list[Callable[[], Session]] = [
        lambda: Session(Joined()),
        lambda: Session(RecordingSource(str(tmp_path / "r"))),
    ]
    for make in sources:
        session = make()
        clocks.realtime += DAY
        assert not [one for one in session.pump(0) if isinstance(one.event, ClockStep)]
        session.close()


@pytest.mark.parametrize("step", [DAY, -3600 * SECOND])
def test_a_step_is_no_silence(clocks: Clocks, step: int) -> None:
    """A refusal without an exit within 5 s was not delivered: a step of a day is not 5 s."""
    machine = Machine(clocks)
    session = Session(machine)
    machine.said = [GmemRefusal(clock.now_ns(), 1, 8)]
    session.pump(0)
    clocks.realtime += step
    clocks.tick(SECOND)
    machine.said = [Lost(clock.now_ns(), "ring", 1)]
    session.pump(0)
    machine.said = [VmSeen(clock.now_ns(), 2, 4002)]
    session.pump(0)
    assert session.snapshot().vms[1].undelivered == 0
    clocks.tick(6 * SECOND)
    machine.said = [VmSeen(clock.now_ns(), 3, 4003)]
    session.pump(0)
    assert session.snapshot().vms[1].undelivered == 1


def test_steps_that_have_no_room_are_counted() -> None:
    correlator = Correlator(Limits(clock_steps=2))
    for n in range(1, 6):
        correlator.feed(ClockStep(T0 + n * SECOND, SECOND, n * SECOND))
    snapshot = correlator.snapshot()
    assert snapshot.lost == {"clock_steps": 3}
    assert snapshot.wall(T0 + 4 * SECOND) == T0 + 8 * SECOND
    assert "5 steps" not in table_text(snapshot, now=T0, width=120)
    assert "4 steps before" in table_text(snapshot, now=T0, width=120)
