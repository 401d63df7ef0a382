"""The socket of a serve: where it is, who may connect, and stale or foreign files there."""

from __future__ import annotations

import contextlib
import grp
import os
import signal
import socket
import stat
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from kvmtrace import local_socket
from kvmtrace.sources.remote import RemoteSource
from kvmtrace.views.web import stream
from kvmtrace.views.web.stream import Client
from tests.unit.serving import Answering

NOBODY = 65534
needs_root = pytest.mark.skipif(os.geteuid() != 0, reason="acts as another user")


ASKED = b"GET /events HTTP/1.0\r\n\r\n"


def greet(client: Client) -> None:
    client.file.write("hello")


@pytest.fixture
def opened() -> Iterator[Answering]:
    answering = Answering(greet)
    yield answering
    answering.close()


def heard() -> bytes | None:
    """What a client is sent; None without a serve."""
    found = local_socket.connect()
    if found is None:
        return None
    client, pid = found
    with client:
        assert pid == os.getpid()
        return answer(client)


def answer(client: socket.socket) -> bytes:
    client.sendall(ASKED)
    text = b""
    while more := client.recv(1 << 16):
        text += more
    return text.partition(b"\r\n\r\n")[2]


def as_nobody(act: Callable[[], bool], *groups: int) -> bool:
    """What ``act`` returns in a process of another user, who is in ``groups`` only."""
    child = os.fork()
    if not child:
        code = 2
        try:
            os.setgroups(groups)
            os.setgid(NOBODY)
            os.setuid(NOBODY)
            code = 0 if act() else 1
        finally:
            os._exit(code)
    status = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
    assert status in (0, 1)
    return status == 0


def connects(path: str) -> bool:
    with socket.socket(socket.AF_UNIX) as client:
        client.settimeout(20)
        try:
            client.connect(path)
        except PermissionError:
            return False
        return True


def is_answered(path: str) -> bool:
    with socket.socket(socket.AF_UNIX) as client:
        client.settimeout(20)
        client.connect(path)
        return answer(client) == b"hello"


# -- where


def test_the_directory_is_made_for_its_owner_alone(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv(local_socket.VARIABLE, str(tmp_path / "new"))
    monkeypatch.setattr(local_socket, "GROUP", "no such group")
    answering = Answering(greet)
    assert stat.S_IMODE((tmp_path / "new").stat().st_mode) == 0o750
    assert answering.path == str(tmp_path / "new" / local_socket.NAME)
    assert stat.S_IMODE(os.stat(answering.path).st_mode) == 0o600
    assert heard() == b"hello"
    answering.close()
    assert not list((tmp_path / "new").iterdir())
    assert heard() is None


@needs_root
def test_directories_of_root_and_of_users(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv(local_socket.VARIABLE)
    monkeypatch.setenv("XDG_RUNTIME_DIR", "/run/user/65534")
    assert local_socket.directory() == "/run/kvmtrace"
    assert as_nobody(lambda: local_socket.directory() == "/run/user/65534/kvmtrace")
    monkeypatch.delenv("XDG_RUNTIME_DIR")

    def refused() -> bool:
        with pytest.raises(OSError, match="XDG_RUNTIME_DIR"):
            Answering(greet)
        return True

    assert as_nobody(refused)


def test_a_path_as_name(tmp_path: Path) -> None:
    answering = Answering(greet, str(tmp_path / "own"))
    found = local_socket.connect(str(tmp_path / "own"))
    assert found
    found[0].close()
    assert heard() is None
    answering.close()


@pytest.mark.parametrize("mode", [0o770, 0o757])
def test_a_directory_that_others_may_write_to_is_refused(own_directory: Path, mode: int) -> None:
    own_directory.chmod(mode)
    with pytest.raises(OSError, match="others may write"):
        Answering(greet)


@needs_root
def test_a_directory_of_another_user_is_refused(own_directory: Path) -> None:
    os.chown(own_directory, NOBODY, -1)
    with pytest.raises(OSError, match="another user"):
        Answering(greet)


def test_a_directory_behind_a_link_is_refused(
    own_directory: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (own_directory / "link").symlink_to(own_directory)
    monkeypatch.setenv(local_socket.VARIABLE, str(own_directory / "link"))
    with pytest.raises(OSError, match="Not a directory"):
        Answering(greet)


# -- other files of that name


LEAVE = """
import sys, time
from kvmtrace.linux.socket_file import SocketFile
left = SocketFile()
print("open", flush=True)
time.sleep(600)
"""


def test_the_socket_of_a_killed_serve_is_replaced(own_directory: Path) -> None:
    left = subprocess.Popen(
        [sys.executable, "-c", LEAVE], stdout=subprocess.PIPE, cwd=Path(__file__).parents[2]
    )
    assert left.stdout is not None
    assert left.stdout.readline() == b"open\n"
    with pytest.raises(OSError, match="another kvmtrace serve"):
        Answering(greet)
    left.send_signal(signal.SIGKILL)
    left.wait(20)
    left.stdout.close()
    assert (own_directory / local_socket.NAME).is_socket()
    assert heard() is None
    answering = Answering(greet)
    assert heard() == b"hello"
    answering.close()


def test_a_second_serve_does_not_replace_the_first(opened: Answering) -> None:
    with pytest.raises(OSError, match="another kvmtrace serve"):
        Answering(greet)
    assert heard() == b"hello"


@pytest.mark.parametrize("kind", ["file", "link", "directory"])
def test_another_kind_of_file_is_not_replaced(own_directory: Path, kind: str) -> None:
    there = own_directory / local_socket.NAME
    if kind == "file":
        there.write_text("precious")
    elif kind == "link":
        there.symlink_to(own_directory / "nowhere")
    else:
        there.mkdir()
    before = there.lstat()
    with pytest.raises(OSError, match="is not a socket"):
        Answering(greet)
    assert there.lstat() == before


def test_a_serve_that_ends_does_not_remove_another_ones_socket(opened: Answering) -> None:
    os.unlink(opened.path)
    other = Answering(greet)
    opened.close()
    assert heard() == b"hello"
    other.close()


def test_of_many_serves_that_start_at_once_one_listens(own_directory: Path) -> None:
    with socket.socket(socket.AF_UNIX) as left:
        left.bind(str(own_directory / local_socket.NAME))  # all of them find one that was left
    answering: list[Answering] = []
    start = threading.Barrier(8)

    def open_one() -> None:
        start.wait()
        with contextlib.suppress(OSError):
            answering.append(Answering(greet))

    threads = [threading.Thread(target=open_one) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(answering) == 1
    assert heard() == b"hello"
    answering[0].close()


# -- permissions


@needs_root
def test_another_user_does_not_get_in(opened: Answering, own_directory: Path) -> None:
    """By the directory. If that is open to everybody, the socket is not."""
    for path in (own_directory, *own_directory.parents):
        if path.stat().st_mode & 0o001:
            break
        path.chmod(path.stat().st_mode | 0o011)
    assert not as_nobody(lambda: connects(opened.path))
    os.chmod(own_directory, 0o755)
    assert not as_nobody(lambda: connects(opened.path))


@needs_root
def test_the_group_gets_in(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    group = next(one for one in grp.getgrall() if one.gr_gid not in (0, NOBODY))
    monkeypatch.setattr(local_socket, "GROUP", group.gr_name)
    monkeypatch.setenv(local_socket.VARIABLE, str(tmp_path / "new"))
    for path in (tmp_path, *tmp_path.parents):
        if path.stat().st_mode & 0o001:
            break
        path.chmod(path.stat().st_mode | 0o011)
    answering = Answering(greet)
    try:
        for there, mode in ((str(tmp_path / "new"), 0o750), (answering.path, 0o660)):
            found = os.stat(there)
            assert (found.st_uid, found.st_gid) == (0, group.gr_gid)
            assert stat.S_IMODE(found.st_mode) == mode
        assert as_nobody(lambda: is_answered(answering.path), group.gr_gid)
        assert as_nobody(lambda: local_socket.connect() is not None, group.gr_gid)
        assert not as_nobody(lambda: connects(answering.path))
    finally:
        answering.close()


@needs_root
def test_a_serve_of_another_user_is_not_trusted(own_directory: Path) -> None:
    there = own_directory / local_socket.NAME
    ready, done = socket.socketpair()
    child = os.fork()
    if not child:
        try:
            squatting = socket.socket(socket.AF_UNIX)
            squatting.bind(str(there))
            os.setgid(NOBODY)
            os.setuid(NOBODY)
            squatting.listen()
            done.sendall(b"x")
            signal.pause()
        finally:
            os._exit(0)
    with ready, done:
        assert ready.recv(1) == b"x"
    assert connects(str(there))
    assert local_socket.connect() is None
    os.kill(child, signal.SIGKILL)
    os.waitpid(child, 0)


def test_credentials_come_from_the_kernel() -> None:
    one, other = socket.socketpair(socket.AF_UNIX)
    with one, other:
        assert local_socket.credentials(one) == (os.getpid(), os.geteuid())


# -- crowds


def test_a_full_queue_is_waited_for(own_directory: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with socket.socket(socket.AF_UNIX) as listening, socket.socket(socket.AF_UNIX) as first:
        listening.bind(str(own_directory / local_socket.NAME))
        listening.listen(0)
        first.connect(str(own_directory / local_socket.NAME))
        tries = 0
        connect = socket.socket.connect

        class Counting(socket.socket):
            def connect(self, address: object) -> None:
                nonlocal tries
                tries += 1
                if tries == 3:
                    listening.accept()[0].close()  # room for one
                connect(self, address)  # type: ignore[arg-type]

        monkeypatch.setattr(socket, "socket", Counting)
        found = local_socket.connect()
        assert found is not None
        assert tries == 3
        found[0].close()


def test_many_clients_at_once_are_served() -> None:
    together = threading.Barrier(stream.MAX_STREAMS)

    def wait_for_all(client: Client) -> None:
        together.wait(20)
        client.file.write("hello")

    answering = Answering(wait_for_all)
    answers: list[bytes | None] = []
    threads = [
        threading.Thread(target=lambda: answers.append(heard())) for _ in range(stream.MAX_STREAMS)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    answering.close()
    assert answers == [b"hello"] * stream.MAX_STREAMS


def test_a_client_that_closed_does_not_count(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(stream, "MAX_STREAMS", 1)
    go = threading.Event()

    def greet_and_stay(client: Client) -> None:
        client.file.write("hello\n")
        client.file.flush()
        go.wait(20)

    answering = Answering(greet_and_stay)

    def heard_at_once() -> socket.socket:
        found = local_socket.connect()
        assert found is not None
        found[0].sendall(ASKED)
        with found[0].makefile("rb") as file:
            assert b"hello\n" in file
        return found[0]

    heard_at_once().close()
    heard_at_once().close()
    stays = heard_at_once()
    assert RemoteSource.connect() is None
    go.set()
    stays.close()
    answering.close()


def test_what_a_client_left_unread_is_dropped() -> None:
    """A file that still holds data writes them when it is collected: Python 3.13 prints a trace."""
    ours, theirs = socket.socketpair()
    client = Client(ours, bytes)
    client.file.write("x" * 200)
    theirs.close()
    ours.close()
    with pytest.raises(OSError, match="Bad file descriptor"):
        client.file.flush()
    client.drop()
    assert client.file.closed
