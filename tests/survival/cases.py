"""Mishaps of the disk and the host: each done to a real file, and what was there afterwards."""

from __future__ import annotations

import contextlib
import random
import shutil
import signal
import sqlite3
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from unittest import mock

from kvmtrace.correlate import Correlator
from kvmtrace.events import Event, Exit, Found, Reboot, VmGone, VmSeen
from kvmtrace.model import IncidentStatus
from kvmtrace.session import archive as archives
from kvmtrace.session import archive_file
from kvmtrace.session.archive import Archive
from tests.survival.writer import BATCH, HOST, event

HOUR = 3600 * 1_000_000_000


@dataclass(frozen=True)
class Outcome:
    """What became of the events of one case. ``counted``: as lost, by serve itself."""

    happened: int
    kept: int
    counted: int
    said: str
    is_whole: bool = True

    @property
    def missing(self) -> int:
        """Events that are neither kept nor counted."""
        return self.happened - self.kept - self.counted


def kept(path: str) -> list[Event]:
    """All that is kept, in order, without what only joins runs."""
    database = archive_file.reading(path)
    try:
        return [one for _, _, one in archive_file.events_of(database)]
    finally:
        database.close()


def is_whole(path: str) -> bool:
    """Whether SQLite finds the file without a fault."""
    with sqlite3.connect(path) as database:
        (verdict,) = database.execute("PRAGMA integrity_check").fetchone()
    database.close()
    return bool(verdict == "ok")


def is_beginning(events: list[Event]) -> bool:
    """Whether it is the first events of the writer, without a gap."""
    numbers = [(one.gpa or 0) >> 12 for one in events if isinstance(one, Exit)]
    return numbers == list(range(1, len(numbers) + 1))


def _writer(path: str, *more: str, **options: object) -> subprocess.Popen[str]:
    command = [sys.executable, "-m", "tests.survival.writer", path, *more]
    return subprocess.Popen(  # type: ignore[call-overload, no-any-return]
        command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, **options
    )


def _again(path: str) -> list[str]:
    """What the next serve says when it goes on with the file."""
    said: list[str] = []
    one = Archive(path, HOST, said.append)
    one.begin()
    one.start()
    one.close()
    return said


def killed(directory: Path, seconds: float) -> Outcome:
    """``kill -9`` so many seconds after the first events."""
    path = str(directory / "history.db")
    with _writer(path) as process:
        assert process.stdout is not None
        lines = [process.stdout.readline()]
        deadline = time.monotonic() + seconds
        while time.monotonic() < deadline:
            lines.append(process.stdout.readline())
        process.send_signal(signal.SIGKILL)
        # A line may be cut off.
        lines += [line for line in process.stdout if line.endswith("\n")]
    happened, written = map(int, lines[-1].split())
    said = _again(path)
    found = kept(path)
    assert is_beginning(found)
    assert len(found) >= written, "what was on the disk is missing"
    return Outcome(happened, min(len(found), happened), 0, said[0], is_whole(path))


def power_cut(directory: Path, rng: random.Random, *, is_torn: bool) -> Outcome:
    """The log is cut off at any place after what was synced, or its last pages are torn.

    What fsync has returned for is on the disk: each commit is synced. So the copy has all of the
    log up to a commit, and of what came after it any part, of which pages may be garbage.
    """
    path, cut = str(directory / "history.db"), str(directory / "cut.db")
    wal = Path(path + "-wal")
    one = Archive(path, HOST, print)
    one.begin()
    with mock.patch.object(archives, "_EVERY", 0.001):
        one.start()
        batches = rng.randrange(3, 12)
        for number in range(batches):
            one.add(event(number * BATCH + more, time.time_ns()) for more in range(BATCH))
            while one.waits:
                time.sleep(0.001)
        synced = wal.stat().st_size
        one.add(event(batches * BATCH + more, time.time_ns()) for more in range(BATCH))
        while one.waits:
            time.sleep(0.001)
    shutil.copy(path, cut)
    log = bytearray(wal.read_bytes())
    end = rng.randrange(synced, len(log) + 1)
    if is_torn:
        first = rng.randrange(synced, len(log))
        log[first:] = rng.randbytes(len(log) - first)
    else:
        log = log[:end]
    Path(cut + "-wal").write_bytes(bytes(log))
    one.close()
    said = _again(cut)
    found = kept(cut)
    assert is_beginning(found)
    assert len(found) >= batches * BATCH, "what was synced is missing"
    return Outcome((batches + 1) * BATCH, len(found), 0, said[0], is_whole(cut))


def _wait(one: Archive, is_so: Callable[[], bool]) -> None:
    deadline = time.monotonic() + 60
    while not is_so():
        if time.monotonic() > deadline:
            raise AssertionError(f"waited for a minute: {one.state()}")
        time.sleep(0.005)


def _refused(path: str, said: list[str], end: Callable[[], None], more: int) -> Outcome:
    """Events while the disk takes none, ``more`` of them than there is room for; then it does."""
    one = Archive(path, HOST, said.append)
    with mock.patch.object(archives, "_EVERY", 0.01), mock.patch.object(archives, "QUEUE", 1000):
        one.start()
        one.add(event(number, time.time_ns()) for number in range(1000 + more))
        _wait(one, lambda: one.state().errors > 0)
        assert not one.state().is_written
        end()
        _wait(one, lambda: one.state().is_written and not one.waits)
        one.close()
    found = kept(path)
    assert is_beginning(found)
    assert one.state().dropped["no_room"] == more
    return Outcome(1000 + more, len(found), one.take_lost(), said[-1], is_whole(path))


@contextlib.contextmanager
def _mounted(directory: Path) -> Iterator[Path]:
    """A file system of 1 MiB; needs root."""
    directory.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", "size=1m,mode=755", "tmpfs", str(directory)]
    subprocess.run(mount, check=True)
    try:
        yield directory
    finally:
        subprocess.run(["umount", "-l", str(directory)], check=True)


def disk_full(directory: Path) -> Outcome:
    """Another file has filled up the file system; then it is removed."""
    with _mounted(directory / "full") as mount:
        path, other = str(mount / "history.db"), mount / "other"
        _again(path)
        with other.open("wb", buffering=0) as file, contextlib.suppress(OSError):
            while True:
                file.write(bytes(4096))
        said: list[str] = []
        outcome = _refused(path, said, other.unlink, 7)
    return replace(outcome, said=said[0])


def read_only(directory: Path) -> Outcome:
    """The file system is mounted read-only, and then writable again."""
    with _mounted(directory / "read-only") as mount:
        path = str(mount / "history.db")
        _again(path)

        def remount(how: str) -> None:
            subprocess.run(["mount", "-o", f"remount,{how}", str(mount)], check=True)

        remount("ro")
        said: list[str] = []
        outcome = _refused(path, said, lambda: remount("rw"), 7)
    return replace(outcome, said=said[0])


def damaged(directory: Path, rng: random.Random) -> Outcome:
    """Pages in the middle of the file are garbage."""
    path = str(directory / "history.db")
    subprocess.run(
        [sys.executable, "-m", "tests.survival.writer", path, "5000"],
        stdout=subprocess.DEVNULL,
        check=True,
    )
    content = bytearray(Path(path).read_bytes())
    # The root of the table of events, without which none is found, and some pages.
    for page in (3, *rng.sample(range(4, len(content) >> 12), 5)):
        content[page << 12 : (page + 1) << 12] = rng.randbytes(4096)
    Path(path).write_bytes(bytes(content))
    said: list[str] = []
    one = Archive(path, HOST, said.append)
    one.begin()
    one.start()
    one.add(event(number, time.time_ns()) for number in range(100))
    one.close()
    aside = said[0].rpartition(" ")[2]
    assert Path(aside).read_bytes() == bytes(content), "the file aside is another one"
    return Outcome(5000 + 100, len(kept(path)), 0, said[0], is_whole(path))


def stepped(directory: Path, step: int) -> Outcome:
    """The wall clock is stepped by so many nanoseconds between two events."""
    path = str(directory / "history.db")
    now = time.time_ns()
    wall = [now]
    one = Archive(path, HOST, print, wall=lambda: wall[0], now=lambda: now)
    one.begin()
    one.start()
    one.add(event(number, now) for number in range(100))
    wall[0] += step
    one.add(event(100 + number, now) for number in range(100))
    one.close()
    found = kept(path)
    assert is_beginning(found)
    difference = found[100].ts - found[99].ts
    assert difference == step, difference
    return Outcome(200, len(found), 0, "", is_whole(path))


def restarted_under_readers(directory: Path, events: int = 2000) -> Outcome:
    """Three serves, one of them killed half-way, while two threads read."""
    path = str(directory / "history.db")
    _again(path)
    stop = threading.Event()
    failures: list[BaseException] = []
    reads = [0]

    def read() -> None:
        try:
            while not stop.is_set():
                kept(path)
                reads[0] += 1
        except BaseException as failure:
            failures.append(failure)

    readers = [threading.Thread(target=read) for _ in range(2)]
    for reader in readers:
        reader.start()
    happened = 0
    try:
        for is_killed in (False, True, False):
            with _writer(path, str(events)) as process:
                assert process.stdout is not None
                for line in process.stdout:
                    if line.startswith("lost"):
                        break
                    count = int(line.split()[0])
                    if is_killed and count >= events // 2:
                        process.send_signal(signal.SIGKILL)
                        break
                happened += count
    finally:
        stop.set()
        for reader in readers:
            reader.join()
    if failures:
        raise failures[0]
    assert reads[0] > 2
    found = kept(path)
    # The killed one may have kept more than it had printed.
    return Outcome(happened, min(len(found), happened), 0, "", is_whole(path))


def rebooted(directory: Path) -> Outcome:
    """Another boot id: a page that was poisoned is history."""
    path = str(directory / "history.db")
    with mock.patch.object(archive_file, "boot_id", return_value="first"):
        one = Archive(path, HOST, print)
        one.begin()
        one.start()
        one.add([event(0, time.time_ns()), Found(time.time_ns(), 0x1234)])
        one.close()
    with mock.patch.object(archive_file, "boot_id", return_value="second"):
        past, _ = Archive(path, HOST, print).begin()
    assert [type(one) for one in past] == [VmSeen, Found, Reboot, VmGone]
    correlator = Correlator()
    for one_event in past:
        correlator.feed(one_event)
    (incident,) = correlator.snapshot().incidents
    assert incident.state == IncidentStatus.CLOSED
    return Outcome(2, len(kept(path)), 0, "", is_whole(path))
