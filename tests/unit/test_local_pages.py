"""What the Unix socket of a serve answers, asked by curl, as root and as a member of the group."""

from __future__ import annotations

import contextlib
import functools
import grp
import http.client
import json
import os
import shutil
import socket
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest

from kvmtrace import local_socket
from kvmtrace.errors import KvmtraceError
from kvmtrace.events import Exit
from kvmtrace.sources.recording import BACKLOG_END
from kvmtrace.views.web import stream
from tests.unit.command_line import invoke, refuse
from tests.unit.serving import open_door
from tests.unit.test_feed import NOBODY, as_nobody
from tests.unit.test_remote import LATER, Serve
from tests.unit.waiting import until

ROOT = Path(__file__).parents[2]
needs_curl = pytest.mark.skipif(
    shutil.which("curl") is None and os.environ.get("CI") != "true", reason="no curl here"
)


@pytest.fixture
def serve() -> Iterator[Serve]:
    serve = Serve()
    with open_door(serve.session):
        yield serve


def path() -> str:
    return os.path.join(local_socket.directory(), local_socket.NAME)


class Local(http.client.HTTPConnection):
    """A connection to the socket, for HTTP/1.1."""

    def connect(self) -> None:
        self.sock = socket.socket(socket.AF_UNIX)
        self.sock.settimeout(20)
        self.sock.connect(path())


def ask(target: str, method: str = "GET") -> tuple[int, str, str]:
    """(status, Content-Type, body)."""
    connection = Local("localhost")
    with contextlib.closing(connection):
        connection.request(method, target)
        response = connection.getresponse()
        return response.status, response.getheader("Content-Type", ""), response.read().decode()


@needs_curl
@pytest.mark.parametrize(
    ("target", "has"),
    [
        ("/metrics", "kvmtrace_build_info{"),
        ("/", "<html"),
        ("/incident/103275-1", "103275-1"),
        ("/-/healthy", "kvmtrace is healthy\n"),
        ("/-/ready", "kvmtrace is ready\n"),
        ("/snapshot", '"incidents"'),
        ("/explain", "STOPPED  web-1 has been hit by a poisoned page"),
        ("/explain?target=103275-1&format=json", '"id": "103275-1"'),
    ],
)
def test_curl_reads_every_page(serve: Serve, target: str, has: str) -> None:
    serve.session.pump(0)
    asked = ["curl", "-sS", "--fail", "--max-time", "20", "--unix-socket", path()]
    done = subprocess.run(
        [*asked, f"http://localhost{target}"], capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    assert has in done.stdout


@needs_curl
def test_curl_follows_the_events(serve: Serve) -> None:
    asked = ["curl", "-sSN", "--max-time", "60", "--unix-socket", path()]
    with subprocess.Popen(
        [*asked, "http://localhost/events"], stdout=subprocess.PIPE, text=True
    ) as curl:
        try:
            assert curl.stdout is not None
            lines = (json.loads(line) for line in curl.stdout)
            assert next(lines)["kvmtrace_recording"] == 1
            before = []
            while (line := next(lines))["kind"] != BACKLOG_END:
                before.append(line["kind"])
            assert "poison" in before
            serve.say(Exit(LATER, 1, 0, 133, 39, True, 77, gfn=8, count=5))
            assert next(lines)["count"] == 5
        finally:
            curl.kill()
    until(lambda: serve.subscribers == 0)


def test_snapshot_and_explain_are_those_of_the_commands(serve: Serve) -> None:
    status, kind, body = ask("/snapshot")
    assert (status, kind) == (200, "application/json; charset=utf-8")
    shown = json.loads(invoke("top", "--once", "--json", "--interval", "0.1").stdout)
    assert json.loads(body)["incidents"] == shown["incidents"]
    told = json.loads(ask("/explain?target=web-1&format=json")[2])
    (live,) = json.loads(invoke("explain", "web-1", "--json").stdout)
    for one in (told[0], live):
        del one["answer"]  # has an age
    assert told == [live]
    text = ask("/explain?target=web-1&evidence=1")[2]
    assert text.splitlines()[0] in invoke("explain", "web-1", "--evidence").stdout
    assert len(text) > len(ask("/explain?target=web-1")[2])


def test_what_nobody_knows_is_one_line_and_a_hint(serve: Serve) -> None:
    status, _, body = ask("/explain?target=no-such-vm")
    assert status == 404
    assert body.splitlines()[1].startswith("hint: ")
    assert ask("/explain?target=%00%ff&format=xml")[0] == 404
    assert ask("/events", "HEAD")[::2] == (200, "")
    assert ask("/events", "POST")[0] == 405
    assert ask("/events/x")[0] == 404


def test_a_source_that_ended(serve: Serve) -> None:
    serve.session.failure = RuntimeError("gone")
    for target in ("/-/ready", "/-/healthy", "/snapshot", "/explain", "/"):
        status, _, body = ask(target)
        assert (status, "gone" in body) == (503, True)
    assert ask("/metrics")[0] == 200


def test_streams_leave_room_for_questions(serve: Serve) -> None:
    """Clients that follow keep no others out, and a further one is refused."""
    followers = []
    for _ in range(stream.MAX_STREAMS):
        follower = Local("localhost")
        follower.request("GET", "/events")
        response = follower.getresponse()
        assert response.status == 200
        followers.append(response)  # has the connection
    assert ask("/events")[0] == 503
    assert ask("/-/healthy")[0] == 200
    for one in followers:
        one.close()
    until(lambda: serve.subscribers == 0)


@pytest.mark.skipif(os.geteuid() != 0, reason="acts as another user")
def test_a_member_of_the_group_needs_no_root(monkeypatch: pytest.MonkeyPatch) -> None:
    """Each command that asks a serve, by a process of nobody in the group."""
    group = next(one for one in grp.getgrall() if one.gr_gid not in (0, NOBODY))
    monkeypatch.setattr(local_socket, "GROUP", group.gr_name)
    refuse(monkeypatch, KvmtraceError("attached"))
    serve = Serve()
    # pytest takes its own directories from other users each time that it starts.
    with tempfile.TemporaryDirectory() as own:
        os.chmod(own, 0o711)
        os.mkdir(f"{own}/out")
        os.chown(f"{own}/out", NOBODY, NOBODY)
        monkeypatch.setenv(local_socket.VARIABLE, f"{own}/run")
        commands = {
            "top --once --json --interval 0.1": 0,
            "events --json --duration 0.1": 0,
            "explain web-1": 0,
            f"bundle -o {own}/out/case.tar.gz": 0,
            "check": 2,
        }
        with open_door(serve.session):
            for command, status in commands.items():
                works = functools.partial(_works, command, status)
                assert works()  # loads modules that nobody may not read everywhere
                Path(own, "out/case.tar.gz").unlink(missing_ok=True)
                assert as_nobody(works, group.gr_gid)
        assert not as_nobody(functools.partial(_works, "explain web-1", 0))


def _works(command: str, status: int) -> bool:
    done = invoke(*command.split())
    print(command, done.exit_code, done.output, file=sys.stderr)
    return done.exit_code == status and ("web-1" in done.output or "bundle" in command)


def test_what_is_sent_is_a_recording(serve: Serve, tmp_path: Path) -> None:
    connection = Local("localhost")
    connection.request("GET", "/events")
    response = connection.getresponse()
    lines = []
    while b'"from_here_on"' not in (line := response.readline()):
        lines.append(line)
    connection.close()
    recording = tmp_path / "followed.jsonl"
    recording.write_bytes(b"".join(lines))
    assert "web-1" in invoke("explain", "web-1", "--from", str(recording)).stdout
