"""Reads of other processes that hang, fail or kill their worker: kvmtrace continues."""

from __future__ import annotations

import os
import signal
import struct
import subprocess
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from kvmtrace.enrich import page_tables
from kvmtrace.linux import proc_reader
from kvmtrace.linux.pagemap import PAGE
from kvmtrace.linux.proc_reader import ProcReader, Starting, Unreadable

ANON = 0x4080000002099558  # pfn 0x104caa, as in test_owners.py


@pytest.fixture
def reader(monkeypatch: pytest.MonkeyPatch) -> Iterator[ProcReader]:
    monkeypatch.setattr(proc_reader, "TIMEOUT", 0.2)
    monkeypatch.setattr(proc_reader, "STALL_SECONDS", 0.2)
    one = ProcReader()
    one.call(1, os.getpid)  # it has started
    yield one
    one.close()


def forget_hangs(reader: ProcReader) -> None:
    reader._hung.clear()
    reader._waits.clear()


def test_a_read_happens_in_another_process(reader: ProcReader) -> None:
    assert reader.call(1, os.getpid) not in (os.getpid(), None)
    assert reader.call(1, os.getpid) == reader.call(1, os.getpid)  # and the same one again


def test_the_first_worker_of_all_is_waited_for() -> None:
    """Otherwise the search for the owner of an early poison would find nothing."""
    reader = ProcReader()
    stream = reader.stream(time.monotonic() - 1, iter, (1, 2))
    assert stream.next(time.monotonic() + 60)[0] or stream.done
    stream.close()
    reader.close()


def test_at_the_end_nobody_waits_for_a_worker(reader: ProcReader) -> None:
    stream = reader.stream(time.monotonic() + 60, map, time.sleep, (0, 3600))
    assert stream.next(time.monotonic() + 60) == (True, None)
    with reader.ending():
        with pytest.raises(Unreadable, match="has ended"):
            stream.next(time.monotonic() + 3600)
        with pytest.raises(Unreadable, match="is ending"):
            reader.call(8, os.getpid)
    assert _called(reader, 8)


def test_a_read_that_hangs_is_given_up_and_others_go_on(reader: ProcReader) -> None:
    with pytest.raises(Unreadable, match="/proc/7 did not answer in time"):
        reader.call(7, time.sleep, 3600)
    assert reader.hangs == 1
    with pytest.raises(Unreadable):  # without waiting again
        reader.call(7, os.getpid)
    assert reader.hangs == 1
    assert _called(reader, 8)


def _called(reader: ProcReader, pid: int) -> int:
    """A worker may still be starting when it is first used."""
    while True:
        try:
            return int(reader.call(pid, os.getpid))
        except Unreadable as error:
            if "starting" not in str(error):
                raise


def test_a_process_that_hung_is_tried_again_later(monkeypatch: pytest.MonkeyPatch) -> None:
    now = 1000.0
    reader = ProcReader(lambda: now)
    monkeypatch.setattr(proc_reader, "TIMEOUT", 0.2)
    with pytest.raises(Unreadable):
        reader.call(7, time.sleep, 3600)
    now += proc_reader.RETRY_SECONDS - 1
    with pytest.raises(Unreadable):
        reader.call(7, os.getpid)
    now += 2
    assert _called(reader, 7)
    reader.close()


def test_what_is_waited_in_vain_is_bounded_for_all(
    reader: ProcReader, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(proc_reader, "WAIT_SECONDS", 0.3)
    for pid in range(100):
        with pytest.raises(Unreadable):
            reader.call(pid, time.sleep, 3600)
    assert sum(seconds for _, seconds in reader._waits) < 1
    assert reader.hangs < 20


def test_an_exception_costs_one_read(reader: ProcReader) -> None:
    with pytest.raises(Unreadable, match="ValueError"):
        reader.call(7, int, "seven")
    assert reader.call(7, int, "7") == 7


def test_a_worker_that_was_killed_is_replaced(reader: ProcReader) -> None:
    os.kill(reader.call(1, os.getpid), signal.SIGKILL)
    with pytest.raises(Unreadable):
        reader.call(1, time.sleep, 3600)
    assert _called(reader, 1)


def test_workers_are_bounded(reader: ProcReader, monkeypatch: pytest.MonkeyPatch) -> None:
    """Even if SIGKILL does not end them, because a FUSE server holds the request."""
    monkeypatch.setattr(subprocess.Popen, "poll", lambda process: None)
    monkeypatch.setattr(proc_reader, "MAX_WORKERS", 3)
    said: list[str] = []
    for pid in range(1000):
        with pytest.raises(Unreadable) as caught:
            reader.call(pid, time.sleep, 3600)
        forget_hangs(reader)
        if not isinstance(caught.value, Starting):  # a new worker may take a while
            said.append(str(caught.value))
        if len(said) == 10:
            break
    assert said[-1] == "3 reads of other processes hang for good"
    assert reader.hangs == 3


# -- searches


LOW_MAPS = b"00010000-00020000 rw-p 00000000 00:00 0 \n"


def process(tmp_path: Path, pid: int, maps: bytes = LOW_MAPS) -> None:
    """A process whose page at 0x13000 is poisoned."""
    directory = tmp_path / str(pid)
    directory.mkdir()
    (directory / "maps").write_bytes(maps)
    with (directory / "pagemap").open("wb") as file:
        file.seek(0x13000 // PAGE * 8)
        file.write(struct.pack("=Q", ANON))
        file.truncate(0x20000 // PAGE * 8)


def test_a_process_that_hangs_costs_its_own_owners_only(tmp_path: Path, reader: ProcReader) -> None:
    for pid in (7, 9):
        process(tmp_path, pid)
    (tmp_path / "8").mkdir()
    os.mkfifo(tmp_path / "8/pagemap")  # opening it waits for a writer
    search = page_tables.PageTableSearch([0x104CAA], [7, 8, 9], str(tmp_path), reader=reader)
    deadline = time.monotonic() + 60
    found = []
    while not search.done and time.monotonic() < deadline:
        found += search.step(time.monotonic() + 0.05)
    assert [place.pid for place in found] == [7, 9]
    assert search.skipped == {8}


def test_waits_in_vain_for_others_are_no_reason_not_to_search(
    tmp_path: Path, reader: ProcReader
) -> None:
    process(tmp_path, 7)
    reader._waits.append((time.monotonic(), 2 * proc_reader.WAIT_SECONDS))
    search = page_tables.PageTableSearch([0x104CAA], [7], str(tmp_path), reader=reader)
    assert [place.pid for place in search.step(time.monotonic() + 60)] == [7]
    assert search.skipped == set()


SHARED_MAPS = b"00010000-00020000 rw-s 00000000 00:01 1029 /memfd:guest (deleted)\n"


def test_a_process_that_hangs_hides_no_mapping_of_those_before_it(
    tmp_path: Path, reader: ProcReader
) -> None:
    """The last process has the page; process 7 maps the same file but has not touched it."""
    for pid in (7, 9):
        process(tmp_path, pid, SHARED_MAPS)
    with (tmp_path / "7/pagemap").open("r+b") as file:
        file.write(bytes(0x20000 // PAGE * 8))
    (tmp_path / "8").mkdir()
    os.mkfifo(tmp_path / "8/pagemap")
    search = page_tables.PageTableSearch([0x104CAA], [7, 8, 9], str(tmp_path), reader=reader)
    deadline = time.monotonic() + 60
    found = []
    while not search.done and time.monotonic() < deadline:
        found += search.step(time.monotonic() + 0.05)
    assert {(place.pid, place.via) for place in found} == {(9, "pagemap"), (7, "mapping")}
    assert search.skipped == {8}


def test_a_ready_worker_is_taken_before_one_that_starts(reader: ProcReader) -> None:
    reader._idle.append(reader._spawn() or pytest.fail("no worker"))
    first = reader.call(1, os.getpid)
    assert reader.call(1, os.getpid) == first


@pytest.mark.parametrize(
    "name",
    [
        *(b"a\rb", b"a\x0bb", b"a\x0cb", b"a\x1cb", b"a\xc2\x85b", b"a\xe2\x80\xa8b", b"\xff"),
        b"x\r0-7ffffffff000 rw-s 00000000 00:01 369 y",
        b"x\xe2\x80\xa900010000-00020000 rw-p 00000000 00:00 0",
    ],
)
def test_names_of_files_make_no_areas(tmp_path: Path, reader: ProcReader, name: bytes) -> None:
    """In maps the kernel escapes newlines only."""
    evil = b"00030000-00031000 rw-s 00000000 00:01 1029 /memfd:" + name + b" (deleted)\n"
    process(tmp_path, 7, evil + b"no line of maps\n" + LOW_MAPS)
    search = page_tables.PageTableSearch([0x104CAA], [7], str(tmp_path), reader=reader)
    assert [place.hva for place in search.step(time.monotonic() + 60)] == [0x13000]
