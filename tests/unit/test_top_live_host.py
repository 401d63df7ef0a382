"""The live `top`: shown while probes are attached, and followed over restarts of a serve."""

from __future__ import annotations

import json
import os
import sys
import tarfile
import tempfile
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest

from kvmtrace import sources
from kvmtrace.cli import live_host, output_file
from kvmtrace.cli.bundle import write_bundle
from kvmtrace.cli.inputs import RecordedLog
from kvmtrace.cli.live_host import Watching
from kvmtrace.cli.signals import stop
from kvmtrace.errors import KvmtraceError
from kvmtrace.events import VmSeen
from kvmtrace.sources.recording import RecordingSource
from kvmtrace.views import terminal
from tests import docs
from tests.unit.command_line import invoke
from tests.unit.fake import FakeSource
from tests.unit.serving import open_door
from tests.unit.test_explain import STORY
from tests.unit.test_remote import LATER, Serve
from tests.unit.waiting import until


@pytest.fixture(autouse=True)
def soon(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(live_host, "_RETRY_SECONDS", 0.05)


@pytest.fixture
def follow() -> Iterator[Watching]:
    watching = Watching("auto")
    yield watching
    watching.close()
    assert not stop.hung


def ids(watching: Watching) -> list[str]:
    snapshot = watching.snapshot()
    return [] if snapshot is None else [one.id for one in snapshot.incidents]


def test_without_its_library_it_is_one_line(monkeypatch: pytest.MonkeyPatch) -> None:
    """Debian 12 has none, or one that is too old."""
    monkeypatch.setattr(sys.modules["kvmtrace.cli.top"], "on_terminal", lambda: True)
    monkeypatch.delitem(sys.modules, "kvmtrace.views.terminal.app", raising=False)
    monkeypatch.delattr(terminal, "app", raising=False)
    monkeypatch.setitem(sys.modules, "textual", None)
    result = invoke("top")
    assert result.exit_code == 1
    first, hint = result.stderr.splitlines()
    assert first.startswith("kvmtrace: the live table needs textual 1.0 or newer: ")
    assert "`kvmtrace top --once`" in hint


def test_what_is_being_attached_is_shown(monkeypatch: pytest.MonkeyPatch) -> None:
    may_open = threading.Event()
    opened = FakeSource(STORY)

    def open_source(kind: str) -> FakeSource:
        assert may_open.wait(20)
        return opened

    monkeypatch.setattr(sources, "open_source", open_source)
    watching = Watching("bpf")
    watching.start()
    assert watching.snapshot() is None
    assert watching.status().startswith("attaching ")
    assert watching.status().endswith(" probes by eBPF … 0 s")
    may_open.set()
    until(lambda: watching.snapshot() is not None)
    assert ids(watching) == ["103275-1"]
    assert watching.status() == ""
    assert watching.recent()
    watching.close()
    assert opened.closed


def test_what_cannot_be_attached_is_raised(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(kind: str) -> FakeSource:
        raise KvmtraceError("tracing the kernel needs root", "run it with sudo")

    monkeypatch.setattr(sources, "open_source", refuse)
    watching = Watching("bpf")
    watching.start()
    with pytest.raises(KvmtraceError, match="needs root"):
        until(lambda: watching.snapshot() is not None)
    watching.close()


def test_a_source_that_fails_is_raised(monkeypatch: pytest.MonkeyPatch) -> None:
    failing = FakeSource(STORY, failure=KvmtraceError("the ring is gone"))
    monkeypatch.setattr(sources, "open_source", lambda kind: failing)
    watching = Watching("bpf")
    watching.start()
    with pytest.raises(KvmtraceError, match="the ring is gone"):
        until(lambda: watching.snapshot() and False)
    watching.close()
    assert failing.closed


def test_a_serve_that_restarts(follow: Watching) -> None:
    first = Serve()
    with open_door(first.session):
        follow.start()
        until(lambda: ids(follow) == ["103275-1"])
        assert follow.status() == ""
    until(lambda: "has ended" in ((follow.snapshot() and follow.status()) or ""))
    now = follow.now()
    # Its last report stands, and the time of it.
    assert ids(follow) == ["103275-1"]
    assert follow.status() == (
        f"kvmtrace serve (pid {os.getpid()}) has ended, 0 s ago: waiting for it;"
        " its last report is below"
    )
    assert follow.now() == now
    again = Serve()
    again.say(VmSeen(LATER, 9, 4009, "new-1"))
    with open_door(again.session):
        until(lambda: "took over" in ((follow.snapshot() and follow.status()) or ""))
        until(lambda: 9 in (snapshot.vms if (snapshot := follow.snapshot()) else ()))
        # And on: what happens now is seen.
        again.say(VmSeen(LATER, 10, 4010, "new-2"))
        until(lambda: 10 in (snapshot.vms if (snapshot := follow.snapshot()) else ()))


def test_it_ends_while_it_waits(follow: Watching) -> None:
    serve = Serve()
    with open_door(serve.session):
        follow.start()
        until(lambda: ids(follow) == ["103275-1"])
    until(lambda: follow.snapshot() is not None and "has ended" in follow.status())


def test_a_bundle_of_what_was_seen(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, follow: Watching
) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(KvmtraceError, match="nothing is watched yet"):
        follow.log()
    serve = Serve()
    with open_door(serve.session):
        follow.start()
        until(lambda: ids(follow) == ["103275-1"])
    # Also when it is gone.
    until(lambda: follow.snapshot() is not None and "has ended" in follow.status())
    told = write_bundle(follow.log(), "kvmtrace-host/../17-20260921155650", here=True)
    path = "kvmtrace-host-..-17-20260921155650.tar.gz"
    assert told.startswith(f"{path}: ")
    assert {"events.jsonl,", "explain.txt,"} <= set(told.split())
    with tarfile.open(path) as archive:
        archive.extract("kvmtrace-bundle/events.jsonl")
    shown = json.loads(invoke("replay", "--json", "kvmtrace-bundle/events.jsonl").stdout)
    assert [one["id"] for one in shown["incidents"]] == ["103275-1"]


def test_a_bundle_where_the_directory_is_not_ours(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr(tempfile, "gettempdir", lambda: str(tmp_path))
    source = RecordingSource(str(docs.STORY))
    log = RecordedLog(source)
    real = output_file.Output._open

    def refuse(self: output_file.Output) -> int:
        if "/" not in self._path:
            raise PermissionError(13, "Permission denied")
        return real(self)

    monkeypatch.setattr(output_file.Output, "_open", refuse)
    told = write_bundle(log, "kvmtrace-h-1", here=False)
    assert told.startswith(f"{tmp_path}/kvmtrace-h-1.tar.gz: ")
    assert (tmp_path / "kvmtrace-h-1.tar.gz").stat().st_size > 0
    source.close()
