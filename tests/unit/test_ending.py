"""A signal ends a command whatever hangs, and what can be cleaned up is."""

from __future__ import annotations

import errno
import hashlib
import os
import signal
import subprocess
import sys
import threading
from pathlib import Path

import pytest

from kvmtrace import sources
from kvmtrace.events import Event, Lost
from kvmtrace.linux import task_stat
from kvmtrace.linux.thread_progress import Standstill
from kvmtrace.session import session as session_module
from kvmtrace.session.session import Session
from tests.unit.fake import STORY, FakeSource

HANGING = """
import hashlib, os, signal, sys, threading, time
from kvmtrace import cli, sources
from tests.unit.fake import STORY, FakeSource

def ignoring():
    while True:
        time.sleep(600)  # goes on after each signal, as a read of a pipe does

def computing():
    hashlib.pbkdf2_hmac("sha256", b"", b"", (1 << 31) - 1)

def deaf():
    # In this thread no handler runs: as if it hung in the kernel.
    signal.pthread_sigmask(signal.SIG_BLOCK, [signal.SIGTERM])
    ignoring()

class Source(FakeSource):
    def poll(self, timeout):
        if self.polls and {where!r} == "poll":
            os.write(2, b"hangs\\n")
            {how}()
        return super().poll(timeout)

    def close(self):
        os.write(2, b"closed\\n")
        if {where!r} == "close":
            {how}()

def opened(kind):
    if {where!r} == "open":
        os.write(2, b"hangs\\n")
        {how}()
    return Source(STORY)

signal.signal(signal.SIGHUP, signal.SIG_DFL)
sources.open_source = opened
cli.main()
"""


@pytest.mark.parametrize(
    ("command", "where", "how"),
    [
        (("serve", "--listen", "127.0.0.1:0"), "poll", "ignoring"),
        (("events",), "poll", "deaf"),
        (("record", "{file}"), "poll", "ignoring"),
        (("top", "--once", "--interval", "99"), "open", "ignoring"),
        (("bundle", "-o", "{file}", "--source", "bpf"), "poll", "deaf"),
        (("events",), "close", "ignoring"),
        (("serve", "--listen", "127.0.0.1:0"), "poll", "computing"),
        (("events",), "poll", "computing"),
        (("bundle", "-o", "{file}", "--source", "bpf"), "poll", "computing"),
        (("top", "--once", "--interval", "99"), "open", "computing"),
    ],
)
def test_a_signal_ends_what_hangs_or_computes(
    command: tuple[str, ...], where: str, how: str, tmp_path: Path, own_directory: Path
) -> None:
    file = tmp_path / "file"
    process = subprocess.Popen(
        [
            sys.executable,
            "-c",
            HANGING.format(where=where, how=how),
            *(word.format(file=file) for word in command),
        ],
        stdin=subprocess.DEVNULL,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
        text=True,
        cwd=Path(__file__).parents[2],
    )
    assert process.stderr is not None
    while where != "close" and process.stderr.readline() != "hangs\n":
        assert process.poll() is None
    if where == "close":
        process.stderr.readline()  # watching
    process.send_signal(signal.SIGTERM)
    _, stderr = process.communicate(timeout=30)
    assert process.returncode == 1
    output = stderr.splitlines()
    if command[0] == "serve":  # its main thread is free
        what = "is still at work" if how == "computing" else "hangs in the kernel"
        assert output[-2] == f"kvmtrace: the reader {what}, and was left there"
    else:
        what = "it was still at work" if how == "computing" else "something hangs in the kernel"
        assert output[-1] == f"kvmtrace: ended by force: {what}"
    assert ("closed" in output) == (where != "open")
    assert not list(own_directory.iterdir())
    if command[0] == "bundle":
        assert not list(tmp_path.iterdir())


def test_to_wait_for_a_cpu_is_no_work(monkeypatch: pytest.MonkeyPatch) -> None:
    """Found in the lab: on a busy host a recording lost its last counts to the ending by force."""
    ticks = os.sysconf("SC_CLK_TCK")
    shown = [("R", str(at), "0") for at in (7, 7, 7 + 2 * ticks)] + [("S",)]
    monkeypatch.setattr(task_stat, "read_state", lambda *_, **__: shown.pop(0))
    main = Standstill(threading.main_thread())
    computed = []
    while shown:
        main.seconds()
        computed.append(main.computed)
    assert computed == [0, 0, 2, 2]


class Computing(FakeSource):
    """A source whose poll is one long call of C."""

    def __init__(self) -> None:
        super().__init__(STORY)
        self.begun = threading.Event()
        self.closed_by: int | None = None
        self.polling = False

    def poll(self, timeout: float) -> list[Event]:
        self.polling = True
        self.begun.set()
        hashlib.pbkdf2_hmac("sha256", b"", b"", 4_000_000)
        self.polling = False
        return []

    def close(self) -> None:
        assert not self.polling
        self.closed_by = threading.get_ident()


def test_a_reader_that_computes_does_not_hang(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(session_module, "READER_SECONDS", 0.3)
    monkeypatch.setattr(session_module, "BUSY_SECONDS", 600.0)
    source = Computing()
    session = Session(source)
    session.start()
    source.begun.wait()
    assert session.close()
    assert source.closed_by == threading.get_ident()


def test_a_source_that_is_being_attached_is_detached_by_force(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    closed: list[bool] = []

    class Attaching(FakeSource):
        def __init__(self) -> None:
            self.half = True
            sources.close_opening()
            super().__init__(STORY)

        def close(self) -> None:
            closed.append(self.half)

    monkeypatch.setitem(sources._CLASSES, "bpf", (__name__, "Attaching"))
    monkeypatch.setattr(sys.modules[__name__], "Attaching", Attaching, raising=False)
    assert isinstance(sources._open("bpf"), Attaching)
    sources.close_opening()
    assert closed == [True]


# -- file descriptors that run out


class Short(FakeSource):
    """A source that finds no file descriptor in its first ``polls`` polls."""

    def __init__(self, polls: float) -> None:
        super().__init__(STORY)
        self._left = polls

    def poll(self, timeout: float) -> list[Event]:
        if self._left > 0:
            self._left -= 1
            raise OSError(errno.EMFILE, "Too many open files")
        return super().poll(timeout)


def test_a_shortage_of_descriptors_is_survived_and_counted() -> None:
    session = Session(Short(2))
    batches = [session.pump(0) for _ in range(3)]
    assert [[one.event.kind for one in batch] for batch in batches[:2]] == [["lost"], ["lost"]]
    assert isinstance(batches[0][0].event, Lost)
    assert len(batches[2]) == len(STORY)
    assert session.snapshot().lost == {"descriptors": 2}
    session.close()


def test_a_shortage_without_an_end_ends_the_reader(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(session_module, "SHORTAGE_SECONDS", -1.0)
    with pytest.raises(OSError, match="Too many open files"):
        Session(Short(float("inf"))).pump(0)
