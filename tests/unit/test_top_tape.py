"""`top --from`: a recording with time."""

from __future__ import annotations

import json
import time
from collections.abc import Iterator

import pytest

from kvmtrace.cli.tape import RecordedTape
from kvmtrace.errors import UsageError
from kvmtrace.sources.recording import RecordingSource
from kvmtrace.views.terminal.app import TopApp
from kvmtrace.views.terminal.watched import Watched
from tests import docs
from tests.unit.command_line import invoke
from tests.unit.test_top import NEVER, screen, tabs

SECOND = 1_000_000_000
STORY = str(docs.STORY)


class Watch:
    """A clock that the test winds."""

    def __init__(self) -> None:
        self.seconds = 100.0

    def __call__(self) -> float:
        return self.seconds


@pytest.fixture(autouse=True)
def in_utc(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.setenv("TZ", "UTC0")
    time.tzset()
    yield
    monkeypatch.undo()
    time.tzset()


@pytest.fixture
def watch() -> Watch:
    return Watch()


@pytest.fixture
def tape(watch: Watch) -> Iterator[RecordedTape]:
    source = RecordingSource(STORY, twice=True)
    yield RecordedTape(source, watch)
    source.close()


def known(tape: RecordedTape) -> list[str]:
    return [one.id for one in tape.snapshot().incidents]


def test_it_begins_at_the_end_as_replay_shows_it(tape: RecordedTape) -> None:
    assert known(tape) == ["4f2311-1", "2a77c2-1", "9d0041-1"]
    assert tape.now() == tape.snapshot().last_ts == tape.last
    assert tape.place == "END"


def test_back_in_time_and_forth(tape: RecordedTape) -> None:
    last = tape.snapshot()
    seen = [known(tape)]
    for _ in range(60):
        tape.step(-1)
        seen.append(known(tape))
    assert seen[-1] == []
    assert tape.now() == tape.first
    assert [one for n, one in enumerate(seen) if one != seen[n - 1]] == [
        ["4f2311-1", "2a77c2-1", "9d0041-1"],
        ["4f2311-1", "2a77c2-1"],
        ["4f2311-1"],
        [],
    ]
    for _ in range(60):
        tape.step(1)
    assert tape.now() == tape.last
    # The same whichever way one came: nothing is counted twice.
    assert tape.snapshot().incidents == last.incidents
    assert tape.snapshot().vms == last.vms


def test_every_step_changes_what_was_seen_last(tape: RecordedTape) -> None:
    times = [tape.now()]
    while times[-1] > tape.first:
        tape.step(-1)
        times.append(tape.now())
    back = list(times)
    while tape.now() < tape.last:
        tape.step(1)
        back.append(tape.now())
    assert len(set(times)) == len(times)
    assert back[len(times) - 1 :] == times[::-1]


def test_playing(tape: RecordedTape, watch: Watch) -> None:
    tape.toggle()  # from the end: from the beginning
    assert known(tape) == []
    assert tape.now() == tape.first
    watch.seconds += 10
    tape.snapshot()
    assert tape.now() == tape.first + 10 * SECOND
    assert tape.place.startswith("PLAYING 1×  ")
    tape.faster(2)
    tape.faster(2)
    watch.seconds += 10
    tape.snapshot()
    assert tape.now() == tape.first + 50 * SECOND
    tape.toggle()
    watch.seconds += 1000
    tape.snapshot()
    assert tape.now() == tape.first + 50 * SECOND
    assert tape.place.startswith("PAUSED  ")
    tape.toggle()
    watch.seconds += 1e6
    tape.snapshot()
    assert (tape.now(), tape.playing, tape.place) == (tape.last, False, "END")


@pytest.mark.parametrize(
    ("at", "incidents"),
    [
        ("15:51:19", []),
        ("15:51:20", ["4f2311-1"]),
        ("15:51", []),
        ("2026-09-21T15:55:20", ["4f2311-1", "2a77c2-1"]),
        ("2026-09-21T17:55:20+02:00", ["4f2311-1", "2a77c2-1"]),
        ("1m", ["4f2311-1", "2a77c2-1"]),
        ("100m", []),
    ],
)
def test_at_a_time(tape: RecordedTape, at: str, incidents: list[str]) -> None:
    tape.seek(at)
    assert known(tape) == incidents


@pytest.mark.parametrize("at", ["", "noon", "25:00", "2026-13-01", "9:9:9:9", "1e400", "x" * 9999])
def test_what_is_no_time(tape: RecordedTape, at: str) -> None:
    with pytest.raises(UsageError, match="is no time of a recording"):
        tape.seek(at)


@pytest.mark.parametrize("at", ["2h", "2025-01-01", "2027-01-01T00:00:00Z", "15:56:52"])
def test_a_time_that_is_not_in_it(tape: RecordedTape, at: str) -> None:
    with pytest.raises(UsageError, match="has nothing of") as refused:
        tape.seek(at)
    assert refused.value.hint == (
        "it is from 2026-09-21 14:13:20.000 UTC to 2026-09-21 15:56:50.000 UTC"
    )


def test_a_time_of_the_next_day(tape: RecordedTape) -> None:
    tape.first = tape.last - 60 * SECOND  # as if it had begun at 15:55:50
    with pytest.raises(UsageError, match="has nothing of 15:50"):
        tape.seek("15:50")


def test_once_at_a_time() -> None:
    shown = json.loads(invoke("top", "--once", "--json", "--from", STORY, "--at", "15:53").stdout)
    assert [one["id"] for one in shown["incidents"]] == ["4f2311-1"]
    whole = json.loads(invoke("top", "--once", "--json", "--from", STORY).stdout)
    assert whole == json.loads(invoke("replay", "--json", STORY).stdout)


async def test_keys(tape: RecordedTape, watch: Watch) -> None:
    app = TopApp(Watched(tape.snapshot, tape.now, tape.recent, tape=tape), NEVER)
    async with app.run_test(size=(100, 30)) as pilot:
        await pilot.pause()
        assert screen(app)[0].startswith("15:56:50 UTC  END  hv-fra1-07")
        assert "space play  < > step" in screen(app)[-1]
        await pilot.press("less_than_sign", "less_than_sign", "less_than_sign", "less_than_sign")
        assert "[Incidents 2]" in tabs(screen(app))
        assert "before the end" in screen(app)[0]
        await pilot.press("greater_than_sign")
        assert "[Incidents 3]" in tabs(screen(app))
        await pilot.press("plus", "space")
        assert "PLAYING 2×" in screen(app)[0]
        watch.seconds += 1
        app.tick()
        await pilot.press("4")
        assert screen(app)[4].startswith("15:56:20.003 page ")  # nothing of later
        await pilot.press("question_mark")
        assert any("< >" in line for line in screen(app))
