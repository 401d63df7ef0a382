"""A crowd that idles, dawdles or sends too much blocks no scrape: plain, over TLS, locally."""

from __future__ import annotations

import contextlib
import http.client
import os
import resource
import socket
import ssl
from collections.abc import Iterator
from pathlib import Path

import pytest

from kvmtrace import local_socket
from kvmtrace.cli.doors import Doors, open_server
from kvmtrace.session.session import Session
from kvmtrace.views.web import server as server_module
from kvmtrace.views.web.server import Server
from tests.unit.certificates import Certificates
from tests.unit.fake import STORY, FakeSource
from tests.unit.waiting import until

IDLE = 1000
DAWDLING = (b"G", b"GET /metrics HTTP/1.1\r\nHost: localhost\r\nX: ")
GIANT = b"GET /" + b"x" * 100_000


@pytest.fixture(autouse=True)
def descriptors() -> Iterator[None]:
    """Both ends of all connections are ours."""
    before = resource.getrlimit(resource.RLIMIT_NOFILE)
    if before[1] < 4 * IDLE:
        pytest.skip("too few descriptors here")
    resource.setrlimit(resource.RLIMIT_NOFILE, (4 * IDLE, before[1]))
    yield
    resource.setrlimit(resource.RLIMIT_NOFILE, before)


@pytest.fixture(params=["plain", "tls"])
def server(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[Server]:
    config: Path | None = None
    if request.param == "tls":
        Certificates(tmp_path)
        config = tmp_path / "web.yml"
        config.write_text("tls_server_config: {cert_file: server.pem, key_file: server.key}")
    session = Session(FakeSource(STORY))
    session.pump(0)
    with open_server(session, Doors("127.0.0.1:0", str(config) if config else None)) as (server, _):
        yield server
    session.close()


def trusting_anyone() -> ssl.SSLContext:
    context = ssl.create_default_context()
    context.check_hostname, context.verify_mode = False, ssl.CERT_NONE
    return context


def scrape(server: Server) -> int:
    """As Prometheus does, within its default time."""
    if server.url.startswith("https"):
        connection: http.client.HTTPConnection = http.client.HTTPSConnection(
            *server.address, timeout=10, context=trusting_anyone()
        )
    else:
        connection = http.client.HTTPConnection(*server.address, timeout=10)
    with contextlib.closing(connection):
        connection.request("GET", "/metrics")
        answer = connection.getresponse()
        assert b"kvmtrace_build_info" in answer.read()
        return answer.status


def ask_locally() -> int:
    with socket.socket(socket.AF_UNIX) as client:
        client.connect(os.path.join(local_socket.directory(), local_socket.NAME))
        client.settimeout(10)
        client.sendall(b"GET /metrics HTTP/1.0\r\n\r\n")
        return int(client.makefile("rb").readline().split()[1])


def test_a_crowd_on_tcp(server: Server) -> None:
    """With TLS these are handshakes left open, and bytes that are none."""
    with contextlib.ExitStack() as ending:
        crowd = []
        for number in range(IDLE):
            one = ending.enter_context(socket.create_connection(server.address, timeout=20))
            crowd.append(one)
            with contextlib.suppress(OSError):  # it was closed for a newer one
                if number % 2:
                    one.sendall(DAWDLING[number % 4 // 2])
                elif number % 10 == 0:
                    one.setblocking(False)
                    one.send(GIANT)
        assert [scrape(server) for _ in range(3)] == [200] * 3
        assert ask_locally() == 200
        # Those who dawdle go on, and a scrape is still answered.
        for one in crowd:
            one.setblocking(False)
            with contextlib.suppress(OSError):
                one.send(b"a")
        assert scrape(server) == 200
        assert len(server._clients) <= 2 * server_module.MAX_CLIENTS
        assert server.dropped["crowded"] > IDLE / 2


def test_handshakes_left_open_are_closed(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(server_module, "HEAD_SECONDS", 1.0)
    Certificates(tmp_path)
    config = tmp_path / "web.yml"
    config.write_text("tls_server_config: {cert_file: server.pem, key_file: server.key}")
    session = Session(FakeSource(STORY))
    with open_server(session, Doors("127.0.0.1:0", str(config))) as (server, _):
        with socket.create_connection(server.address, timeout=20) as idle:
            assert idle.recv(1) == b""
        until(lambda: not server._clients)
        assert server.dropped["deadline"] == 1
        with (
            socket.create_connection(server.address, timeout=20) as plain,
            trusting_anyone().wrap_socket(plain, suppress_ragged_eofs=True) as idle,
        ):
            assert idle.recv(1) == b""
        until(lambda: not server._clients)
        assert server.dropped["deadline"] == 2
    session.close()


def test_a_crowd_on_the_local_socket(server: Server) -> None:
    """As a member of the group could be."""
    path = os.path.join(local_socket.directory(), local_socket.NAME)
    with contextlib.ExitStack() as ending:
        for number in range(IDLE):
            one = ending.enter_context(socket.socket(socket.AF_UNIX))
            one.connect(path)  # waits for room in the queue
            with contextlib.suppress(OSError):
                one.sendall(DAWDLING[number % 2])
        assert ask_locally() == 200
        assert scrape(server) == 200


def test_nothing_of_the_log_on_tcp(server: Server) -> None:
    tcp, local = server.listeners
    assert set(local.routes) - set(tcp.routes) == {"/events", "/snapshot", "/explain"}
    assert set(tcp.routes) < set(local.routes)
