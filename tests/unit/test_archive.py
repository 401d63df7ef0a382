"""What serve keeps on the disk, and how the next one goes on with it."""

from __future__ import annotations

import json
import os
import sqlite3
import stat
import time
from pathlib import Path

import pytest

from kvmtrace import __version__
from kvmtrace.correlate import Correlator
from kvmtrace.events import Event, Exit, Found, Host, KernelCounts, Lost, VmGone, VmSeen
from kvmtrace.session import archive as archives
from kvmtrace.session import archive_export, archive_file
from kvmtrace.session.archive import Archive
from kvmtrace.session.resumed import ResumedSource, rekeyed
from tests.unit.command_line import invoke
from tests.unit.fake import SECOND, STORY, T0, FakeSource
from tests.unit.waiting import until

HOST = Host("hv-1", "6.18.15", "bpf")


class Clock:
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


def kept(path: str) -> list[Event]:
    database = archive_file.reading(path)
    try:
        numbers = [run.number for run in archive_file.runs(database)]
        return [event for _, event in archive_file.events_of(database, numbers)]
    finally:
        database.close()


def test_what_was_kept_is_read_again(path: str) -> None:
    assert keep(path, list(STORY)) == []
    assert kept(path) == list(STORY)
    assert stat.S_IMODE(os.stat(path).st_mode) == 0o600
    (run,) = archive_file.runs(archive_file.reading(path))
    assert (run.host, run.boot) == (HOST, "this")


def test_the_next_run_of_a_boot_has_the_events_of_those_before(path: str) -> None:
    keep(path, list(STORY))
    assert archive(path).begin() == list(STORY)


def test_another_boot_begins_anew_and_keeps_what_was(
    path: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    keep(path, list(STORY))
    monkeypatch.setattr(archive_file, "boot_id", lambda: "the next")
    assert archive(path).begin() == []
    assert kept(path) == list(STORY)


@pytest.mark.parametrize(
    "damage", [b"no database at all" * 100, b"SQLite format 3\0" + b"\xff" * 9000]
)
def test_a_damaged_file_is_set_aside_and_said(path: str, damage: bytes) -> None:
    Path(path).write_bytes(damage)
    (said,) = keep(path, list(STORY))
    assert "cannot be used" in said
    aside = said.rpartition(" ")[2]
    assert Path(aside).read_bytes() == damage
    assert kept(path) == list(STORY)


def test_a_file_of_a_newer_kvmtrace_is_set_aside(path: str) -> None:
    keep(path, list(STORY))
    with sqlite3.connect(path) as database:
        database.execute(f"PRAGMA user_version = {archive_file.VERSION + 1}")
    database.close()
    (said,) = keep(path, [])
    assert "newer kvmtrace" in said


def test_a_disk_that_takes_nothing_is_said_once_and_what_waits_is_written_later(
    tmp_path: Path,
) -> None:
    said: list[str] = []
    one = archive(str(tmp_path / "missing" / "history.db"), said)
    assert one.begin() == []
    one.start()
    one.add(STORY)
    time.sleep(0.1)
    (tmp_path / "missing").mkdir()
    until(lambda: len(said) == 2)
    one.close()
    assert "cannot be written" in said[0]
    assert "written again" in said[1]
    assert kept(one.path) == list(STORY)
    assert one.take_lost() == 0


def test_what_has_no_room_is_counted(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(archives, "QUEUE", 3)
    one = archive(str(tmp_path / "missing" / "history.db"))
    one.add([VmSeen(T0, n, n) for n in range(10)])
    assert one.take_lost() == 7
    assert one.take_lost() == 0


def test_old_events_are_deleted(path: str) -> None:
    old = [VmSeen(T0 - 3 * 86400 * SECOND, 1, 4001), VmSeen(T0, 2, 4002)]
    keep(path, list(old), days=2)
    assert kept(path) == old[1:]


def test_the_file_stays_within_its_size(path: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(archives, "_TRIM_EVERY", 0.0)
    keep(path, [VmSeen(T0 + n, n, n, "x" * 200) for n in range(20_000)], size=1 << 20)
    assert os.path.getsize(path) <= 2 << 20
    left = kept(path)
    assert left[-1].ts == T0 + 19_999
    assert len(left) > 1000


def test_times_are_by_the_wall_clock(path: str) -> None:
    clock = Clock()
    one = Archive(path, HOST, print, wall=lambda: clock.wall, now=lambda: clock.now)
    one.begin()
    one.start()
    one.add([Found(T0, 1)])
    clock.wall += 3600 * SECOND
    one.add([Found(T0 + SECOND, 2)])
    clock.wall += 3_000_000  # noise
    one.add([Found(T0 + 2 * SECOND, 3)])
    one.close()
    assert [event.ts - T0 for event in kept(path)] == [0, 3601 * SECOND, 3602 * SECOND]


def test_a_record_that_is_not_understood_is_counted(path: str) -> None:
    keep(path, list(STORY))
    with sqlite3.connect(path) as database:
        rows = ["nonsense", "[]", '{"kind": "exit"}', json.dumps({"kind": "from the future"})]
        database.executemany(
            "INSERT INTO events (run, ts, record) VALUES (1, ?, ?)", [(T0, row) for row in rows]
        )
    database.close()
    lost = [event for event in kept(path) if isinstance(event, Lost)]
    assert [event.count for event in lost] == [1, 1, 1, 1]


# -- going on

SEEN = VmSeen(T0, 7, 4001, "web-1", "u-1", "qemu")
POISONED: list[Event] = [SEEN, Exit(T0, 7, 0, 133, 39, True, 7, gfn=8, count=5)]


def resumed(past: list[Event], *batches: list[Event], path: str) -> list[Event]:
    one = archive(path)
    source = ResumedSource(FakeSource(*batches), past, one, lambda: T0 + 99 * SECOND)
    events = [event for _ in batches for event in source.poll(0)]
    source.close()
    return events


def test_a_vm_that_still_runs_keeps_its_key_and_its_counts(path: str) -> None:
    again = VmSeen(T0 + SECOND, 1, 4001, "web-1", "u-1", "qemu")
    more = Exit(T0 + 2 * SECOND, 1, 0, 133, 39, True, 7, gfn=8, count=2)
    events = resumed(POISONED, [again], [more], path=path)
    correlator = Correlator()
    for event in events:
        correlator.feed(event)
    (vm,) = correlator.snapshot().vms.values()
    assert vm.exits == {("EHWPOISON", "hwpoison"): 7}
    assert [one.exits for one in correlator.snapshot().incidents] == [7]
    assert not vm.gone


@pytest.mark.parametrize(
    "now",
    [
        VmSeen(T0 + SECOND, 1, 4002, "web-1", "u-1", "qemu"),
        VmSeen(T0 + SECOND, 1, 4001, "db-1", None, "qemu"),
        VmSeen(T0 + SECOND, 1, 4001, "web-1", "u-2", "qemu"),
    ],
)
def test_a_vm_that_ended_meanwhile_is_gone_and_another_has_its_own_key(
    now: VmSeen, path: str
) -> None:
    events = resumed(POISONED, [now], path=path)
    assert [event.vm for event in events if isinstance(event, VmGone)] == [7]
    assert [event.vm for event in events if isinstance(event, VmSeen)] == [7, 9]


def test_two_vms_of_one_process_keep_theirs(path: str) -> None:
    past: list[Event] = [VmSeen(T0, 0, 5, "both"), VmSeen(T0, 1, 5, "both")]
    now: list[Event] = [VmSeen(T0 + 1, 3, 5, "both"), VmSeen(T0 + 1, 4, 5, "both")]
    events = resumed(past, now, path=path)
    assert [event.vm for event in events if isinstance(event, VmSeen)] == [0, 1, 0, 1]
    assert not [event for event in events if isinstance(event, VmGone)]


def test_what_the_kernel_handled_in_between_was_missed(path: str) -> None:
    past: list[Event] = [KernelCounts(T0, (("total", 1),), at_start=True)]
    events = resumed(past, [KernelCounts(T0 + 1, (("total", 3),), at_start=True)], path=path)
    assert [event.at_start for event in events if isinstance(event, KernelCounts)] == [True, False]


def test_only_new_events_are_kept_with_the_keys_of_this_boot(path: str) -> None:
    keep(path, POISONED)
    one = archive(path)
    past = one.begin()
    again = VmSeen(T0 + SECOND, 1, 4001, "web-1", "u-1", "qemu")
    source = ResumedSource(FakeSource([again]), past, one, lambda: T0)
    one.start()
    source.poll(0)
    source.close()
    assert kept(path) == [*POISONED, VmSeen(T0 + SECOND, 7, 4001, "web-1", "u-1", "qemu")]


def test_keys_are_changed_wherever_they_stand() -> None:
    for event in STORY:
        changed = rekeyed(event, lambda vm: vm + 100)
        assert rekeyed(changed, lambda vm: vm - 100) == event
    assert rekeyed(SEEN, lambda vm: vm + 1) != SEEN


# -- export


def test_a_story_over_a_reboot_has_each_vm_once(path: str, monkeypatch: pytest.MonkeyPatch) -> None:
    first = [SEEN, Exit(T0 + SECOND, 7, 0, 133, 39, True, 7, gfn=8, count=5)]
    keep(path, list(first))
    monkeypatch.setattr(archive_file, "boot_id", lambda: "the next")
    second = [
        VmSeen(T0 + 100 * SECOND, 7, 501, "web-1"),
        Exit(T0 + 101 * SECOND, 7, 0, 133, 39, True, 7, gfn=8),
    ]
    keep(path, list(second))
    database = archive_file.reading(path)
    everything = list(archive_export.story(database, 0, T0 + 1000 * SECOND))
    assert everything[:2] == first
    assert everything[2] == VmGone(T0 + SECOND, 7)
    assert [event.vm for event in everything[3:]] == [15, 15]  # type: ignore[attr-defined]
    later = list(archive_export.story(database, T0 + SECOND, T0 + 2 * SECOND))
    assert later == [VmSeen(T0 + SECOND, 7, 4001, "web-1", "u-1", "qemu"), first[1], everything[2]]
    assert archive_export.host_of(database) == (HOST, __version__)
    database.close()


def test_what_was_kept_is_exported_and_replayed(path: str, tmp_path: Path) -> None:
    keep(path, list(STORY))
    target = str(tmp_path / "sick.jsonl")
    ago = f"{(time.time_ns() - T0) / 1e9 + 3600:.0f}"
    done = invoke("record", "--since", ago, "--history", path, "-o", target)
    assert (done.exit_code, done.stdout) == (0, "")
    assert f"{len(STORY)} events" in done.stderr
    assert invoke("replay", target).exit_code == 0


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        ([], "missing argument 'FILE'"),
        (["a", "-o", "b"], "one FILE is enough"),
        (["a", "--until", "1h"], "--until needs --since"),
        (["a", "--since", "1h", "--history", "/nonexistent/x.db"], "No such file"),
        (["a", "--since", "1h", "--history", __file__], "not a database"),
    ],
)
def test_wrong_use_is_one_line(
    arguments: list[str], said: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    done = invoke("record", *arguments)
    assert done.exit_code in (1, 2)
    assert said in done.stderr
    assert not list(tmp_path.iterdir())
