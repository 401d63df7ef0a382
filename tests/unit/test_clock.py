"""One clock: events, what is looked up, and ages in views, whatever happens to the wall clock."""

from __future__ import annotations

import ast
import time
import urllib.request
from pathlib import Path

import pytest

import kvmtrace
from kvmtrace import clock, live
from kvmtrace.correlate import Correlator
from kvmtrace.events import Event, Exit, Lost, Owned, Owner, Poison, VmSeen
from kvmtrace.live import Session
from kvmtrace.views import exporter
from tests.unit.fake import SECOND, T0, FakeSource


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
    assert users <= {"clock.py", "cli/logs.py"}


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
    server = exporter.serve("127.0.0.1:0", session)
    try:
        with urllib.request.urlopen(server.url) as answer:
            html = answer.read().decode()
    finally:
        server.close()
    assert " s ago" in html
    assert " d ago" not in html


@pytest.mark.usefixtures("stepped")
def test_a_serves_events_have_the_serves_clock() -> None:
    class Joined(FakeSource):
        epoch_offset_ns = clock.epoch_offset_ns() - 3600 * SECOND

    session, own = Session(Joined()), Session(FakeSource())
    assert 3599 * SECOND < own.now() - session.now() < 3601 * SECOND
    assert live.host_of(FakeSource()).epoch_offset_ns == clock.epoch_offset_ns()


def test_a_loss_by_another_clock_does_not_end_a_loop() -> None:
    """As recordings of older kvmtraces have it."""
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
