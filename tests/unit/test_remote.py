"""Commands that connect to a running `kvmtrace serve` instead of attaching."""

from __future__ import annotations

import array
import fcntl
import json
import os
import termios
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest
from click.testing import Result

from kvmtrace import local_socket, sources
from kvmtrace.errors import KvmtraceError
from kvmtrace.events import Event, Exit, Sigbus, VmGone, VmSeen
from kvmtrace.session.session import Session
from kvmtrace.session.subscriber import Subscriber
from kvmtrace.sources import remote as joined_module
from kvmtrace.sources.codec import to_record
from kvmtrace.sources.remote import RemoteSource
from kvmtrace.views.web import stream
from tests.unit.command_line import invoke
from tests.unit.fake import PROBES, SECOND, T0, FakeSource
from tests.unit.serving import Answering, open_door
from tests.unit.test_explain import STORY
from tests.unit.waiting import until

LATER = T0 + 100 * SECOND


class Kernel(FakeSource):
    """A source whose events the test provides."""

    def __init__(self, *past: Event) -> None:
        super().__init__(past)
        self._said: list[Event] = []

    def say(self, *events: Event) -> None:
        self._said += events

    def poll(self, timeout: float) -> list[Event]:
        events = super().poll(timeout)
        said, self._said = self._said, []
        return events + said


class Serve:
    """A session whose feed is open."""

    def __init__(self) -> None:
        self.kernel = Kernel(*STORY)
        self.session = Session(self.kernel)
        self.session.pump(0)

    def say(self, *events: Event) -> None:
        self.kernel.say(*events)
        self.session.pump(0)

    @property
    def subscribers(self) -> int:
        return len(self.session._subscribers)


@pytest.fixture
def serve(monkeypatch: pytest.MonkeyPatch) -> Iterator[Serve]:
    monkeypatch.setattr(sources, "open_source", lambda kind: pytest.fail("attached"))
    serve = Serve()
    with open_door(serve.session):
        yield serve


def run(*arguments: str) -> Result:
    return invoke(*arguments)


def joined() -> RemoteSource:
    source = RemoteSource.connect()
    assert source is not None
    return source


def test_without_a_serve() -> None:
    assert RemoteSource.connect() is None


def test_events_read_together_with_the_mark_are_not_delayed(serve: Serve) -> None:
    source = joined()
    source.poll(0)
    news = Exit(LATER, 1, 0, 133, 39, True, 77, gfn=8)
    source._buffer += json.dumps(to_record(news)).encode() + b"\n"
    assert source.poll(0) == [news]
    source.close()


def test_the_backlog_comes_first(serve: Serve) -> None:
    source = joined()
    assert (source.name, source.why) == ("bpf", f"of kvmtrace serve, pid {os.getpid()}")
    past = source.poll(0)
    assert [event for event in STORY if not isinstance(event, VmSeen)] == [
        event for event in past if not isinstance(event, VmSeen)
    ]
    assert source.probes() == PROBES
    assert source.poll(0) == []
    news = Exit(LATER, 1, 0, 133, 39, True, 77, gfn=8, count=5)
    serve.say(news)
    assert source.poll(20) == [news]
    source.close()
    until(lambda: serve.subscribers == 0)


def test_a_last_poll_reads_all_that_was_sent(serve: Serve, monkeypatch: pytest.MonkeyPatch) -> None:
    source = joined()
    source.poll(0)
    monkeypatch.setattr(joined_module, "_READ", 512)
    serve.say(*(Exit(LATER + n, 1, n, 133, 39, True, n, gfn=n) for n in range(100)))
    waiting = array.array("i", [0])

    def sent() -> bool:
        fcntl.ioctl(source._client, termios.FIONREAD, waiting)
        return waiting[0] > 4096

    until(sent)
    assert len(source.poll(0)) > waiting[0] // 512
    source.close()


def test_an_end_of_the_serve_is_one_error() -> None:
    serve = Serve()
    with open_door(serve.session):
        source = joined()
        source.poll(0)
    with pytest.raises(KvmtraceError, match=rf"serve \(pid {os.getpid()}\) has ended"):
        source.poll(20)
    source.close()


def test_a_client_that_does_not_read_blocks_nobody_and_gets_exact_counts(serve: Serve) -> None:
    stuck, other = joined(), joined()
    stuck.poll(0)
    other.poll(0)
    for n in range(20_000):
        serve.say(Exit(LATER + n, 1, n % 3, 133, 39, True, 77, gfn=8, count=7))
        other.poll(0)
    seen: list[Event] = []
    while sum(event.count for event in seen if isinstance(event, Exit)) < 140_000:
        batch = stuck.poll(20)
        assert batch
        seen += batch
    assert sum(event.count for event in seen if isinstance(event, Exit)) == 140_000
    assert len(seen) < 20_000
    for source in (stuck, other):
        source.close()


def test_events_that_a_subscriber_has_no_room_for_are_counted() -> None:
    subscriber = Subscriber([], limit=100)
    subscriber.publish([VmSeen(T0, 1, 4001, "web-1"), VmGone(T0, 1)])
    subscriber.publish(Sigbus(T0 + n, 4001, n, 4, 0x7F0000000000) for n in range(1000))
    taken = subscriber.read(0)
    kept = sum(isinstance(event, Sigbus) for event in taken)
    assert 50 <= kept <= 100
    assert [vars_of(event) for event in taken[-1:]] == [("lost", "follower", 1000 - kept)]
    assert VmGone(T0, 1) in taken
    assert subscriber.read(0) == []


def vars_of(event: Event) -> tuple[object, ...]:
    return event.kind, getattr(event, "where", None), getattr(event, "count", None)


def test_clients_are_limited(serve: Serve, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(stream, "MAX_STREAMS", 2)
    first, second = joined(), joined()
    assert RemoteSource.connect() is None
    first.close()
    until(lambda: serve.subscribers == 1)
    joined().close()
    second.close()


def test_a_serve_of_a_stranger_is_not_trusted(
    serve: Serve, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(local_socket, "is_trusted_peer", lambda peer: False)
    assert RemoteSource.connect() is None
    assert serve.subscribers == 0


@pytest.mark.parametrize(
    "said",
    [
        "",
        "hello\n",
        "[]\n",
        "{}\n",
        "[" * 100_000 + "\n",
        '{"kvmtrace_recording":99,"name":"a","kernel":"b","source":"bpf"}\n',
        '{"kvmtrace_recording":true,"name":"a","kernel":"b","source":"bpf"}\n',
        '{"kvmtrace_recording":1,"name":"a","kernel":"b","source":"bpf"}\n{"kind":"poison"}\n',
        '{"kvmtrace_recording":1,"name":"a","kernel":"b","source":"bpf"}\n',
    ],
)
def test_an_incompatible_serve_is_ignored(said: str) -> None:
    answering = Answering(lambda client: client.file.write(said))
    try:
        assert RemoteSource.connect() is None
    finally:
        answering.close()


@pytest.mark.parametrize("said", ["hello", "[" * 100_000, '{"kind":"poison"}', '{"a":' * 100_000])
def test_a_malformed_event_is_one_error(said: str) -> None:
    header = (
        '{"kvmtrace_recording":1,"name":"a","kernel":"b","source":"bpf"}\n{"kind":"from_here_on"}\n'
    )
    answering = Answering(lambda client: client.file.write(f"{header}{said}\n"))
    try:
        source = joined()
        assert source.poll(0) == []
        with pytest.raises(KvmtraceError, match="sent what is no event"):
            source.poll(10)
        source.close()
    finally:
        answering.close()


def test_a_second_serve_reports_that_it_is_not_found(
    serve: Serve, capsys: pytest.CaptureFixture[str]
) -> None:
    with open_door(serve.session):
        assert "will not find this one" in capsys.readouterr().err
    assert RemoteSource.connect() is not None


# -- commands


def test_explain(serve: Serve, monkeypatch: pytest.MonkeyPatch) -> None:
    asked = run("explain", "web-1")
    answer, stamp, *story = asked.stdout.splitlines()
    assert answer.startswith("STOPPED  web-1 has been hit by a poisoned page")
    assert f"(bpf, serve, pid {os.getpid()})" in stamp
    assert f"bpf (of kvmtrace serve, pid {os.getpid()})" in asked.stderr
    monkeypatch.setattr(sources, "open_source", lambda kind: FakeSource(STORY))
    alone = run("explain", "web-1", "--source", "bpf", "--duration", "0.1")
    assert alone.stdout.splitlines()[0] == answer
    assert story[story.index("Do") :] == _from_do(alone.stdout)
    assert alone.stderr == ""


def _from_do(text: str) -> list[str]:
    """The lines of a screen of `explain` after the stamp."""
    lines = text.splitlines()
    return lines[lines.index("Do") :]


def test_top_once(serve: Serve) -> None:
    shown = json.loads(run("top", "--once", "--json", "--interval", "0.1").stdout)
    assert shown["host"]["source"] == "bpf"
    assert shown["host"]["source_why"] == f"of kvmtrace serve, pid {os.getpid()}"
    (vm,) = [vm for vm in shown["vms"] if vm["name"] == "web-1"]
    exact = serve.session.snapshot().vms[1]
    assert vm["exits"] == exact.exits_by_errno()
    assert vm["exits"]["EHWPOISON"] > 0
    assert [one["id"] for one in shown["incidents"]] == ["103275-1"]


def test_events_are_those_from_now_on(serve: Serve) -> None:
    def happen() -> None:
        until(lambda: serve.subscribers)
        serve.say(Exit(LATER, 1, 0, 133, 39, True, 77, gfn=8, count=5))

    happening = threading.Thread(target=happen)
    happening.start()
    result = run("events", "--json", "--count", "1")
    happening.join()
    lines = [json.loads(line) for line in result.stdout.splitlines()]
    assert [line["kind"] for line in lines] == ["vm", "vm", "exit"]
    assert (lines[2]["count"], lines[2]["incident"]) == (5, "103275-1")
    assert f"watching by bpf (of kvmtrace serve, pid {os.getpid()})" in result.stderr


def test_a_vm_that_ended_before_is_not_printed(serve: Serve) -> None:
    serve.say(VmGone(LATER, 1))
    result = run("events", "--json", "--duration", "0.3")
    assert [json.loads(line)["vm"]["name"] for line in result.stdout.splitlines()] == ["db-1"]


def test_record_has_the_backlog(serve: Serve, tmp_path: Path) -> None:
    file = tmp_path / "log.jsonl"
    assert run("record", str(file), "--duration", "0.3").exit_code == 0
    (told,) = json.loads(run("explain", "web-1", "--json", "--from", str(file)).stdout)
    (live,) = json.loads(run("explain", "web-1", "--json").stdout)
    # Its age is counted to the end of the recording.
    assert told.pop("answer") != live.pop("answer")
    assert told == live


def test_the_end_of_a_serve_is_one_line(monkeypatch: pytest.MonkeyPatch) -> None:
    serve = Serve()
    results: list[Result] = []
    listening = threading.Event()
    poll = RemoteSource.poll

    def polled(source: RemoteSource, timeout: float) -> list[Event]:
        listening.set()
        return poll(source, timeout)

    monkeypatch.setattr(RemoteSource, "poll", polled)
    with open_door(serve.session):
        watching = threading.Thread(target=lambda: results.append(run("events")))
        watching.start()
        # One that has not read all of the past yet would attach for itself instead.
        assert listening.wait(20)
    watching.join()
    (result,) = results
    assert result.exit_code == 1
    told = ("watching", "already here")
    said = [line for line in result.stderr.splitlines() if not any(one in line for one in told)]
    assert said[0] == f"kvmtrace: kvmtrace serve (pid {os.getpid()}) has ended"
    assert said[1].startswith("hint: ")
    assert len(said) == 2
