"""`events`, live and of a running serve."""

from __future__ import annotations

import json
import os
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from kvmtrace import sources
from kvmtrace.events import Event, Found, Lost, Owned, Owner, VmGone, VmSeen
from kvmtrace.session.feed import send_log
from kvmtrace.session.session import Session
from kvmtrace.vmm import identity, processes
from tests.unit.command_line import Complete, invoke, use
from tests.unit.fake import SECOND, STORY, T0, FakeSource
from tests.unit.serving import Answering


def test_events(source: FakeSource) -> None:
    result = invoke("events", "--duration", "0.2")
    assert result.exit_code == 0
    assert [line.split()[1] for line in result.stdout.splitlines()] == ["poison", "exit", "exit"]
    assert "already here: 2 VMs\n" in result.stderr
    assert source.closed


def test_events_json_count(source: FakeSource) -> None:
    lines = invoke("events", "--json", "--count", "2").stdout.splitlines()
    found = [json.loads(line) for line in lines]
    assert [one["kind"] for one in found] == ["vm", "vm", "poison", "exit"]
    assert [one.get("before") for one in found] == [True, True, None, None]
    assert source.closed


class Slow(FakeSource):
    """Batches come one by one, also to a poll that does not wait."""


def test_what_was_there_is_no_event(monkeypatch: pytest.MonkeyPatch) -> None:
    """`--count 1` waits for the first thing that happens."""
    there = [
        *STORY[:2],
        Found(T0, 0x7),
        Owned(T0, 0x7, Owner(1, 9), "pagemap"),
    ]
    later = [
        VmSeen(T0 + SECOND, 1, 4001, "web-1", "c7a5fdbd-edaf-9455-926a-d65c16db1809", "qemu"),
        Found(T0 + SECOND, 0x8),
        Owned(T0 + SECOND, 0x8, Owner(2, 9), "pagemap"),
        VmSeen(T0 + 2 * SECOND, 3, 4003, "new"),
    ]
    use(monkeypatch, Slow(there, [], later))
    result = invoke("events", "--count", "1")
    (line,) = result.stdout.splitlines()
    assert line.split()[1:5] == ["vm", "new", "(4003)", "seen"]
    assert "already here: 2 VMs and 1 open incident" in result.stderr
    assert "1 page poisoned before now: 0x8" in result.stderr


def test_events_of_a_kind_and_a_state(monkeypatch: pytest.MonkeyPatch) -> None:
    def kinds(*arguments: str) -> list[str]:
        use(monkeypatch, Complete(STORY, [Lost(T0 + 9 * SECOND, "ringbuf", 3)]))
        lines = invoke("events", "--json", "--duration", "0.2", *arguments).stdout.splitlines()
        return [json.loads(line)["kind"] for line in lines]

    assert kinds("--kind", "poison,lost") == ["poison", "lost"]
    assert kinds("--kind", "exit", "--kind", "VM") == ["vm", "vm", "exit", "exit"]
    assert kinds("--state", "delivered") == ["exit"]  # the poison's own owner is not known
    assert kinds("--state", "unowned,delivered") == ["poison", "exit"]
    assert kinds("--state", "unowned", "--kind", "exit") == []


def test_what_is_lost_is_reported_whatever_is_printed(monkeypatch: pytest.MonkeyPatch) -> None:
    use(monkeypatch, Complete(STORY, [Lost(T0 + 9 * SECOND, "ringbuf", 3)]))
    result = invoke("events", "--kind", "poison", "--duration", "0.2")
    assert "kvmtrace: 3 lost at ringbuf\n" in result.stderr
    assert "lost" not in result.stdout
    use(monkeypatch, Complete(STORY, [Lost(T0 + 9 * SECOND, "ringbuf", 3)]))
    assert "3 lost at" in invoke("events", "--state", "latent", "--duration", "0.2").stderr
    use(monkeypatch, Complete(STORY, [Lost(T0 + 9 * SECOND, "ringbuf", 3)]))
    assert "lost at" not in invoke("events", "--duration", "0.2").stderr


@contextmanager
def serving(directory: Path, *events: Event) -> Iterator[None]:
    """A serve that has seen these events."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("KVMTRACE_RUNTIME_DIR", str(directory))
        patch.setattr(sources, "open_source", lambda kind: pytest.fail("probes were attached"))
        session = Session(FakeSource(events))
        session.pump(0)
        feed = Answering(lambda client: send_log(session, client))
        try:
            yield
        finally:
            feed.close()
            session.close()


def test_since_when_a_serve_has_seen_it(tmp_path: Path) -> None:
    def kinds(*arguments: str) -> list[tuple[str, bool]]:
        result = invoke("events", "--json", "--duration", "0.2", *arguments)
        assert result.exit_code == 0, result.stderr
        lines = map(json.loads, result.stdout.splitlines())
        return [(line["kind"], line.get("before", False)) for line in lines]

    with serving(tmp_path, *STORY, VmGone(T0 + 4 * SECOND, 2)):
        assert kinds() == [("vm", True)]
        since = f"--since={(T0 + 2 * SECOND) // SECOND}"
        assert invoke("events", since).exit_code == 2  # no duration of so many years
        at = time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime((T0 + 2 * SECOND) // SECOND))
        recent = [("exit", False), ("exit", False), ("vm", False)]
        assert kinds("--since", at) == [("vm", True), *recent]
        assert kinds("--since", at, "--count", "2") == [("vm", True), *recent[:2]]
        everything = kinds("--since", "2020-01-01")
        assert everything == [("vm", False), ("vm", False), ("poison", False), *recent]
        gap = invoke("events", "--utc", "--since", "2020-01-01", "--count", "1").stderr
        assert "the history of the serve begins at 2026-09-21 14:13:20.000 UTC\n" in gap


def test_doctor_beside_a_serve_attaches_nothing(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr(processes, "vm_processes", lambda: {})
    with serving(tmp_path, *STORY):
        report = json.loads(invoke("doctor", "--json").stdout)
        (serve,) = [one for one in report["checks"] if one["name"] == "serve"]
        assert serve["found"].startswith(f"runs (pid {os.getpid()}, kvmtrace ")
        (own,) = report["sources"]
        assert (own["name"], own["works"]) == ("bpf", True)
        assert {probe["name"]: probe["attached"] for probe in own["probes"]} == {
            "run": True,
            "mce": False,
        }


def test_since_needs_a_serve(source: FakeSource) -> None:
    result = invoke("events", "--since", "1h", "--count", "1")
    assert result.exit_code == 0
    assert "no serve runs here: what happened before now is not known" in result.stderr


@pytest.mark.parametrize("vm", ["web-1", "4001", "C7A5fdbd-edaf-9455-926a-d65c16db1809"])
def test_events_of_one_vm(monkeypatch: pytest.MonkeyPatch, vm: str) -> None:
    use(monkeypatch, Complete(STORY[:2], (*STORY[2:], Lost(T0 + 9 * SECOND, "ringbuf", 3))))
    lines = invoke("events", "--json", "--vm", vm, "--duration", "0.2").stdout.splitlines()
    assert [json.loads(line)["kind"] for line in lines] == ["vm", "exit", "lost"]
    assert json.loads(lines[0])["before"] is True


def test_unknown_vm(source: FakeSource) -> None:
    result = invoke("events", "--vm", "web-9")
    assert result.exit_code == 2
    assert result.stderr == "kvmtrace: no VM 'web-9' here\nhint: there are: db-1, web-1\n"
    assert source.closed


@pytest.mark.parametrize("vm", ["8006 (shop)", "pid 4005", "8006"])
def test_events_of_a_vm_by_its_label(monkeypatch: pytest.MonkeyPatch, vm: str) -> None:
    named = [VmSeen(T0, 5, 4005, "shop", vmid="8006"), VmSeen(T0, 6, 4006, "shop")]
    use(monkeypatch, Complete(named, ()))
    lines = invoke("events", "--json", "--vm", vm, "--duration", "0.2").stdout.splitlines()
    assert [json.loads(line)["vm"]["pid"] for line in lines] == [4005]


@pytest.mark.parametrize("vm", ["1" * 5000, "²"])
def test_digits_that_are_no_pid(source: FakeSource, vm: str) -> None:
    result = invoke("events", "--vm", vm)
    assert result.exit_code == 2
    assert "no VM" in result.stderr


def test_no_vm_at_all(monkeypatch: pytest.MonkeyPatch) -> None:
    use(monkeypatch, FakeSource())
    assert "hint: none is running" in invoke("events", "--vm", "x\x1b[2J").stderr


def test_live_process_may_become_a_vm(source: FakeSource) -> None:
    result = invoke("events", "--vm", str(os.getpid()), "--duration", "0.1")
    assert result.exit_code == 0


def test_vm_known_from_proc_only(monkeypatch: pytest.MonkeyPatch) -> None:
    use(monkeypatch, FakeSource())
    me = processes.VmProcess(identity.Identity("me"))
    monkeypatch.setattr(processes, "vm_processes", lambda: {os.getpid(): 1})
    monkeypatch.setattr(processes, "identify", lambda pid: me)
    assert invoke("events", "--vm", "me", "--duration", "0.1").exit_code == 0
