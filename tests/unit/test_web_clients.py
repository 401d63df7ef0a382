"""The HTTP server with clients that are slow, many, or talk nonsense."""

from __future__ import annotations

import contextlib
import errno
import resource
import select
import socket
from collections.abc import Hashable
from http import HTTPStatus

import pytest

from kvmtrace.views.web import answers
from kvmtrace.views.web import server as server_module
from kvmtrace.views.web.answers import Answer
from kvmtrace.views.web.server import Server
from tests.exporter_scenario import Scenario
from tests.unit import serving
from tests.unit.waiting import until
from tests.unit.web_client import ask, connect, is_open


@pytest.mark.parametrize("sent", [b"", b"GET /metrics HTTP/1.0\r\nX: "])
def test_a_client_that_does_not_come_to_the_point_is_let_go_quietly(
    monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str], sent: bytes
) -> None:
    """However often it sends a little more."""
    monkeypatch.setattr(server_module, "HEAD_SECONDS", 0.3)
    server = serving.serve("127.0.0.1:0", Scenario())
    try:
        with connect(server) as slow:
            slow.sendall(sent)
            while is_open(slow):
                if sent:
                    with contextlib.suppress(ConnectionError):
                        slow.sendall(b"a")
                select.select([slow], [], [], 0.02)
        assert server.dropped["deadline"] == 1
    finally:
        server.close()
    assert capfd.readouterr().err == ""


def test_a_client_that_does_not_read_is_let_go(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(server_module, "ANSWER_SECONDS", 0.3)
    big = b"x" * (64 << 20)  # more than any socket's buffers
    server = serving.start("127.0.0.1:0", {"/": lambda headers: Answer(HTTPStatus.OK, big)})
    try:
        with connect(server) as stuck:
            stuck.sendall(b"GET / HTTP/1.0\r\n\r\n")
            until(lambda: server.dropped["deadline"])
    finally:
        server.close()


def test_the_oldest_idle_client_makes_room_for_one_who_asks(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(server_module, "MAX_CLIENTS", 8)
    server = serving.serve("127.0.0.1:0", Scenario())
    idle = [connect(server) for _ in range(20)]
    try:
        until(lambda: server.dropped["crowded"] == 16)
        assert idle[0].recv(1) == b""
        assert ask(server, "/metrics")[0].status == 200
        assert [is_open(one) for one in idle] == [False] * 17 + [True] * 3
    finally:
        server.close()
        for one in idle:
            one.close()


def test_one_peer_does_not_take_the_places_of_another(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(server_module, "MAX_CLIENTS", 8)
    server = serving.serve("127.0.0.1:0", Scenario())
    try:
        with connect(server) as patient:
            greedy = [connect(server, "127.0.0.2") for _ in range(20)]
            until(lambda: server.dropped["crowded"] == 16)
            assert is_open(patient)
            patient.sendall(b"GET /-/healthy HTTP/1.0\r\n\r\n")
            assert patient.recv(1 << 16).startswith(b"HTTP/1.1 200 OK\r\n")
            for one in greedy:
                one.close()
    finally:
        server.close()


def test_connections_leave_descriptors_to_the_reader(monkeypatch: pytest.MonkeyPatch) -> None:
    limits = {resource.RLIMIT_NOFILE: (40, 40)}
    monkeypatch.setattr(resource, "getrlimit", limits.__getitem__)
    server = serving.serve("127.0.0.1:0", Scenario())
    idle = [connect(server) for _ in range(30)]
    try:
        until(lambda: server.dropped["crowded"] == 25)
        assert sum(map(is_open, idle)) == 5
    finally:
        server.close()
        for one in idle:
            one.close()


def test_no_descriptor_for_a_connection_is_survived_and_counted(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    server = serving.serve("127.0.0.1:0", Scenario())
    try:
        with connect(server) as idle:
            until(lambda: server._clients)
            (listener,) = server.listeners

            class Short:
                """The listening socket, with nothing left for the next connection."""

                def __init__(self, listening: socket.socket) -> None:
                    self._listening = listening
                    self.fileno = listening.fileno
                    self.close = listening.close

                def accept(self) -> tuple[socket.socket, object]:
                    monkeypatch.setattr(listener, "listening", self._listening)
                    raise OSError(errno.EMFILE, "Too many open files")

            monkeypatch.setattr(listener, "listening", Short(listener.listening))
            response, body = ask(server, "/metrics")
            assert response.status == 200
            assert b'kvmtrace_http_connections_dropped_total{why="descriptors"} 1.0' in body
            assert idle.recv(1) == b""  # its descriptor was needed
    finally:
        server.close()


@pytest.mark.parametrize(
    ("sent", "status"),
    [
        (b"GET / HTTP/1.0\r\n" + b"X: " + b"a" * 9000, 431),
        (b"GET / HTTP/1.0\r\n" + b"X: a\r\n" * 3000 + b"\r\n", 431),
        (b"hello\r\n\r\n", 400),
        (b"\r\n\r\n", 400),
        (b"\xff\x00 \xff \xff\r\n:\r\n\r\n", 400),
        (
            b"POST / HTTP/1.1\r\nHost: localhost\r\nContent-Length: 100000\r\n\r\n"
            + b"a" * 100_000,
            405,
        ),
        (b"GET / HTTP/1.0\n\n", 200),
        (b"GET / HTTP/1.1\r\n\r\n", 400),  # without a Host
    ],
)
def test_requests_that_are_none(server: Server, sent: bytes, status: int) -> None:
    with connect(server) as client:
        with contextlib.suppress(ConnectionError):
            client.sendall(sent)
        answer = b""
        while more := client.recv(1 << 16):
            answer += more
    assert answer.startswith(b"HTTP/1.1 %d " % status)


@pytest.mark.parametrize(
    "accept",
    [
        "application/openmetrics-text; version=x",
        "application/openmetrics-text;version=9.9.9,text/plain",
        ";;=,=;,",
        "*/*",
    ],
)
def test_what_to_accept_is_read_with_patience(
    server: Server, capfd: pytest.CaptureFixture[str], accept: str
) -> None:
    response, body = ask(server, "/metrics", Accept=accept)
    assert (response.status, response.getheader("Content-Type", "")[:10]) == (200, "text/plain")
    assert b"kvmtrace_build_info" in body
    assert capfd.readouterr().err == ""


def test_an_answer_that_fails_is_one_line(capfd: pytest.CaptureFixture[str]) -> None:
    def broken(variant: Hashable) -> Answer:
        raise ZeroDivisionError

    server = serving.start("127.0.0.1:0", {"/": answers.Shared(broken)})
    try:
        response, body = ask(server, "/")
    finally:
        server.close()
    assert (response.status, body) == (500, b"internal error: ZeroDivisionError\n")
    assert capfd.readouterr().err == ""
