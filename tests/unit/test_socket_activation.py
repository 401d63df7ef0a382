"""Sockets that the service manager passes: taken in place of the serve's own, and left in place."""

from __future__ import annotations

import http.client
import os
import re
import signal
import socket
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from kvmtrace import local_socket
from kvmtrace.cli.doors import Doors
from kvmtrace.errors import UsageError
from kvmtrace.linux import service_manager
from kvmtrace.sources.remote import RemoteSource
from tests.unit.fake import STORY

ROOT = Path(__file__).parents[2]

# As systemd starts it: descriptors from 3 on, and the pid that they are for.
START = """
import os, sys
ours = [int(one) for one in sys.argv[1].split(",")]
kept = [os.dup(one) for one in ours]
for number, one in enumerate(kept):
    os.dup2(one, 3 + number)
    os.set_inheritable(3 + number, True)
os.environ |= {"LISTEN_PID": str(os.getpid()), "LISTEN_FDS": str(len(ours))}
os.execv(sys.executable, [sys.executable, *sys.argv[2:]])
"""
FAKE = ("-m", "tests.unit.fake_host")
# A serve that has much to read before it knows what was.
SLOW = """
import time
from kvmtrace import cli, sources
from tests.unit.fake import STORY, FakeSource

class Slow(FakeSource):
    def poll(self, timeout):
        time.sleep(1)
        return super().poll(timeout)

sources.open_source = lambda kind: Slow(STORY)
cli.main()
"""


def listening(family: socket.AddressFamily, address: object) -> socket.socket:
    one = socket.socket(family)
    one.bind(address)  # type: ignore[arg-type]
    one.listen()
    return one


def start(
    passed: list[socket.socket], *options: str, program: tuple[str, ...] = FAKE
) -> subprocess.Popen[str]:
    numbers = [one.fileno() for one in passed]
    command = [sys.executable, "-c", START, ",".join(map(str, numbers)), *program, "serve"]
    return subprocess.Popen(
        [*command, "--source", "bpf", *options],
        stderr=subprocess.PIPE,
        text=True,
        cwd=ROOT,
        pass_fds=numbers,
    )


@pytest.mark.parametrize("kinds", ["both", "tcp", "unix"])
def test_what_is_passed_is_used(own_directory: Path, kinds: str) -> None:
    path = own_directory / local_socket.NAME
    unix = listening(socket.AF_UNIX, str(path))
    tcp = listening(socket.AF_INET, ("127.0.0.1", 0))
    passed = {"both": [tcp, unix], "tcp": [tcp], "unix": [unix]}[kinds]
    options = ("--listen", "127.0.0.1:0") if kinds == "unix" else ()
    if kinds == "tcp":
        unix.close()
        path.unlink()
    with start(passed, *options) as serve:
        try:
            assert serve.stderr is not None
            found = (re.search(r"http://(\S+):(\d+)/metrics", line) for line in serve.stderr)
            where = next(match for match in found if match)
            port = tcp.getsockname()[1]
            assert (int(where[2]) == port) == (kinds != "unix")
            connection = http.client.HTTPConnection(where[1], int(where[2]), timeout=20)
            connection.request("GET", "/-/healthy")
            assert connection.getresponse().status == 200
            connection.close()
            if kinds != "tcp":
                with socket.socket(socket.AF_UNIX) as client:
                    client.connect(str(path))
                    client.sendall(b"GET /-/ready HTTP/1.0\r\n\r\n")
                    assert client.recv(100).split()[1] == b"200"
            source = RemoteSource.connect()
            assert source is not None
            # Who made the socket is another process.
            assert source.pid == serve.pid
            assert source.why == f"of kvmtrace serve, pid {serve.pid}"
            source.close()
        finally:
            serve.send_signal(signal.SIGTERM)
            serve.communicate(timeout=60)
    assert serve.returncode == 0
    # The manager's own socket stays for the next one.
    assert path.exists() == (kinds != "tcp")
    for one in (tcp, unix):
        one.close()


def test_a_client_waits_for_the_service_that_it_starts(
    own_directory: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It connects before there is a serve, whose start takes longer than an answer may."""
    monkeypatch.setattr(local_socket, "TIMEOUT", 0.5)
    monkeypatch.setattr(local_socket, "MANAGER", os.getpid())
    with (
        listening(socket.AF_UNIX, str(own_directory / local_socket.NAME)) as unix,
        ThreadPoolExecutor() as threads,
    ):
        connecting = threads.submit(RemoteSource.connect)
        with pytest.raises(TimeoutError):
            connecting.result(1)
        with start([unix], "--listen", "127.0.0.1:0") as serve:
            source = connecting.result(60)
            assert source is not None
            assert source.pid == serve.pid
            source.close()
            serve.send_signal(signal.SIGTERM)
            serve.communicate(timeout=60)


def test_a_client_that_waited_is_answered_with_what_was(own_directory: Path) -> None:
    with (
        listening(socket.AF_UNIX, str(own_directory / local_socket.NAME)) as unix,
        start([unix], "--listen", "127.0.0.1:0", program=("-c", SLOW)) as serve,
    ):
        source = RemoteSource.connect()
        serve.send_signal(signal.SIGTERM)
        assert source is not None
        backlog = source.poll(0)
        source.close()
        serve.communicate(timeout=60)
        assert set(STORY) <= set(backlog)


def test_a_port_by_two_ways_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    with socket.create_server(("127.0.0.1", 0)) as passed:
        monkeypatch.setattr(service_manager, "passed_sockets", lambda: [passed])
        with pytest.raises(UsageError, match="passed a TCP socket"):
            Doors("127.0.0.1:0")
        assert Doors(None).listen is None


@pytest.mark.parametrize(
    ("pid", "count"), [("1", "1"), (None, "x"), (None, ""), (None, "-1"), (None, "0")]
)
def test_what_is_for_others_is_left_alone(
    monkeypatch: pytest.MonkeyPatch, pid: str | None, count: str
) -> None:
    monkeypatch.setenv("LISTEN_PID", pid or str(os.getpid()))
    monkeypatch.setenv("LISTEN_FDS", count)
    assert service_manager.passed_sockets() == []
    assert "LISTEN_FDS" not in os.environ  # nor do children take it for theirs
