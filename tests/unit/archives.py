"""Archives for tests: a clock, runs of a serve that keep events, and what was kept."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path

import pytest

from kvmtrace.correlate import Correlator
from kvmtrace.events import Event, Exit, Host, VmSeen
from kvmtrace.model import Snapshot
from kvmtrace.session import archive as archives
from kvmtrace.session import archive_file
from kvmtrace.session.archive import Archive
from tests.unit.fake import T0

HOST = Host("hv-1", "6.18.15", "bpf")
SEEN = VmSeen(T0, 7, 4001, "web-1", "u-1", "qemu")
POISONED: list[Event] = [SEEN, Exit(T0, 7, 0, 133, 39, True, 7, gfn=8, count=5)]


class Clock:
    """Both clocks of an archive."""

    def __init__(self) -> None:
        self.wall = self.now = T0


@pytest.fixture
def path(tmp_path: Path) -> str:
    return str(tmp_path / "history.db")


@pytest.fixture(autouse=True)
def one_boot(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(archive_file, "boot_id", lambda: "this")
    monkeypatch.setattr(archives, "_EVERY", 0.01)
    monkeypatch.setattr(archives, "_CLOSE_SECONDS", 60.0)


def archive(path: str, said: list[str] | None = None, **options: object) -> Archive:
    clock = Clock()
    return Archive(
        path,
        HOST,
        (said if said is not None else []).append,
        wall=lambda: clock.wall,
        now=lambda: clock.now,
        **options,  # type: ignore[arg-type]
    )


def keep(path: str, events: list[Event], **options: object) -> list[str]:
    """One run of a serve; returns what was said."""
    said: list[str] = []
    one = archive(path, said, **options)
    one.begin()
    one.start()
    one.add(events)
    one.close()
    return said


def model_of(events: Iterable[Event]) -> Snapshot:
    correlator = Correlator()
    for event in events:
        correlator.feed(event)
    return correlator.snapshot()


def kept(path: str) -> list[Event]:
    database = archive_file.reading(path)
    try:
        return [event for _, _, event in archive_file.events_of(database)]
    finally:
        database.close()
