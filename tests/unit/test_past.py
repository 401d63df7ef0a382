"""`--since`, `--until` and `--at`: what was, from what serve has kept."""

from __future__ import annotations

import json
import os
import stat
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from kvmtrace import sources
from kvmtrace.cli import past_events
from kvmtrace.cli.tape import RecordedTape
from kvmtrace.errors import UsageError
from kvmtrace.events import Event, Exit, Poison, VmGone, VmSeen
from kvmtrace.session import archive_file
from kvmtrace.session.archive import Archive
from kvmtrace.session.archived import ArchivedSource
from kvmtrace.session.resumed import ResumedSource
from kvmtrace.session.session import Session
from tests import docs
from tests.unit import archives as kit
from tests.unit.archives import archive, keep
from tests.unit.command_line import invoke
from tests.unit.fake import SECOND, STORY, T0, FakeSource
from tests.unit.serving import open_door
from tests.unit.waiting import until

path, one_boot = kit.path, kit.one_boot

# The story begins 14:13:20 UTC; a minute later its first VM ends, and the host is rebooted.
DAY = "2026-09-21T"
ENDS: list[Event] = [*STORY, VmGone(T0 + 60 * SECOND, 1)]
LATER = VmSeen(T0 + 7200 * SECOND, 3, 900, "web-3", None, "qemu")
SECOND_BOOT: list[Event] = [
    LATER,
    Poison(T0 + 7201 * SECOND, 0x77, "free buddy page", "Recovered"),
]


@pytest.fixture
def history(path: str, monkeypatch: pytest.MonkeyPatch) -> str:
    keep(path, ENDS)
    monkeypatch.setattr(archive_file, "boot_id", lambda: "the next")
    clock = kit.Clock()
    clock.wall = clock.now = T0 + 7190 * SECOND
    one = Archive(path, kit.HOST, print, wall=lambda: clock.wall, now=lambda: clock.now)
    one.begin()
    one.start()
    one.add(SECOND_BOOT)
    one.close()
    return path


def run(history: str, *arguments: str) -> str:
    done = invoke(*arguments, "--utc", "--history", history)
    assert done.exit_code == 0, (done.stderr, done.exception)
    return done.stdout


def words(history: str, *arguments: str) -> str:
    """Without how lines are folded."""
    return " ".join(run(history, *arguments).split())


def objects(history: str, *arguments: str) -> Any:
    return json.loads(run(history, *arguments, "--json"))


# -- explain


def test_explain_as_it_was(history: str) -> None:
    shown = words(history, "explain", "--at", f"{DAY}14:13:22")
    assert "103275-1" in shown
    assert "as of 2026-09-21 14:13:22 UTC" in shown
    assert f"kvmtrace explain ID --at {DAY}14:13:22Z --history DB" in shown
    (one,) = objects(history, "explain", "web-1", "--at", f"{DAY}14:13:23")
    assert (one["state"], one["deliveries"]["exits"]) == ("delivered", 1)
    (one,) = objects(history, "explain", "103275-1", "--at", f"{DAY}15:00")
    assert one["state"] == "unowned"


def test_explain_of_a_time_has_what_is_over(history: str) -> None:
    ids = [one["id"] for one in objects(history, "explain", "--since", f"{DAY}14:00")]
    assert sorted(ids) == ["103275-1", "77-1", "g8-1"]
    before = objects(history, "explain", "--since", f"{DAY}14:00", "--until", f"{DAY}15:00")
    assert sorted(one["id"] for one in before) == ["103275-1", "g8-1"]
    # What was over before is left out; a page that was poisoned until the reboot is not.
    after = objects(history, "explain", "--since", f"{DAY}15:00", "--until", "now")
    assert {one["id"]: one["state"] for one in after} == {"103275-1": "closed", "77-1": "unowned"}
    assert "rebooted_ts" in next(one for one in after if one["id"] == "103275-1")
    text = words(history, "explain", "--since", f"{DAY}15:00", "--until", "now")
    assert "and the host was rebooted since" in text


def test_explain_of_a_quiet_time(path: str) -> None:
    keep(path, [STORY[0]])
    shown = run(path, "explain", "--since", f"{DAY}14:00", "--until", f"{DAY}15:00")
    assert "No poisoned page was known in that time" in shown


def test_explain_a_recording_as_it_was() -> None:
    story = str(docs.STORY)
    shown = json.loads(invoke("explain", "--json", "--from", story, "--at", "15:53").stdout)
    assert [one["id"] for one in shown] == ["4f2311-1"]
    whole = json.loads(invoke("explain", "--json", "--from", story).stdout)
    assert len(whole) > 1
    text = invoke("explain", "--from", story, "--at", "15:53", "--utc").stdout
    assert "as of 2026-09-21 15:52" in text or "as of 2026-09-21 15:53" in text


# -- top


def test_top_as_it_was_and_of_a_time(history: str) -> None:
    shown = objects(history, "top", "--once", "--at", f"{DAY}14:13:22")
    assert {one["id"]: one["state"] for one in shown["incidents"]} == {
        "103275-1": "unowned",
        "g8-1": "delivered",
    }
    shown = objects(history, "top", "--once", "--since", f"{DAY}15:00")
    assert sorted(one["id"] for one in shown["incidents"]) == ["103275-1", "77-1"]
    assert {one["name"] for one in shown["vms"]} == {"db-1", "web-3"}
    assert "rebooted" in run(history, "top", "--once", "--since", f"{DAY}15:00")


def test_what_was_kept_is_played_like_a_recording(history: str) -> None:
    source = ArchivedSource(history)
    tape = RecordedTape(source)
    assert (tape.first, tape.last) == (T0, T0 + 7201 * SECOND)
    tape.seek_to(T0 + 30 * SECOND)
    assert [str(one.state) for one in tape.snapshot().incidents] == ["unowned", "delivered"]
    tape.step(1)
    assert tape.now() == T0 + 60 * SECOND
    tape.seek_to(T0 + 9999 * SECOND)
    assert tape.now() == tape.last
    with pytest.raises(UsageError, match="has nothing of 2026-"):
        tape.seek_to(T0 - SECOND)
    source.rewind()
    later = RecordedTape(source, since=T0 + 7000 * SECOND)
    assert later.first == T0 + 7190 * SECOND
    source.close()


# -- events


def test_events_of_a_time(history: str) -> None:
    lines = run(history, "events", "--since", f"{DAY}14:13:21", "--until", f"{DAY}14:13:22")
    assert [line.split()[1] for line in lines.splitlines()] == ["poison", "exit"]
    assert "web-1" in lines
    lines = run(history, "events", "--at", f"{DAY}14:14:20")
    assert "gone" in lines
    lines = run(history, "events", "--since", f"{DAY}15:00", "--until", "now")
    assert [line.split()[1] for line in lines.splitlines()] == ["reboot", "vm", "vm", "poison"]
    lines = run(
        history,
        "events",
        "--since",
        f"{DAY}14:00",
        "--until",
        "now",
        "--vm",
        "web-1",
        "--kind",
        "exit",
    )
    assert len(lines.splitlines()) == 1
    lines = run(history, "events", "--since", f"{DAY}14:00", "--until", "now", "--count", "2")
    assert len(lines.splitlines()) == 2


def test_events_of_a_vm_that_was_not_there(history: str) -> None:
    arguments = ["--since", f"{DAY}14:00", "--until", "now", "--vm", "nobody"]
    done = invoke("events", *arguments, "--history", history)
    assert done.exit_code == 2
    assert "no VM 'nobody' here" in done.stderr


@pytest.fixture
def serving(
    path: str, monkeypatch: pytest.MonkeyPatch
) -> Iterator[tuple[str, Session, FakeSource]]:
    """A serve that keeps what happens, after one that did."""
    monkeypatch.setattr(sources, "open_source", lambda kind: pytest.fail("attached"))
    keep(path, list(STORY))
    one = archive(path)
    past, first = one.begin()
    kernel = FakeSource([VmSeen(T0 + 100 * SECOND, 0, 4001, "web-1", None, "qemu")])
    session = Session(ResumedSource(kernel, past, one, lambda: T0 + 100 * SECOND, first))
    one.start()
    session.pump(0)
    with open_door(session):
        yield path, session, kernel
    session.close()


def _exit(second: int) -> Exit:
    return Exit(T0 + second * SECOND, 0, 0, 133, 39, True, 77, gfn=8)


def test_events_go_on_with_what_happens_each_once(
    serving: tuple[str, Session, FakeSource],
) -> None:
    path, session, kernel = serving
    kernel._batches.append([_exit(second) for second in range(101, 104)])
    session.pump(0)
    lines = run(path, "events", "--since", f"{DAY}14:13:21", "--kind", "exit", "--duration", "0.2")
    assert len(lines.splitlines()) == 2 + 3


def test_what_serve_could_not_keep_comes_from_its_memory(
    serving: tuple[str, Session, FakeSource], monkeypatch: pytest.MonkeyPatch
) -> None:
    path, session, kernel = serving
    monkeypatch.setattr(past_events, "_CATCH_UP_SECONDS", 0.05)
    kernel._batches.append([_exit(101)])
    session.pump(0)
    monkeypatch.setattr(Archive, "add", lambda *_: None)
    kernel._batches.append([_exit(102), _exit(103)])
    session.pump(0)
    lines = run(path, "events", "--since", f"{DAY}14:13:21", "--kind", "exit", "--duration", "0.2")
    assert len(lines.splitlines()) == 2 + 3


def test_events_without_what_was_kept_has_what_serve_remembers(
    serving: tuple[str, Session, FakeSource], tmp_path: Path
) -> None:
    done = invoke("events", "--since", f"{DAY}14:13:21", "--kind", "exit", "--duration", "0.1")
    assert len(done.stdout.splitlines()) == 2
    assert "nothing that was kept can be read: /var/lib/kvmtrace/history.db: " in done.stderr
    missing = str(tmp_path / "x.db")
    done = invoke("events", "--since", "1h", "--history", missing, "--duration", "0.1")
    assert done.exit_code == 1
    assert "No such file" in done.stderr


# -- wrong use


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["explain", "--at", "1h"], "No such file"),
        (["top", "--once", "--since", "1h"], "No such file"),
        (["events", "--at", "1h"], "No such file"),
        (["explain", "--until", "1h"], "--until needs --since"),
        (["explain", "--since", "1h", "--at", "1h"], "one is enough"),
        (["explain", "--since", "1h", "--until", "2h"], "--until is before --since"),
        (["explain", "--since", "1h", "--from", str(docs.STORY)], "not --from"),
        (["top", "--once", "--at", "yesterday"], "is no time"),
    ],
)
def test_wrong_use_is_one_line(arguments: list[str], said: str, tmp_path: Path) -> None:
    done = invoke(*arguments, "--history", str(tmp_path / "missing.db"))
    assert done.exit_code in (1, 2)
    assert said in done.stderr
    assert not done.stdout


def test_nothing_of_that_time(history: str) -> None:
    done = invoke("explain", "--at", "2020-01-01", "--history", history, "--utc")
    assert done.exit_code == 1
    assert "nothing was kept until 2020-01-01 00:00:00" in done.stderr
    assert "begins at 2026-09-21 14:13:20" in done.stderr


# -- who may read

_READ = """
import os, sys
os.setgroups([int(sys.argv[2])]); os.setgid(65534); os.setuid(65534)
from kvmtrace.session.archived import ArchivedSource
source = ArchivedSource(sys.argv[1])
print(len(source.poll(0)))
"""


@pytest.mark.skipif(os.geteuid() != 0, reason="needs to become another user")
@pytest.mark.parametrize("state", ["serving", "ended", "killed"])
def test_a_member_of_the_group_reads_it_without_root(
    state: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    group = 54321
    monkeypatch.setattr(archive_file, "_group", lambda: group)
    directory = Path("/tmp") / f"kvmtrace-test-{os.getpid()}-{state}"
    directory.mkdir(mode=0o750)
    os.chown(directory, -1, group)
    path = str(directory / "history.db")
    try:
        one = archive(path)
        one.begin()
        one.start()
        one.add(STORY)
        until(lambda: not one.waits)
        assert stat.S_IMODE(os.stat(path).st_mode) == 0o640
        if state == "killed":
            kept = [(path + end, Path(path + end).read_bytes()) for end in ("", "-wal", "-shm")]
            one.close()
            for name, content in kept:
                Path(name).write_bytes(content)
                os.chown(name, -1, group)
                os.chmod(name, 0o640)
        elif state == "ended":
            one.close()

        def read(of: int) -> subprocess.CompletedProcess[str]:
            command = [sys.executable, "-c", _READ, path, str(of)]
            return subprocess.run(command, capture_output=True, text=True, check=False)

        assert read(group).stdout == f"{len(STORY)}\n"
        assert "Permission denied" in read(group + 1).stderr
        one.close()
    finally:
        for left in directory.iterdir():
            left.unlink()
        directory.rmdir()
