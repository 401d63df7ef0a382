"""The command line: exit statuses, one-line errors, and a source that is always closed."""

from __future__ import annotations

import fcntl
import json
import os
import select
import signal
import stat
import subprocess
import sys
import threading
import time
import urllib.request
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import click
import pytest
from click.testing import CliRunner, Result

from kvmtrace import cli, sources
from kvmtrace.cli import doors
from kvmtrace.cli.options import point_in_time, seconds, utc_option
from kvmtrace.errors import KvmtraceError
from kvmtrace.events import Event, Found, Lost, Owned, Owner, VmGone, VmSeen
from kvmtrace.linux import host
from kvmtrace.model import Snapshot
from kvmtrace.probes import NO_KVM, Probe, specs
from kvmtrace.session.feed import send_log
from kvmtrace.session.session import Session
from kvmtrace.views.format import zone_of
from kvmtrace.views.web import metrics
from kvmtrace.views.web.listening import DEFAULT_LISTEN
from kvmtrace.views.web.server import Server
from kvmtrace.vmm import identity, processes
from tests.unit.command_line import invoke
from tests.unit.fake import SECOND, STORY, T0, FakeSource
from tests.unit.serving import Answering
from tests.unit.serving import serve as tcp_server

Run = Callable[..., Result]


class Complete(FakeSource):
    """A poll that does not wait gives all that is left, as a real source's does: what a command
    sees does not depend on how long it took.
    """

    def poll(self, timeout: float) -> list[Event]:
        events = super().poll(timeout)
        while self._batches and timeout <= 0:
            events += super().poll(timeout)
        return events


@pytest.fixture
def source(monkeypatch: pytest.MonkeyPatch) -> FakeSource:
    """What `open_source` opens: the story in two batches."""
    return use(monkeypatch, Complete(STORY[:2], STORY[2:]))


def use(monkeypatch: pytest.MonkeyPatch, source: FakeSource) -> FakeSource:
    monkeypatch.setattr(sources, "open_source", lambda kind: source)
    monkeypatch.setattr(identity, "vm_processes", lambda: {})
    return source


def refuse(monkeypatch: pytest.MonkeyPatch, error: Exception) -> None:
    def raising(kind: str) -> FakeSource:
        raise error

    monkeypatch.setattr(sources, "open_source", raising)


# -- usage


def test_version() -> None:
    assert invoke("--version").output == "kvmtrace, version 0.1.0\n"


def test_help_names_every_command() -> None:
    text = invoke("--help").output
    for name in ("top", "events", "serve", "record", "replay", "doctor"):
        assert f"\n  {name} " in text
    for name in cli.cli.commands:
        assert invoke(name, "--help").exit_code == 0


def test_help_has_the_exporters_own_defaults() -> None:
    text = " ".join(invoke("serve", "--help").output.split())
    assert f"[default: {DEFAULT_LISTEN}]" in text
    assert f"[default: {metrics.DEFAULT_MAX_VMS}]" in text


@pytest.mark.parametrize(
    "arguments",
    [
        ("nonsense",),
        ("top", "--interval", "0"),
        ("top", "--interval", "-1"),
        ("top", "--interval", "nan"),
        ("top", "--interval", "inf"),
        ("top", "--interval", "soon"),
        ("top", "--json"),
        ("top", "--source", "magic"),
        ("events", "--count", "0"),
        ("events", "--count", "-3"),
        ("events", "--duration", "0s"),
        ("events", "surplus"),
        ("serve", "--max-vms", "0"),
        ("serve", "--listen", "nowhere"),
        ("serve", "--listen", "127.0.0.1:99999"),
        ("record",),
        ("replay",),
    ],
)
def test_wrong_usage_is_status_2(source: FakeSource, arguments: tuple[str, ...]) -> None:
    result = invoke(*arguments)
    assert result.exit_code == 2, result.stderr
    assert "Traceback" not in result.stderr
    assert not source.closed  # nor opened


@pytest.mark.parametrize(
    ("arguments", "message", "command"),
    [
        (("--bogus",), "no such option", "kvmtrace"),
        (("nonsense",), "no such command", "kvmtrace"),
        (("events", "--bogus"), "no such option", "kvmtrace events"),
        (("events", "a\x1b[31mb\n"), "unexpected extra argument (a?[31mb )", "kvmtrace events"),
        (("top", "--interval", "soon"), "'soon' is not a duration", "kvmtrace top"),
        (("record",), "missing argument 'FILE'", "kvmtrace record"),
        (("bundle",), "missing option '-o'", "kvmtrace bundle"),
    ],
)
def test_wrong_usage_is_a_line_and_a_hint(
    arguments: tuple[str, ...], message: str, command: str
) -> None:
    result = invoke(*arguments)
    line, hint = result.stderr.splitlines()
    assert line.startswith("kvmtrace: ")
    assert message in line
    assert hint == f"hint: `{command} --help` lists what there is"
    assert (result.exit_code, result.stdout) == (2, "")


def test_every_option_complains_in_one_line(source: FakeSource) -> None:
    """Whatever click makes of it: its words, and where it has them from, change by release."""
    for name, command in cli.cli.commands.items():
        if name == "check":  # its status has a meaning of its own: tests/unit/test_check.py
            continue
        for parameter in command.params:
            if not isinstance(parameter, click.Option):
                continue
            for option in parameter.opts:
                given = [[f"{option}=1"] if parameter.is_flag else [option]]
                if not isinstance(
                    parameter.type, click.types.StringParamType | click.types.BoolParamType
                ):
                    given.append([option, "/"])  # no number, no choice, a directory
                for arguments in given:
                    result = invoke(name, *arguments)
                    line, hint = result.stderr.splitlines()
                    assert line.startswith("kvmtrace: "), (name, arguments, line)
                    assert option in line, (name, arguments, line)
                    assert hint == f"hint: `kvmtrace {name} --help` lists what there is"
                    assert (result.exit_code, result.stdout) == (2, "")
    assert not source.closed  # nor opened


def test_no_command_is_answered_with_the_help() -> None:
    assert "\n  replay " in invoke().output


@pytest.mark.parametrize(
    ("error", "message"),
    [
        (KvmtraceError("a\x1b[31mb", "c\nd"), "kvmtrace: a?[31mb\nhint: c d\n"),
        (
            OSError(5, "Input/output error", "/a\x1b[2J\u202e"),
            "kvmtrace: /a?[2J: Input/output error",
        ),
    ],
)
def test_errors_do_nothing_to_a_terminal(
    monkeypatch: pytest.MonkeyPatch, error: Exception, message: str
) -> None:
    refuse(monkeypatch, error)
    assert invoke("events").stderr.startswith(message)


def test_names_of_files_do_nothing_to_a_terminal(source: FakeSource, tmp_path: Path) -> None:
    path = str(tmp_path / "a\x1b[31mb")
    missing = invoke("replay", path)
    assert missing.stderr.startswith(f"kvmtrace: {tmp_path}/a?[31mb: No such file or directory\n")
    assert missing.stderr.splitlines()[1].startswith("hint: ")
    message = invoke("record", path, "--duration", "0.1").stderr
    Path(path).write_bytes(Path(path).read_bytes()[:-5])
    for command in (("replay",), ("record",), ("bundle", "--force", "--from", path, "-o")):
        message += invoke(*command, path).stderr
    assert "\x1b" not in message
    assert message.count(f"{tmp_path}/a?[31mb") == 5


@pytest.mark.parametrize(
    ("text", "number"),
    [
        ("2", 2.0),
        ("1.5s", 1.5),
        ("2m", 120),
        ("1h", 3600),
        ("2d", 172800),
        ("1h30m", 5400),
        ("500ms", 0.5),
        ("1.5H", 5400),
        (".5", 0.5),
        ("1e3", 1000),
    ],
)
def test_durations(text: str, number: float) -> None:
    assert seconds(text) == number


@pytest.mark.parametrize(
    "text",
    ["", "m", "1x", "1h30", "-1s", "1 h", "0ms", "1e9", "nan", "²", "1hh", "1e9d", "9" * 400],
)
def test_no_durations(text: str) -> None:
    with pytest.raises(click.BadParameter):
        seconds(text)


NOW = 1_790_000_000  # 2026-09-21T14:13:20Z


@pytest.fixture
def zone(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Two hours east of UTC."""
    monkeypatch.setenv("TZ", "XYZ-2")
    time.tzset()
    yield
    monkeypatch.undo()
    time.tzset()


@pytest.mark.parametrize(
    ("text", "when"),
    [
        ("2026-09-21T16:13:20", NOW),
        ("2026-09-21 16:13:20", NOW),
        ("2026-09-21T14:13:20Z", NOW),
        ("2026-09-21T10:13:20-04:00", NOW),
        ("2026-09-21", NOW - 16 * 3600 - 13 * 60 - 20),
    ],
)
def test_points_in_time(zone: None, text: str, when: int) -> None:
    assert point_in_time(text) == when * SECOND


def test_times_of_day_are_the_last_ones(zone: None) -> None:
    now = time.time()
    for ago in (0, 60, 86100):
        shown = time.strftime("%H:%M:%S", time.localtime(now - ago))
        assert abs(now - ago - point_in_time(shown) / SECOND) < 2
    an_hour_ago = point_in_time("1h")
    # By a clock that is not stepped nor slewed.
    assert 3599 < (time.time_ns() - an_hour_ago) / SECOND < 3660
    assert point_in_time("7:05") == point_in_time("07:05")


@pytest.mark.parametrize("text", ["", "25:00", "yesterday", "2026-13-01", "99999-01-01", "²:00"])
def test_no_points_in_time(text: str) -> None:
    with pytest.raises(click.BadParameter):
        point_in_time(text)


def test_utc_ends_with_its_command(zone: None) -> None:
    shown: list[str] = []

    @click.command()
    @utc_option
    def command() -> None:
        shown.append(zone_of(NOW * SECOND))

    for arguments in (["--utc"], []):
        CliRunner().invoke(command, arguments)
    assert shown == ["UTC", "UTC+02:00"]


# -- errors


def test_error_is_a_line_and_a_hint(monkeypatch: pytest.MonkeyPatch) -> None:
    refuse(monkeypatch, KvmtraceError("BPF is refused", "ask the kernel"))
    result = invoke("events")
    assert result.exit_code == 1
    assert result.stderr == "kvmtrace: BPF is refused\nhint: ask the kernel\n"
    assert result.stdout == ""


@pytest.mark.parametrize(
    ("error", "expected"),
    [
        (PermissionError(13, "Permission denied", "/sys/x"), "/sys/x: Permission denied"),
        (ZeroDivisionError("division by zero"), "internal error: ZeroDivisionError"),
    ],
)
def test_unexpected_errors_are_readable_too(
    monkeypatch: pytest.MonkeyPatch, error: Exception, expected: str
) -> None:
    refuse(monkeypatch, error)
    result = invoke("top", "--once")
    assert result.exit_code == 1
    assert expected in result.stderr
    assert "Traceback" not in result.stderr
    monkeypatch.setenv("KVMTRACE_DEBUG", "1")
    assert "Traceback" in invoke("top", "--once").stderr


def test_not_root(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(host, "privilege", lambda: host.Privilege(1000, 0))
    for command in (("events",), ("top", "--once"), ("serve",), ("record", "/tmp/never")):
        result = invoke(*command)
        assert result.exit_code == 1
        assert result.stderr == "kvmtrace: tracing the kernel needs root\nhint: run it with sudo\n"
    assert not Path("/tmp/never").exists()


def test_source_that_dies_is_closed_and_reported(monkeypatch: pytest.MonkeyPatch) -> None:
    for command in (("events",), ("top", "--once"), ("serve", "--listen", "127.0.0.1:0")):
        dying = FakeSource(STORY, failure=KvmtraceError("the ring buffer is gone"))
        use(monkeypatch, dying)
        result = invoke(*command)
        assert result.exit_code == 1
        assert "kvmtrace: the ring buffer is gone\n" in result.stderr
        assert dying.closed


# -- top


def test_top_needs_a_terminal(source: FakeSource) -> None:
    result = invoke("top")
    assert result.exit_code == 2
    assert "top --once" in result.stderr
    assert not source.polls


def test_top_once(source: FakeSource, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", "160")
    result = invoke("top", "--once", "--interval", "0.1")
    assert result.exit_code == 0
    assert "web-1" in result.stdout
    assert "103275-1" in result.stdout
    assert source.closed


def test_top_once_json(source: FakeSource) -> None:
    answer = json.loads(invoke("top", "--once", "--json", "--interval", "0.1").stdout)
    assert [vm["pid"] for vm in answer["vms"]] == [4001, 4002]
    assert answer["vms"][0]["exits"] == {"EHWPOISON": 1}
    assert answer["host"]["source"] == "bpf"


def test_top_once_lasts_an_interval(monkeypatch: pytest.MonkeyPatch) -> None:
    use(monkeypatch, FakeSource())
    start = time.monotonic()
    invoke("top", "--once", "--interval", "0.3")
    assert time.monotonic() - start >= 0.3


# -- events


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


# -- serve


def test_serve_until_a_signal(source: FakeSource) -> None:
    scraped: list[str] = []
    started = threading.Event()

    def scrape() -> None:
        try:
            assert started.wait(20)
            assert source.drained.wait(20)
            with urllib.request.urlopen(f"{servers[0].url}/metrics") as answer:
                scraped.append(answer.read().decode())
        finally:
            os.kill(os.getpid(), signal.SIGTERM)

    def remembered(*arguments: Any, **options: Any) -> Server:
        servers.append(Server(*arguments, **options))
        started.set()
        return servers[0]

    servers: list[Server] = []
    thread = threading.Thread(target=scrape)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(doors, "Server", remembered)
        thread.start()
        result = invoke("serve", "--listen", "127.0.0.1:0")
    thread.join()
    assert result.exit_code == 0, result.output
    assert 'errno="EHWPOISON"' in scraped[0]
    assert source.closed
    assert not source._batches


def test_port_in_use(monkeypatch: pytest.MonkeyPatch) -> None:
    server = tcp_server("127.0.0.1:0", FakeSession())
    try:
        listen = f"127.0.0.1:{server.address[1]}"
        source = use(monkeypatch, FakeSource())
        result = invoke("serve", "--listen", listen)
        assert result.exit_code == 1
        assert "port in use" in result.stderr
        assert not source.closed  # nor opened
    finally:
        server.close()


class FakeSession:
    def snapshot(self) -> Snapshot:
        return Snapshot()


# -- record, replay


def test_record_then_replay(source: FakeSource, tmp_path: Path) -> None:
    path = str(tmp_path / "r")
    result = invoke("record", path, "--duration", "0.2")
    assert result.exit_code == 0
    assert result.stderr.endswith(" events\n")
    assert source.closed
    assert Path(path).stat().st_mode & 0o777 == 0o600

    table = invoke("replay", path)
    assert table.exit_code == 0
    assert "web-1" in table.stdout
    top = json.loads(invoke("replay", path, "--json").stdout)
    assert top["host"]["source"] == "recording"
    assert top["incidents"][0]["pfn"] == 0x103275
    lines = invoke("replay", path, "--events", "--json").stdout.splitlines()
    assert [json.loads(line)["kind"] for line in lines] == ["vm", "vm", "poison", "exit", "exit"]
    assert len(invoke("replay", path, "--events").stdout.splitlines()) == 5


def test_record_takes_a_last_look(source: FakeSource, tmp_path: Path) -> None:
    """What the kernel only counted is reported by a poll that does not wait."""
    asked: list[float] = []
    given = source.poll

    def poll(timeout: float) -> list[Event]:
        asked.append(timeout)
        return given(timeout) + ([Lost(T0, "the_end", 1)] if timeout == 0 else [])

    source.poll = poll  # type: ignore[method-assign]  # a fake's own
    path = tmp_path / "r"
    assert invoke("record", str(path), "--duration", "0.1").exit_code == 0
    assert asked.count(0) == 1
    assert asked[-1] == 0
    *lines, end = path.read_text().splitlines()
    assert any("the_end" in line for line in lines)
    assert '"end":true' in end


def test_record_does_not_overwrite(source: FakeSource, tmp_path: Path) -> None:
    path = tmp_path / "r"
    path.write_text("precious")
    result = invoke("record", str(path), "--duration", "0.1")
    assert result.exit_code == 1
    assert "--force" in result.stderr
    assert path.read_text() == "precious"
    assert not source.closed  # nor opened
    assert invoke("record", str(path), "--force", "--duration", "0.1").exit_code == 0
    assert "kvmtrace_recording" in path.read_text()


def test_record_where_it_cannot(source: FakeSource) -> None:
    result = invoke("record", "/nonexistent/r")
    assert result.exit_code == 1
    assert "/nonexistent/r: No such file or directory\nhint: " in result.stderr
    assert not source.closed  # nor opened


@pytest.mark.parametrize("link", [os.link, os.symlink])
def test_force_replaces_whatever_is_there(
    source: FakeSource, tmp_path: Path, link: Callable[[Path, Path], None]
) -> None:
    """By a file of its own: not for everybody's eyes, nor written over somebody else's."""
    precious, path = tmp_path / "precious", tmp_path / "r"
    precious.write_text("precious")
    precious.chmod(0o644)
    link(precious, path)
    assert invoke("record", str(path), "--force", "--duration", "0.1").exit_code == 0
    assert "kvmtrace_recording" in path.read_text()
    assert path.lstat().st_mode == stat.S_IFREG | 0o600
    path.unlink()
    out = ("-o", str(path), "--force", "--source", "bpf", "--duration", "0.1")
    link(precious, path)
    assert invoke("bundle", *out).exit_code == 0
    assert path.lstat().st_mode == stat.S_IFREG | 0o600
    assert precious.read_text() == "precious"
    assert sorted(tmp_path.iterdir()) == [precious, path]


@pytest.mark.parametrize("command", [("record",), ("bundle", "-o")])
@pytest.mark.parametrize("force", [(), ("--force",)])
def test_a_source_that_is_refused_leaves_no_file(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, command: tuple[str, ...], force: tuple[str]
) -> None:
    refuse(monkeypatch, KvmtraceError("BPF is refused"))
    assert "BPF is refused" in invoke(*command, str(tmp_path / "r"), *force).stderr
    assert not list(tmp_path.iterdir())
    if force:
        (tmp_path / "r").write_text("precious")
        invoke(*command, str(tmp_path / "r"), *force)
        assert (tmp_path / "r").read_text() == "precious"


def test_bundle_looks_at_its_file_first(source: FakeSource, tmp_path: Path) -> None:
    (tmp_path / "r").touch()
    assert "already there" in invoke("bundle", "-o", str(tmp_path / "r")).stderr
    assert "No such file" in invoke("bundle", "-o", str(tmp_path / "none" / "r")).stderr
    assert not source.polls


@pytest.mark.parametrize("kind", ["file", "pipe"])
def test_output_to_what_is_open(tmp_path: Path, kind: str) -> None:
    log = tmp_path / "log"
    arguments = ("record", "/dev/fd/1", "--force", "--duration", "0.1")
    code = CHILD.format(chatty=False, ready=None, hangup="SIG_DFL")
    script = [sys.executable, "-c", code, *arguments]
    where = Path(__file__).parents[2]
    with log.open("wb") as file:
        stdout = file if kind == "file" else subprocess.PIPE
        done = subprocess.run(script, stdout=stdout, cwd=where, check=True, timeout=60)
    text = log.read_bytes() if kind == "file" else done.stdout
    assert text.startswith(b'{"kvmtrace_recording":1')


def test_output_to_a_pipe_with_a_name(source: FakeSource, tmp_path: Path) -> None:
    path = tmp_path / "pipe"
    os.mkfifo(path)
    read: list[bytes] = []
    reader = threading.Thread(target=lambda: read.append(path.read_bytes()))
    reader.start()
    assert invoke("record", str(path), "--force", "--duration", "0.1").exit_code == 0
    reader.join()
    assert read[0].startswith(b'{"kvmtrace_recording":1')
    assert path.is_fifo()


def test_replay_of_what_is_none(tmp_path: Path) -> None:
    path = tmp_path / "r"
    path.write_text("no recording\n")
    result = invoke("replay", str(path))
    assert result.exit_code == 1
    assert result.stderr.startswith(f"kvmtrace: {path} is not a recording\nhint: ")


def test_replay_says_what_it_left_out(source: FakeSource, tmp_path: Path) -> None:
    path = tmp_path / "r"
    invoke("record", str(path), "--duration", "0.2")
    path.write_bytes(path.read_bytes()[:-10])
    result = invoke("replay", str(path), "--json")
    assert result.exit_code == 0
    assert "last line is cut off" in result.stderr
    json.loads(result.stdout)


# -- choosing a source


def test_auto_takes_bpf(monkeypatch: pytest.MonkeyPatch) -> None:
    opened = opener(monkeypatch)
    source = sources.open_source("auto")
    assert (opened, source.why) == (["bpf"], "bpf works here")


def test_auto_falls_back_and_says_why(monkeypatch: pytest.MonkeyPatch) -> None:
    opened = opener(monkeypatch, bpf=KvmtraceError("bcc is not installed"))
    source = sources.open_source("auto")
    assert opened == ["bpf", "ftrace"]
    assert source.why == "bpf does not work here: bcc is not installed"


def test_auto_with_nothing_left(monkeypatch: pytest.MonkeyPatch) -> None:
    opener(monkeypatch, bpf=KvmtraceError("no bcc"), ftrace=OSError(1, "Operation not permitted"))
    with pytest.raises(KvmtraceError, match=r"bpf: no bcc; ftrace: .*not permitted") as caught:
        sources.open_source("auto")
    assert caught.value.hint


def test_a_source_asked_for_is_not_replaced(monkeypatch: pytest.MonkeyPatch) -> None:
    opened = opener(monkeypatch, bpf=KvmtraceError("no bcc", "install it"))
    with pytest.raises(KvmtraceError, match=r"^no bcc$"):
        sources.open_source("bpf")
    assert opened == ["bpf"]


def probes_but(*missing: str) -> tuple[Probe, ...]:
    """All probes, attached but for these, which the kernel has and refuses."""
    return tuple(
        Probe(spec.name, spec.name not in missing, spec.targets[0]) for spec in specs("x86_64")
    )


@pytest.mark.parametrize(
    ("bpf", "ftrace", "chosen", "why"),
    [
        # Three probes of many, on a kernel without kprobes: not what a watch is for.
        (
            ("run", "gmem", "faultin", "vm_new", "vm_gone"),
            (),
            "ftrace",
            "bpf does not see run, gmem, faultin and 2 more here",
        ),
        (("run",), ("gmem", "faultin", "mce"), "ftrace", "; without gmem, faultin, mce"),
        (("gmem", "faultin", "mce"), ("run",), "bpf", "bpf works here, without gmem, faultin, mce"),
        (("poison", "mce"), ("gmem",), "ftrace", "bpf does not see poison, mce here"),
        (("run",), ("run",), "bpf", "bpf sees most here, but not run"),
        (("mce",), ("mce", "vm_new"), "bpf", "bpf works here, without mce"),
        (("run", "mce"), ("run",), "ftrace", "bpf does not see mce here; without run"),
    ],
)
def test_auto_takes_what_sees_more(
    monkeypatch: pytest.MonkeyPatch,
    bpf: tuple[str, ...],
    ftrace: tuple[str, ...],
    chosen: str,
    why: str,
) -> None:
    made: dict[str, FakeSource] = {}

    def opened(kind: str) -> FakeSource:
        made[kind] = FakeSource()
        made[kind].name = kind
        states = probes_but(*(bpf if kind == "bpf" else ftrace))
        monkeypatch.setattr(made[kind], "probes", lambda: states)
        return made[kind]

    monkeypatch.setattr(host, "privilege", lambda: host.Privilege(0, (1 << 41) - 1))
    monkeypatch.setattr(sources, "_open", opened)
    source = sources.open_source("auto")
    assert source.name == chosen
    assert why in (source.why or "")
    # Both were looked at, and one of them is left.
    assert {kind: one.closed for kind, one in made.items()} == {
        "bpf": int(chosen != "bpf"),
        "ftrace": int(chosen != "ftrace"),
    }


def test_auto_does_not_look_further_for_what_no_source_can_see(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """kvm is not loaded, or the kernel has no such function."""
    states = (
        Probe("run", False, why=NO_KVM),
        Probe("gmem", False, why="this kernel has no kvm_gmem_get_pfn"),
    )
    opened = opener(monkeypatch)
    monkeypatch.setattr(FakeSource, "probes", lambda _: states)
    source = sources.open_source("auto")
    assert (opened, source.why) == (["bpf"], "bpf works here")


def test_auto_keeps_bpf_where_nothing_else_works(monkeypatch: pytest.MonkeyPatch) -> None:
    opened = opener(monkeypatch, ftrace=KvmtraceError("tracefs is not mounted"))
    monkeypatch.setattr(FakeSource, "probes", lambda _: probes_but("run"))
    source = sources.open_source("auto")
    assert (opened, source.why) == (["bpf", "ftrace"], "bpf sees most here, but not run")


def opener(monkeypatch: pytest.MonkeyPatch, **failures: Exception) -> list[str]:
    opened: list[str] = []

    def fake_open(kind: str) -> FakeSource:
        opened.append(kind)
        if kind in failures:
            raise failures[kind]
        return FakeSource()

    monkeypatch.setattr(host, "privilege", lambda: host.Privilege(0, (1 << 41) - 1))
    monkeypatch.setattr(sources, "_open", fake_open)
    return opened


# -- a process of its own: signals, pipes, terminals

CHILD = """
import os, signal, sys
from kvmtrace import cli, sources
from tests.unit.fake import STORY, FakeSource

class Source(FakeSource):
    def poll(self, timeout):
        if self.drained.is_set() and self.ready is not None:
            os.close(self.ready)
            self.ready = None
        return super().poll(timeout) or (list(STORY) if self.chatty else [])

    def close(self):
        super().close()
        print("closed", file=sys.stderr, flush=True)

signal.signal(signal.SIGHUP, signal.{hangup})
Source.chatty = {chatty}
Source.ready = {ready}
sources.open_source = lambda kind: Source(STORY)
cli.main()
"""


def child(
    *arguments: str,
    chatty: bool = False,
    hangup: str = "SIG_DFL",  # under nohup the tests have it ignored
    stdout: int = subprocess.PIPE,
) -> subprocess.Popen[str]:
    """A command of its own that has taken in all that its source has to give, and goes on."""
    waiting, ready = os.pipe()
    code = CHILD.format(chatty=chatty, ready=ready, hangup=hangup)
    process = subprocess.Popen(
        [sys.executable, "-c", code, *arguments],
        stdin=subprocess.DEVNULL,
        stdout=stdout,
        stderr=subprocess.PIPE,
        text=True,
        cwd=Path(__file__).parents[2],
        pass_fds=[ready],
    )
    os.close(ready)
    with open(waiting, "rb") as end:
        end.read()
    return process


def assert_quiet(stderr: str) -> None:
    *before, last = stderr.splitlines()
    assert last == "closed"
    usual = ("kvmtrace: watching by bpf", "kvmtrace: already here: ", "kvmtrace: incident ")
    assert not [line for line in before if not line.startswith(usual)]


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGHUP])
@pytest.mark.parametrize(
    "command",
    [("events",), ("serve", "--listen", "127.0.0.1:0"), ("top", "--once", "--interval=99")],
)
def test_signals_end_it_cleanly(command: tuple[str, ...], number: signal.Signals) -> None:
    process = child(*command)
    assert process.stdout is not None
    assert process.stderr is not None
    if command[0] == "events":
        process.stdout.readline()
    elif command[0] == "serve":
        assert process.stderr.readline().startswith("serving http://127.0.0.1:")
    process.send_signal(number)
    _, stderr = process.communicate(timeout=20)
    assert_quiet(stderr)
    assert process.returncode == 0


def test_a_hangup_that_was_ignored_stays_so() -> None:
    process = child("events", hangup="SIG_IGN")
    status = Path(f"/proc/{process.pid}/status").read_text()
    ignored = next(line for line in status.splitlines() if line.startswith("SigIgn:"))
    assert int(ignored.split()[1], 16) & 1 << signal.SIGHUP - 1
    process.terminate()
    process.communicate(timeout=20)
    assert process.returncode == 0


def test_signal_ends_a_blocked_write() -> None:
    read, write = os.pipe()
    fcntl.fcntl(write, fcntl.F_SETPIPE_SZ, 4096)
    process = child("events", chatty=True, stdout=write)
    poller = select.poll()
    poller.register(write, select.POLLOUT)
    while poller.poll(0):  # nobody reads: it fills up
        assert process.poll() is None
    process.send_signal(signal.SIGTERM)
    _, stderr = process.communicate(timeout=20)
    assert_quiet(stderr)
    assert process.returncode == 0
    os.close(read)
    os.close(write)


@pytest.mark.parametrize("chatty", [True, False])
def test_closed_pipe_ends_it_quietly(chatty: bool) -> None:
    process = child("events", chatty=chatty)
    assert process.stdout is not None
    process.stdout.readline()
    process.stdout.close()
    process.wait(20)
    assert process.stderr is not None
    assert_quiet(process.stderr.read())
    assert process.returncode == 0
    process.stderr.close()


def test_a_signal_does_not_cost_the_last_lines() -> None:
    process = child("events", chatty=True)
    assert process.stdout is not None
    read = [process.stdout.readline()]
    process.send_signal(signal.SIGTERM)
    read += process.stdout.readlines()  # somebody reads: all of the last look arrives
    process.communicate(timeout=20)
    # The first two events are VMs that are there already.
    assert len(read) % (len(STORY) - 2) == 0
    assert process.returncode == 0


def test_lines_come_as_they_happen() -> None:
    process = child("events")
    assert process.stdout is not None
    assert "poison" in process.stdout.readline()
    process.terminate()
    process.communicate(timeout=20)
