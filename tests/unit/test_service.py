"""What a service manager and the journal get."""

from __future__ import annotations

import contextlib
import os
import socket
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest

from kvmtrace.cli.service import Service
from kvmtrace.events import VmSeen
from kvmtrace.linux import journal, service_manager
from kvmtrace.probes import ATTACHING_ANEW
from kvmtrace.session.session import Session
from tests.unit.fake import PROBES, T0, FakeSource


@pytest.fixture
def listening(tmp_path: Path) -> Iterator[socket.socket]:
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as ours:
        ours.bind(str(tmp_path / "socket"))
        ours.setblocking(False)
        yield ours


def test_states_are_sent_to_the_manager(
    listening: socket.socket, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("NOTIFY_SOCKET", listening.getsockname())
    assert service_manager.notify(READY="1", STATUS="watching\nREADY=0")
    assert listening.recv(4096) == b"READY=1\nSTATUS=watching READY=0"


def test_the_status_follows_the_probes(
    listening: socket.socket, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("NOTIFY_SOCKET", listening.getsockname())
    source = FakeSource([VmSeen(T0, 1, 100, "web-1")])
    session = Session(source)
    service = Service(session, "text")
    service.ready()
    assert b"probes 1 of 2 attached" in listening.recv(4096)
    attached = tuple(replace(probe, attached=True) for probe in PROBES)
    monkeypatch.setattr(source, "probes", lambda: attached)
    session.pump(0)
    service.look()
    assert listening.recv(4096).startswith(b"STATUS=watching by bpf (a test), probes 2 of 2")


@pytest.mark.parametrize(
    ("unread", "why", "alive"),
    [(9, None, True), (11, None, False), (179, ATTACHING_ANEW, True), (181, ATTACHING_ANEW, False)],
)
def test_the_watchdog_waits_for_what_is_attached_anew(
    listening: socket.socket,
    monkeypatch: pytest.MonkeyPatch,
    unread: int,
    why: str | None,
    alive: bool,
) -> None:
    monkeypatch.setenv("NOTIFY_SOCKET", listening.getsockname())
    monkeypatch.setenv("WATCHDOG_USEC", "30000000")
    monkeypatch.setenv("WATCHDOG_PID", str(os.getpid()))
    source = FakeSource([])
    session = Session(source)
    service = Service(session, "text")
    monkeypatch.setattr(source, "probes", lambda: [replace(one, why=why) for one in PROBES])
    monkeypatch.setattr(session, "age", lambda: unread)
    service.look()
    received = b""
    with contextlib.suppress(BlockingIOError):
        received = listening.recv(4096)
    assert received == (b"WATCHDOG=1" if alive else b"")


def test_without_a_manager_nothing_is_sent(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("NOTIFY_SOCKET", raising=False)
    assert not service_manager.notify(READY="1")
    for address in ("", "relative", str(tmp_path / "nobody"), "/" + "x" * 200):
        monkeypatch.setenv("NOTIFY_SOCKET", address)
        assert not service_manager.notify(READY="1")


def test_a_manager_that_does_not_read_stops_nobody(
    listening: socket.socket, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("NOTIFY_SOCKET", listening.getsockname())
    assert not all(service_manager.notify(WATCHDOG="1") for _ in range(10_000))


@pytest.mark.parametrize(
    ("usec", "pid", "seconds"),
    [
        ("30000000", None, 15.0),
        ("30000000", "1", None),
        ("0", None, None),
        ("soon", None, None),
        (None, None, None),
    ],
)
def test_how_often_the_manager_asks(
    usec: str | None, pid: str | None, seconds: float | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name, value in (("WATCHDOG_USEC", usec), ("WATCHDOG_PID", pid)):
        monkeypatch.delenv(name, raising=False)
        if value is not None:
            monkeypatch.setenv(name, value)
    assert service_manager.watchdog_seconds() == seconds


def test_an_entry_of_the_journal_holds_what_it_was_given(listening: socket.socket) -> None:
    hostile = "web\nPRIORITY=0\nMESSAGE=all is well"
    assert journal.send({"MESSAGE": "looping", "VM_NAME": hostile}, listening.getsockname())
    assert _fields(listening.recv(65536)) == {
        "SYSLOG_IDENTIFIER": "kvmtrace",
        "MESSAGE": "looping",
        "VM_NAME": hostile,
    }


def _fields(entry: bytes) -> dict[str, str]:
    """As journald reads them (systemd, journald-native.c): NAME, length, value."""
    found = {}
    while entry:
        name, _, rest = entry.partition(b"\n")
        size = int.from_bytes(rest[:8], "little")
        found[name.decode()] = rest[8 : 8 + size].decode()
        assert rest[8 + size : 9 + size] == b"\n"
        entry = rest[9 + size :]
    return found


def test_a_journal_that_does_not_read_stops_nobody(listening: socket.socket) -> None:
    sent = [journal.send({"MESSAGE": "x"}, listening.getsockname()) for _ in range(10_000)]
    assert not all(sent)
    assert not journal.send({"MESSAGE": "x"}, listening.getsockname() + "-gone")


def test_the_journal_is_recognized_by_device_and_inode(monkeypatch: pytest.MonkeyPatch) -> None:
    read, write = os.pipe()
    try:
        found = os.fstat(write)
        monkeypatch.setenv("JOURNAL_STREAM", f"{found.st_dev}:{found.st_ino}")
        assert journal.is_stream(write)
        monkeypatch.setenv("JOURNAL_STREAM", "1:2")
        assert not journal.is_stream(write)
        monkeypatch.delenv("JOURNAL_STREAM")
        assert not journal.is_stream(write)
    finally:
        os.close(read)
        os.close(write)
    assert not journal.is_stream(write)
