"""The program that serve runs for changes of incidents: whatever it does, serve goes on."""

from __future__ import annotations

import json
import os
import signal
import time
import urllib.request
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import click
import pytest

from kvmtrace import sources
from kvmtrace.cli import doors
from kvmtrace.cli import hooks as hooks_module
from kvmtrace.cli.hooks import QUEUE, HookRun, Hooks, program
from kvmtrace.correlate import Correlator
from kvmtrace.events import Event, Exit, Found, Host, Poison, VmGone, VmSeen
from kvmtrace.model import Snapshot
from kvmtrace.session.session import Session
from kvmtrace.views import json_output
from kvmtrace.views.hook_input import hook_input, hook_variables, is_wanted
from kvmtrace.views.incident_log import Change, IncidentLog, LogEntry
from kvmtrace.views.web.pages import Pages
from tests.unit import serving
from tests.unit.command_line import invoke
from tests.unit.fake import PROBES, SECOND, STORY, T0, FakeSource
from tests.unit.waiting import until

LIMIT = 30.0
"""For what a test waits for, in seconds: it is there long before."""

Hook = Callable[..., Hooks]


def script(path: Path, text: str) -> str:
    path.write_text(f"#!/bin/sh\n{text}\n")
    path.chmod(0o755)
    return str(path)


@pytest.fixture
def hook(tmp_path: Path) -> Iterator[Hook]:
    """Hooks that run a script, and are closed after the test."""
    made: list[Hooks] = []

    def start(text: str, seconds: float = LIMIT) -> Hooks:
        hooks = Hooks((script(tmp_path / "hook", text), "an argument; $HOME"), seconds)
        hooks.start()
        made.append(hooks)
        return hooks

    yield start
    for one in made:
        one.close()


def ran(hooks: Hooks) -> int:
    return hooks.counts["ok"] + hooks.counts["failed"] + hooks.counts["timeout"]


def run_once(hooks: Hooks, data: bytes = b"{}\n") -> list[str]:
    """Run the program once; what is logged of it."""
    before = ran(hooks)
    hooks.add(HookRun("4f2311-1", data, {"KVMTRACE_INCIDENT": "4f2311-1"}))
    until(lambda: ran(hooks) > before)
    return [note.text for note in hooks.notes()]


# -- a program


def test_it_gets_stdin_arguments_and_a_small_environment(
    hook: Hook, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("NOTIFY_SOCKET", "/run/systemd/notify")
    hooks = hook(f'cd {tmp_path}; cat >stdin; echo "$1" >argument; env >environment')
    data = b'{"a": "' + b"x" * 1_000_000 + b'"}\n'
    assert run_once(hooks, data) == []
    assert (tmp_path / "stdin").read_bytes() == data
    assert (tmp_path / "argument").read_text() == "an argument; $HOME\n"
    names = {line.split("=")[0] for line in (tmp_path / "environment").read_text().splitlines()}
    assert "KVMTRACE_INCIDENT" in names
    assert names <= {"KVMTRACE_INCIDENT", "PWD", "OLDPWD", "SHLVL", "_", *hooks_module._PASSED_ON}
    assert hooks.counts == {"ok": 1, "failed": 0, "timeout": 0, "dropped": 0}


def test_one_that_fails_is_logged_with_its_last_line(hook: Hook) -> None:
    hooks = hook(r"printf 'no route\nto \033[2Jhost\n' >&2; exit 3")
    assert run_once(hooks) == ["ended with status 3: to ?[2Jhost"]
    assert hooks.counts["failed"] == 1
    assert run_once(hooks) == ["ended with status 3: to ?[2Jhost"]


def test_one_that_is_killed(hook: Hook) -> None:
    assert run_once(hook("kill -9 $$")) == ["was ended by SIGKILL"]


def test_one_that_hangs_is_killed_with_what_it_started(hook: Hook, tmp_path: Path) -> None:
    hooks = hook(f"echo waiting >&2; sleep 1000 & echo $! >{tmp_path}/child; wait", 1)
    assert run_once(hooks) == ["took longer than 1 s and was killed: waiting"]
    assert hooks.counts["timeout"] == 1
    until(lambda: is_over(int((tmp_path / "child").read_text())))


def is_over(pid: int) -> bool:
    """Whether a process has ended; nobody may have waited for it."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] == "Z"
    except (FileNotFoundError, ProcessLookupError):
        return True


def test_one_that_does_not_read_blocks_nothing(hook: Hook) -> None:
    data = b"x" * 1_000_000
    assert run_once(hook("exit 0"), data) == []
    assert run_once(hook("exec 0<&-; exit 0"), data) == []
    assert "was killed" in run_once(hook("sleep 1000", 0.3), data)[0]


def test_one_that_prints_without_end_is_not_read_for_ever(hook: Hook) -> None:
    (said,) = run_once(hook("exec yes 'still here' >&2"))
    assert said in ("was ended by SIGPIPE: still here", "ended with status 1: still here")


def test_what_it_leaves_behind_holds_up_nothing(hook: Hook, tmp_path: Path) -> None:
    hooks = hook(f"sleep 1000 >&2 & echo $! >{tmp_path}/child")
    assert run_once(hooks) == []
    assert hooks.counts["ok"] == 1
    until(lambda: is_over(int((tmp_path / "child").read_text())))


def test_one_that_cannot_be_run_is_logged(hook: Hook, tmp_path: Path) -> None:
    hooks = hook("exit 0")
    (tmp_path / "hook").write_text("#!/no/such/interpreter\n")
    assert run_once(hooks) == ["cannot be run: No such file or directory"]
    (tmp_path / "hook").chmod(0o644)
    assert run_once(hooks) == ["cannot be run: Permission denied"]
    script(tmp_path / "hook", "exit 0")
    assert run_once(hooks) == []
    assert hooks.counts == {"ok": 1, "failed": 2, "timeout": 0, "dropped": 0}


# -- the queue


def test_a_queue_that_is_full_drops_and_counts(hook: Hook, tmp_path: Path) -> None:
    hooks = hook(f"touch {tmp_path}/started; sleep 1000")
    hooks.add(HookRun("first", b""))
    until((tmp_path / "started").exists)
    for _ in range(QUEUE + 7):
        hooks.add(HookRun("later", b""))
    assert hooks.counts["dropped"] == 7
    (note,) = hooks.notes()
    assert note.text == f"not run for 7 changes of incidents: {QUEUE} were waiting already"
    hooks.add(HookRun("later", b""))
    assert list(hooks.notes()) == []  # said with those to come
    hooks.close()
    texts = [note.text for note in hooks.notes()]
    assert texts == [
        "was killed: kvmtrace ends",
        f"not run for {QUEUE + 1} changes of incidents: kvmtrace ends",
    ]
    assert not hooks._thread.is_alive()


def test_what_waits_at_the_end_is_run_if_there_is_time(
    hook: Hook, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(hooks_module, "_GRACE", LIMIT)
    hooks = hook(f"echo >>{tmp_path}/runs")
    for _ in range(3):
        hooks.add(HookRun("x", b""))
    hooks.close()
    assert hooks.counts == {"ok": 3, "failed": 0, "timeout": 0, "dropped": 0}


def test_a_command_that_ends_by_force_leaves_no_program(hook: Hook, tmp_path: Path) -> None:
    hooks = hook(f"echo $$ >{tmp_path}/part; mv {tmp_path}/part {tmp_path}/pid; sleep 1000")
    hooks.add(HookRun("first", b""))
    hooks.add(HookRun("second", b""))
    until((tmp_path / "pid").exists)
    hooks.abandon()
    until(lambda: is_over(int((tmp_path / "pid").read_text())))
    until(lambda: hooks.counts["dropped"])
    assert ran(hooks) == 1


def test_hooks_that_never_started_can_be_closed() -> None:
    hooks = Hooks(("/bin/true",), 1)
    hooks.add(HookRun("x", b""))
    hooks.close()
    assert hooks.counts["dropped"] == 1


# -- what is refused at the start


def test_programs_that_cannot_be_run(tmp_path: Path) -> None:
    plain = tmp_path / "plain"
    plain.write_text("")
    for value, what in {
        "": "does not begin with the full path",
        "page-oncall": "does not begin with the full path",
        "/bin/sh 'x": "No closing quotation",
        str(tmp_path / "gone"): "No such file",
        str(tmp_path): "is not an executable file",
        str(plain): "is not an executable file",
    }.items():
        with pytest.raises(click.BadParameter) as error:
            program(value)
        assert what in error.value.message
        result = invoke("serve", "--on-incident", value, "--listen", "127.0.0.1:0")
        assert result.exit_code == 2
        assert what in result.stderr
        assert result.stderr.splitlines()[1].startswith("hint: ")
    assert program("/bin/sh -c 'exit 3'") == ("/bin/sh", "-c", "exit 3")


@pytest.mark.skipif(os.geteuid() != 0, reason="what only root is protected from")
def test_a_program_that_others_may_replace(tmp_path: Path) -> None:
    path = script(tmp_path / "hook", "exit 0")
    assert program(path) == (path,)
    os.chmod(path, 0o777)
    with pytest.raises(click.BadParameter, match="others than root may write to"):
        program(path)


# -- what it gets


def entries(*rounds: tuple[Event, ...], burst: int = 20) -> Iterator[tuple[LogEntry, Snapshot]]:
    """What is logged of incidents, after each round of events."""
    correlator, log = Correlator(), IncidentLog(burst)
    for number, events in enumerate(rounds):
        for event in events:
            correlator.feed(event)
        host = Host("hv-1", "6.18.15", "bpf")
        snapshot = correlator.snapshot().of_log(host, PROBES)
        for entry in log.entries(snapshot, T0 + number * 11 * SECOND):
            if entry.change is not None:
                yield entry, snapshot


def as_json(entry: LogEntry, snapshot: Snapshot) -> dict[str, object]:
    assert entry.change is not None
    found = json.loads(hook_input(entry, entry.change, snapshot, T0))
    assert isinstance(found, dict)
    return found


SEEN = VmSeen(T0, 1, 4001, "wéb\n1", "5b2f0000-1c2d-4e5f-8a9b-0123456789ab", "qemu")
TOLD = Exit(T0 + SECOND, 1, 0, 133, 39, True, 77, gfn=8)
LOOP = tuple(Exit(T0 + n * SECOND, 1, 0, 133, 39, True, 77, gfn=8, count=50) for n in range(2, 9))


def test_a_change_is_the_incident_and_what_it_was_before() -> None:
    (new, then), (changed, now) = entries((SEEN,), (TOLD,), LOOP)
    first, second = as_json(new, then), as_json(changed, now)
    assert (first["kvmtrace_hook"], first["change"]) == (1, "new")
    assert first["incident"] == json.loads(
        json.dumps(json_output.incident(then.incidents[0], then))
    )
    assert first["host"] == {"name": "hv-1", "kernel": "6.18.15"}
    assert not {"before", "at_start"} & set(first)
    assert (second["change"], second["message"]) == ("changed", changed.message)
    assert second["before"] == {
        "urgency": "unclear",
        "state": "delivered",
        "verdict": "unknown",
    }
    assert changed.change is not None
    assert hook_variables(changed.change) == {
        "KVMTRACE_CHANGE": "changed",
        "KVMTRACE_INCIDENT": now.incidents[0].id,
        "KVMTRACE_URGENCY": "looping",
        "KVMTRACE_STATE": "looping",
    }


def test_what_was_there_at_the_start_is_marked_and_what_is_over_is_left_out() -> None:
    over = (replace(SEEN, vm=2, pid=4002), replace(TOLD, vm=2, gfn=9), VmGone(T0 + 2 * SECOND, 2))
    found = [entry for entry, _ in entries((SEEN, TOLD, *over), (Found(T0, 0x7000),))]
    changes = [entry.change for entry in found if entry.change]
    assert [change.at_start for change in changes] == [True, True, True]
    states = [change.incident.state for change in changes if change.incident]
    assert states == ["delivered", "closed", "unowned"]
    assert [is_wanted(change) for change in changes] == [True, False, True]


def test_a_storm_is_a_bounded_number_of_runs() -> None:
    storm = tuple(Poison(T0 + n, 0x1000 + n, "dirty LRU page", "Recovered") for n in range(100))
    found = list(entries((), storm, (), burst=5))
    assert len(found) == 6
    total = as_json(*found[-1])
    assert (total["change"], total["changes"]) == ("storm", 95)
    assert total["open"] == {"unowned": 100}
    assert hook_variables(Change(None, count=95)) == {"KVMTRACE_CHANGE": "storm"}


# -- serve


class UntilTold(FakeSource):
    """The story; a signal once ``condition`` holds, or never will."""

    def __init__(self, condition: Callable[[], object]) -> None:
        super().__init__(STORY)
        self._condition, self._end = condition, time.monotonic() + LIMIT
        self._is_over = False

    def poll(self, timeout: float) -> list[Event]:
        if not self._is_over and (self._condition() or time.monotonic() > self._end):
            self._is_over = True
            os.kill(os.getpid(), signal.SIGTERM)
        return super().poll(timeout)


def serve(monkeypatch: pytest.MonkeyPatch, condition: Callable[[], object], *options: str) -> int:
    source = UntilTold(condition)
    monkeypatch.setattr(sources, "open_source", lambda kind: source)
    result = invoke("serve", "--listen", "127.0.0.1:0", "--log-format", "text", *options)
    return result.exit_code


def test_serve_runs_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "out"
    text = f'cat >>{out}; echo "$KVMTRACE_INCIDENT" >>{tmp_path}/ids'
    monkeypatch.setenv("KVMTRACE_SERVE_ON_INCIDENT", script(tmp_path / "hook", text))
    assert serve(monkeypatch, (tmp_path / "ids").exists) == 0
    assert "hook" not in capfd.readouterr().err
    first = json.loads(out.read_text().splitlines()[0])
    assert first["incident"]["id"] in (tmp_path / "ids").read_text().split()
    assert first["incident"]["actions"]
    assert first["at_start"]


def test_one_that_hangs_holds_up_nothing_and_is_logged(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    path = script(tmp_path / "hook", "sleep 1000")
    counts: list[dict[str, int]] = []

    def remembered(*arguments: Any, **options: Any) -> Pages:
        counts.append(options["hooks"])
        return Pages(*arguments, **options)

    monkeypatch.setattr(doors, "Pages", remembered)
    status = serve(
        monkeypatch,
        lambda: counts and counts[0]["timeout"],  # asked while it hangs, as the source is read
        *("--on-incident", path, "--hook-timeout", "200ms"),
    )
    assert status == 0
    stderr = capfd.readouterr().err
    assert "hook for incident " in stderr
    assert "took longer than 0.2 s and was killed" in stderr
    assert counts[0]["timeout"] >= 1
    assert stderr.count("kvmtrace: incident ") == 2


def test_the_file_gives_a_list(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = script(tmp_path / "hook", f'echo "$1" >{tmp_path}/part; mv {tmp_path}/part {tmp_path}/x')
    config = tmp_path / "kvmtrace.toml"
    config.write_text(f"[serve]\non_incident = {json.dumps([path, 'two words'])}\n")
    config.chmod(0o644)
    monkeypatch.setenv("KVMTRACE_CONFIG", str(config))
    assert serve(monkeypatch, (tmp_path / "x").exists) == 0
    assert (tmp_path / "x").read_text() == "two words\n"


def test_what_is_counted_is_exported() -> None:
    session = Session(FakeSource(STORY))
    counts = {"ok": 5, "failed": 2, "timeout": 1, "dropped": 7}
    server = serving.serve("127.0.0.1:0", session, hooks=counts)
    try:
        with urllib.request.urlopen(f"{server.url}/metrics") as answer:
            text = answer.read().decode()
    finally:
        server.close()
        session.close()
    assert 'kvmtrace_hook_runs_total{result="ok"} 5.0' in text
    assert 'kvmtrace_hook_runs_total{result="failed"} 2.0' in text
    assert 'kvmtrace_hook_runs_total{result="timeout"} 1.0' in text
    assert "kvmtrace_hook_dropped_total 7.0" in text
