"""The command line: usage, exit statuses, one-line errors, and a source that is always closed."""

from __future__ import annotations

import json
import os
import signal
import threading
import time
import urllib.request
from pathlib import Path
from typing import Any

import click
import pytest

from kvmtrace import cli
from kvmtrace.cli import doors
from kvmtrace.errors import KvmtraceError
from kvmtrace.linux import host
from kvmtrace.model import Snapshot
from kvmtrace.views.web import metrics
from kvmtrace.views.web.listening import DEFAULT_LISTEN
from kvmtrace.views.web.server import Server
from tests.unit import serving
from tests.unit.command_line import invoke, refuse, use
from tests.unit.fake import STORY, FakeSource

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
    server = serving.serve("127.0.0.1:0", FakeSession())
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
