"""Durations and points in time on the command line."""

from __future__ import annotations

import time
from collections.abc import Iterator

import click
import pytest
from click.testing import CliRunner

from kvmtrace.cli.options import point_in_time, seconds, utc_option
from kvmtrace.views.format import zone_of
from tests.unit.fake import SECOND


@pytest.mark.parametrize(
    ("text", "number"),
    [
        ("2", 2.0),
        ("1.5s", 1.5),
        ("2m", 120),
        ("1h", 3600),
        ("2d", 172800),
        ("1h30m", 5400),
        ("500ms", 0.5),
        ("1.5H", 5400),
        (".5", 0.5),
        ("1e3", 1000),
    ],
)
def test_durations(text: str, number: float) -> None:
    assert seconds(text) == number


@pytest.mark.parametrize(
    "text",
    ["", "m", "1x", "1h30", "-1s", "1 h", "0ms", "1e9", "nan", "²", "1hh", "1e9d", "9" * 400],
)
def test_no_durations(text: str) -> None:
    with pytest.raises(click.BadParameter):
        seconds(text)


NOW = 1_790_000_000  # 2026-09-21T14:13:20Z


@pytest.fixture
def zone(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Two hours east of UTC."""
    monkeypatch.setenv("TZ", "XYZ-2")
    time.tzset()
    yield
    monkeypatch.undo()
    time.tzset()


@pytest.mark.parametrize(
    ("text", "when"),
    [
        ("2026-09-21T16:13:20", NOW),
        ("2026-09-21 16:13:20", NOW),
        ("2026-09-21T14:13:20Z", NOW),
        ("2026-09-21T10:13:20-04:00", NOW),
        ("2026-09-21", NOW - 16 * 3600 - 13 * 60 - 20),
    ],
)
def test_points_in_time(zone: None, text: str, when: int) -> None:
    assert point_in_time(text) == when * SECOND


def test_times_of_day_are_the_last_ones(zone: None) -> None:
    now = time.time()
    for ago in (0, 60, 86100):
        shown = time.strftime("%H:%M:%S", time.localtime(now - ago))
        assert abs(now - ago - point_in_time(shown) / SECOND) < 2
    an_hour_ago = point_in_time("1h")
    # By a clock that is not stepped nor slewed.
    assert 3599 < (time.time_ns() - an_hour_ago) / SECOND < 3660
    assert point_in_time("7:05") == point_in_time("07:05")


@pytest.mark.parametrize("text", ["", "25:00", "yesterday", "2026-13-01", "99999-01-01", "²:00"])
def test_no_points_in_time(text: str) -> None:
    with pytest.raises(click.BadParameter):
        point_in_time(text)


def test_utc_ends_with_its_command(zone: None) -> None:
    shown: list[str] = []

    @click.command()
    @utc_option
    def command() -> None:
        shown.append(zone_of(NOW * SECOND))

    for arguments in (["--utc"], []):
        CliRunner().invoke(command, arguments)
    assert shown == ["UTC", "UTC+02:00"]
