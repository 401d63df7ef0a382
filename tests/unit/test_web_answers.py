"""Answers of the HTTP server: made once for all who ask, and never at the reader's cost."""

from __future__ import annotations

import threading
from collections.abc import Hashable, Iterator
from http import HTTPStatus

import pytest

from kvmtrace.model import Snapshot
from kvmtrace.views.web import answers, pages
from kvmtrace.views.web import server as server_module
from kvmtrace.views.web.answers import Answer
from kvmtrace.views.web.server import Server
from tests.unit import serving
from tests.unit.waiting import until
from tests.unit.web_client import Beating, ask, connect


def test_one_snapshot_serves_all(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(pages, "SNAPSHOT_SECONDS", 3600)
    monkeypatch.setattr(answers, "MAX_KEEP_SECONDS", 0)
    session = Beating()
    server = serving.serve("127.0.0.1:0", session)
    paths = ["/metrics", "/"] * 8
    statuses: list[int] = []
    try:
        threads = [
            threading.Thread(target=lambda path=path: statuses.append(ask(server, path)[0].status))
            for path in paths
        ]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        monkeypatch.setattr(pages, "SNAPSHOT_SECONDS", 0)
        assert statuses == [200] * len(paths)
        assert session.snapshots == 1
        ask(server, "/")
        assert session.snapshots == 2
    finally:
        server.close()


def test_one_answer_serves_all() -> None:
    made = 0
    called, go = threading.Event(), threading.Event()

    def make(variant: Hashable) -> Answer:
        nonlocal made
        made += 1
        called.set()
        go.wait(20)
        return answers.text(HTTPStatus.OK, str(made))

    server = serving.start("127.0.0.1:0", {"/": answers.Shared(make)})
    bodies: list[bytes] = []
    try:
        threads = [
            threading.Thread(target=lambda: bodies.append(ask(server, "/")[1])) for _ in range(8)
        ]
        for thread in threads:
            thread.start()
        assert called.wait(20)
        until(lambda: [one.stage for one in server._clients] == [server_module._ANSWERING] * 8)
        go.set()
        for thread in threads:
            thread.join()
    finally:
        server.close()
    assert bodies == [b"1"] * 8


class Made:
    """What makes the answers of a tree: it counts, and waits for ``go``."""

    def __init__(self) -> None:
        self.names: list[str] = []
        self.at_once = 0
        self.most_at_once = 0
        self.go = threading.Event()

    def __call__(self, name: str) -> Answer:
        self.names.append(name)
        self.at_once += 1
        self.most_at_once = max(self.most_at_once, self.at_once)
        self.go.wait(20)
        self.at_once -= 1
        if name == "broken":
            raise ZeroDivisionError
        return answers.text(HTTPStatus.OK, f"this is {name}")


@pytest.fixture
def tree() -> Iterator[tuple[Server, Made]]:
    made = Made()
    running = serving.start("127.0.0.1:0", {"/a/": answers.Tree(made)})
    yield running, made
    made.go.set()
    running.close()


def test_a_tree_answers_for_what_is_directly_below_it(tree: tuple[Server, Made]) -> None:
    running, made = tree
    made.go.set()
    assert ask(running, "/a/one?x=2")[1] == b"this is one"
    assert ask(running, "/a/")[1] == b"this is "
    response, body = ask(running, "/a/broken")
    assert (response.status, body) == (500, b"internal error: ZeroDivisionError\n")
    for path in ("/a", "/a/b/c", "/b/one", "/", "a/one"):
        assert ask(running, path)[0].status == 404
    response, body = ask(running, "/a/one", "HEAD")
    assert (response.status, body) == (200, b"")
    assert ask(running, "/a/one", "POST")[0].status == 405


def test_names_are_answered_one_at_a_time_and_not_without_end(tree: tuple[Server, Made]) -> None:
    running, made = tree
    room = answers.WAITING_NAMES
    bodies: list[bytes] = []

    def client(name: str) -> None:
        bodies.append(ask(running, f"/a/{name}")[1])

    # Each name is asked for twice, and made once.
    threads = [threading.Thread(target=client, args=(str(n % room),)) for n in range(2 * room)]
    for thread in threads:
        thread.start()
    until(lambda: [one.stage for one in running._clients] == [server_module._ANSWERING] * 2 * room)
    response, body = ask(running, "/a/more")
    assert (response.status, body) == (503, b"busy: try again in some seconds\n")
    made.go.set()
    for thread in threads:
        thread.join()
    assert sorted(bodies) == sorted(2 * [b"this is %d" % n for n in range(room)])
    assert sorted(made.names) == [str(n) for n in range(room)]
    assert made.most_at_once == 1
    assert ask(running, "/a/more")[1] == b"this is more"


def test_few_answers_are_kept(tree: tuple[Server, Made]) -> None:
    running, made = tree
    made.go.set()
    route = running.listeners[0].routes["/a/"]
    assert isinstance(route, answers.Tree)
    for number in range(3 * answers.KEPT_NAMES):
        assert ask(running, f"/a/{number}")[0].status == 200
    assert len(route._kept) == answers.KEPT_NAMES
    assert not route._waiting


def test_many_names_take_no_more_of_the_readers_time_than_one(
    tree: tuple[Server, Made], monkeypatch: pytest.MonkeyPatch
) -> None:
    """After an answer, none is made for fifty times as long as it took."""
    running, made = tree
    made.go.set()
    route = running.listeners[0].routes["/a/"]
    assert isinstance(route, answers.Tree)
    monkeypatch.setattr(answers, "_made", lambda make, name: (make(name), 3600.0))
    monkeypatch.setattr(answers, "MAX_KEEP_SECONDS", 3600.0)
    assert ask(running, "/a/one")[1] == b"this is one"
    with connect(running) as second:
        second.sendall(b"GET /a/two HTTP/1.0\r\n\r\n")
        until(lambda: "two" in route._waiting)
        assert ask(running, "/a/one")[1] == b"this is one"
        assert made.names == ["one"]


def test_a_client_that_leaves_does_not_keep_others_waiting(tree: tuple[Server, Made]) -> None:
    running, made = tree
    with connect(running) as gone:
        gone.sendall(b"GET /a/one HTTP/1.0\r\n\r\n")
        until(lambda: made.names)
    made.go.set()
    assert ask(running, "/a/two")[1] == b"this is two"


def test_health_is_the_heartbeat_and_nothing_else(monkeypatch: pytest.MonkeyPatch) -> None:
    """While everything else that answers is stuck."""
    session = Beating()
    go = threading.Event()

    def stuck() -> Snapshot:
        go.wait(20)
        return Snapshot()

    monkeypatch.setattr(session, "snapshot", stuck)
    server = serving.serve("127.0.0.1:0", session)
    try:
        with connect(server) as scraper:
            scraper.sendall(b"GET /metrics HTTP/1.0\r\n\r\n")
            until(lambda: [one.stage for one in server._clients] == [server_module._ANSWERING])
            assert ask(server, "/-/healthy")[0].status == 200
            session._age = pages.STALE_SECONDS + 2.4
            response, body = ask(server, "/-/healthy")
            assert response.status == 503
            assert body == b"not healthy: the source was last read 7 s ago\n"
            go.set()
            assert scraper.recv(1 << 16).startswith(b"HTTP/1.1 200")
        response, body = ask(server, "/")
        assert response.status == 503
        assert b"last read 7 s ago" in body
    finally:
        go.set()
        server.close()
