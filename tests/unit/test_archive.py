"""What serve keeps on the disk, and how the next one goes on with it."""

from __future__ import annotations

import json
import os
import sqlite3
import stat
import time
from dataclasses import replace
from pathlib import Path

import pytest

from kvmtrace import __version__
from kvmtrace.events import (
    Event,
    Exit,
    Found,
    Lost,
    Owned,
    Owner,
    Poison,
    Reboot,
    Unpoison,
    VmGone,
    VmSeen,
)
from kvmtrace.session import archive as archives
from kvmtrace.session import archive_file, archive_story
from kvmtrace.session.archive import Archive
from tests.unit import archives as kit
from tests.unit.archives import HOST, SEEN, Clock, archive, keep, kept, model_of
from tests.unit.command_line import invoke
from tests.unit.fake import SECOND, STORY, T0
from tests.unit.waiting import until

path, one_boot = kit.path, kit.one_boot


def test_what_was_kept_is_read_again(path: str) -> None:
    assert keep(path, list(STORY)) == []
    assert kept(path) == list(STORY)
    assert stat.S_IMODE(os.stat(path).st_mode) == 0o600
    (run,) = archive_file.runs(archive_file.reading(path))
    assert (run.host, run.boot, run.ended) == (HOST, "this", True)


def test_the_next_run_of_a_boot_has_the_events_of_those_before(path: str) -> None:
    keep(path, list(STORY))
    assert archive(path).begin() == (list(STORY), 3)


def test_after_a_reboot_what_was_is_history(path: str, monkeypatch: pytest.MonkeyPatch) -> None:
    keep(path, list(STORY))
    monkeypatch.setattr(archive_file, "boot_id", lambda: "the next")
    past, _ = archive(path).begin()
    assert past == [*STORY, Reboot(T0), VmGone(T0, 1), VmGone(T0, 2)]
    model = model_of(past)
    assert [one.state for one in model.incidents] == ["closed", "closed"]
    assert {one.rebooted_ts for one in model.incidents} == {T0}
    assert all(vm.gone and not vm.poisoned_pages for vm in model.vms.values())
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
    assert one.begin() == ([], 0)
    one.start()
    one.add(STORY)
    until(lambda: one.state().errors > 1)
    assert not one.state().is_written
    (tmp_path / "missing").mkdir()
    until(lambda: len(said) == 2)
    one.close()
    assert "cannot be written" in said[0]
    assert "written again" in said[1]
    assert kept(one.path) == list(STORY)
    assert one.take_lost() == 0
    assert one.state().is_written


def test_what_has_no_room_is_counted(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(archives, "QUEUE", 3)
    one = archive(str(tmp_path / "missing" / "history.db"))
    one.add([VmSeen(T0, n, n) for n in range(10)])
    assert one.take_lost() == 7
    assert one.take_lost() == 0


DAY = 86_400 * SECOND


def test_old_events_are_deleted_but_not_what_vms_that_run_began_with(path: str) -> None:
    clock = Clock()
    keep(path, list(STORY))
    clock.wall = clock.now = T0 + 3 * DAY
    one = Archive(path, HOST, print, days=2, wall=lambda: clock.wall, now=lambda: clock.now)
    one.begin()
    one.start()
    one.add([SEEN, VmSeen(T0 + 3 * DAY, 8, 4008), VmGone(T0 + 3 * DAY, 8)])
    until(lambda: not one.waits)
    clock.wall += 3 * DAY
    clock.now += 3 * DAY
    one._next_trim = 0.0
    one.add([Found(T0 + 6 * DAY, 1)])
    until(lambda: not one.waits)
    one.close()
    assert kept(path) == [SEEN, Found(T0 + 6 * DAY, 1)]
    assert one.state().deleted == {"age": len(STORY) + 2, "size": 0}
    # What they led to stays.
    past, _ = archive(path).begin()
    assert len(model_of(past).incidents) == 2 + 1


def test_a_clock_that_was_wrong_at_the_start_costs_no_events(path: str) -> None:
    clock = Clock()
    clock.wall = clock.now = 5 * DAY  # in 1970
    one = Archive(path, HOST, print, days=2, wall=lambda: clock.wall, now=lambda: clock.now)
    one.begin()
    one.start()
    one.add([VmSeen(5 * DAY, 1, 4001), VmGone(5 * DAY, 1)])
    until(lambda: not one.waits)
    clock.wall = T0
    one._next_trim = 0.0
    one.add([Found(5 * DAY, 1)])
    one.close()
    assert [event.ts for event in kept(path)] == [5 * DAY, 5 * DAY, T0]


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


# -- export


def test_a_story_over_a_reboot_has_each_vm_once(path: str, monkeypatch: pytest.MonkeyPatch) -> None:
    first = [SEEN, Exit(T0 + SECOND, 7, 0, 133, 39, True, 7, gfn=8, count=5)]
    keep(path, list(first))
    monkeypatch.setattr(archive_file, "boot_id", lambda: "the next")
    second = [
        VmSeen(T0 + 100 * SECOND, 8, 501, "web-1"),
        Exit(T0 + 101 * SECOND, 8, 0, 133, 39, True, 7, gfn=8),
    ]
    keep(path, list(second))
    database = archive_file.reading(path)
    everything = list(archive_story.window(database, 0, T0 + 1000 * SECOND))
    assert everything == [*first, Reboot(T0), VmGone(T0, 7), *second]
    later = list(archive_story.window(database, T0 + SECOND, T0 + 2 * SECOND))
    assert later == [VmSeen(T0 + SECOND, 7, 4001, "web-1", "u-1", "qemu"), first[1]]
    assert archive_story.host_of(database) == (HOST, __version__)
    database.close()


def test_an_export_begins_with_the_pages_that_were_poisoned_then(path: str) -> None:
    def poisoned(pfn: int, vm: int) -> list[Event]:
        return [
            Poison(T0, pfn, "dirty unevictable LRU page", "Failed"),
            Owned(T0, pfn, Owner(vm, 8, 0x7000), "pagemap", 4096),
        ]

    batch = VmSeen(T0, 9, 5, "batch")
    later = Exit(T0 + 60 * SECOND, 7, 0, 133, 39, True, 7, gfn=8)
    kernels = Poison(T0, 0x500, "reserved kernel page", "Ignored")
    mended = [*poisoned(0x300, 7), Unpoison(T0 + 1, 0x300)]
    before = [SEEN, batch, *poisoned(0x100, 7), *poisoned(0x200, 9), *mended, kernels]
    again = Owned(T0 + SECOND, 0x100, Owner(7, 8, 0x7000), "pagemap", 4096)
    keep(path, [*before, again, VmGone(T0 + SECOND, 9), later])
    database = archive_file.reading(path)
    told = list(archive_story.window(database, T0 + 30 * SECOND, T0 + 90 * SECOND))
    database.close()
    assert told == [*poisoned(0x100, 7), kernels, replace(SEEN, ts=T0 + 30 * SECOND), later]
    (of_vm, of_kernel) = model_of(told).incidents
    assert (of_vm.state, of_vm.poisoned_ts, of_kernel.host_at_risk) == ("delivered", T0, True)


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
