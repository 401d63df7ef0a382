"""Help in groups, variables for options, completion, and a line while something takes long."""

from __future__ import annotations

import os
import pty
import re
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import click
import pytest
from click.shell_completion import ShellComplete

from kvmtrace import cli, sources
from kvmtrace.events import Event, VmGone, VmSeen
from kvmtrace.linux import clock
from kvmtrace.session.feed import send_log
from kvmtrace.session.session import Session
from kvmtrace.sources.remote import RemoteSource
from tests import docs
from tests.unit.command_line import invoke
from tests.unit.fake import STORY, FakeSource
from tests.unit.serving import Answering

OPTIONS = [
    (name, option)
    for name, command in cli.cli.commands.items()
    for option in command.params
    if isinstance(option, click.Option)
]


def test_commands_stand_in_groups() -> None:
    text = invoke("--help").output
    listed = re.findall(r"^  (\w+) +\S", text[text.index("\nLook:") :], re.MULTILINE)
    assert sorted(set(listed) & set(cli.cli.commands)) == sorted(cli.cli.commands)
    assert re.findall(r"^(\w+):$", text, re.MULTILINE) == [
        "Options",
        "Look",
        "Run",
        "Keep",
        "Check",
    ]
    assert max(map(len, text.splitlines())) <= 80


def test_summaries_are_not_cut(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", "40")
    text = invoke("--help").output
    assert "..." not in text.replace("[ARGS]...", "")
    for command in cli.cli.commands.values():
        assert command.get_short_help_str(1000) in " ".join(text.split())


@pytest.mark.parametrize("name", cli.cli.commands)
def test_each_command_has_an_example(name: str) -> None:
    examples = cli.cli.examples[name]
    assert all(re.match(rf"kvmtrace {name}\b", one) for one in examples)
    assert f"$ {examples[0]}\n" in invoke("--help").output
    text = invoke(name, "--help").output
    assert all(f"    {one}\n" in text for one in examples)


# -- variables


_FOR_ALL = ("KVMTRACE_SOURCE", "KVMTRACE_UTC", "KVMTRACE_HISTORY")


def test_variables_of_options_clash_with_no_other() -> None:
    table = (docs.ROOT / "docs/using.md").read_text()
    others = set(re.findall(r"^\| `(KVMTRACE_[A-Z_]+)[=`]", table, re.MULTILINE))
    others -= {"KVMTRACE_TOP_INTERVAL", *_FOR_ALL}  # these are options'
    assert {"KVMTRACE_CACHE_DIR", "KVMTRACE_RUNTIME_DIR", "KVMTRACE_LAB"} <= others
    names = [name for _, option in OPTIONS for name in option.envvar or ()]
    own = [name for name in names if name not in _FOR_ALL]
    assert len(own) == len(set(own)) == len(OPTIONS)
    assert not set(names) & others


def test_a_variable_has_the_name_of_its_option(monkeypatch: pytest.MonkeyPatch) -> None:
    names = {name for _, option in OPTIONS for name in option.envvar or ()}
    assert names >= {"KVMTRACE_TOP_INTERVAL", "KVMTRACE_EVENTS_JSON", "KVMTRACE_EXPLAIN_FROM"}
    assert names >= {"KVMTRACE_SERVE_MAX_VMS", "KVMTRACE_BUNDLE_OUTPUT"}
    monkeypatch.setenv("KVMTRACE_REPLAY_EVENTS", "1")
    monkeypatch.setenv("KVMTRACE_REPLAY_KIND", "poison page")
    monkeypatch.setenv("KVMTRACE_UTC", "1")
    lines = invoke("replay", str(docs.STORY)).stdout.splitlines()
    assert {line.split()[1] for line in lines} == {"poison", "page"}
    assert all(line.split()[0].endswith("Z") for line in lines)
    monkeypatch.setenv("KVMTRACE_REPLAY_KIND", "nonsense")
    result = invoke("replay", str(docs.STORY))
    assert result.exit_code == 2
    assert "hint: KVMTRACE_REPLAY_KIND in the environment has that value" in result.stderr
    given = invoke("replay", str(docs.STORY), "--kind", "exit")
    assert given.exit_code == 0


def test_no_variable_prints_the_version(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("KVMTRACE_VERSION", "KVMTRACE_HELP", "KVMTRACE_REPLAY_HELP"):
        monkeypatch.setenv(name, "1")
    assert "web-1" in invoke("replay", str(docs.STORY)).stdout


# -- completion


@contextmanager
def serving(*events: Event) -> Iterator[None]:
    session = Session(FakeSource(events))
    session.pump(0)
    feed = Answering(lambda client: send_log(session, client))
    try:
        yield
    finally:
        feed.close()
        session.close()


def completed(*words: str) -> list[str]:
    """What the shell is offered for the last word."""
    *before, last = words
    found = ShellComplete(cli.cli, {}, "kvmtrace", "_KVMTRACE_COMPLETE").get_completions(
        before, last
    )
    return [one.value for one in found]


def test_completion(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("KVMTRACE_RUNTIME_DIR", str(tmp_path))
    now = clock.now_ns()
    tenants = [
        VmSeen(now, 7, 4007, "$(reboot)"),
        VmSeen(now, 8, 4008, "a b"),
        VmSeen(now, 9, 4009, "-rf"),
        VmSeen(now, 10, 4010, "web-gone"),
        VmGone(now, 10),
    ]
    with serving(*STORY, *tenants):
        assert completed("explain", "web") == ["web-1"]
        assert completed("explain", "") == [
            *("103275-1", "4007", "4008", "4009", "db-1", "g8-1", "web-1"),
        ]
        assert completed("events", "--vm", "db") == ["db-1"]
        assert "103275-1" not in completed("events", "--vm", "")


def test_completion_without_a_serve_is_silent(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("KVMTRACE_RUNTIME_DIR", str(tmp_path))
    assert completed("explain", "") == []
    monkeypatch.setattr(RemoteSource, "connect", lambda: 1 / 0)
    assert completed("explain", "") == []
    assert capfd.readouterr() == ("", "")


# -- a line while something takes long

SLOW = """
import threading, time
from kvmtrace.cli import console
console.SLOW_SECONDS = 0.05
def slow():
    with console.busy("attaching probes"):
        time.sleep(0.6)
        console.print_status("a note")
        time.sleep(0.6)
%s
print("done", flush=True)
"""
IN_THE_MAIN_THREAD = SLOW % "slow()"
IN_ANOTHER_THREAD = SLOW % "other = threading.Thread(target=slow); other.start(); other.join()"


def on_a_terminal(code: str) -> bytes:
    """What a program of Python writes to a terminal."""
    ours, theirs = pty.openpty()
    process = subprocess.Popen([sys.executable, "-c", code], stdout=theirs, stderr=theirs)
    os.close(theirs)
    written = b""
    try:
        while data := os.read(ours, 4096):
            written += data
    except OSError:  # the other end was closed
        pass
    os.close(ours)
    assert process.wait() == 0
    return written


def test_a_line_while_something_takes_long() -> None:
    line, erase = b"kvmtrace: attaching probes ...", b"\r\x1b[K"
    expected = line + erase + b"a note\r\n" + line + erase + b"done\r\n"
    assert on_a_terminal(IN_THE_MAIN_THREAD) == expected


def test_no_such_line_beside_a_live_table() -> None:
    """The main thread draws while another one attaches."""
    assert on_a_terminal(IN_ANOTHER_THREAD) == b"a note\r\ndone\r\n"


def test_no_such_line_where_nobody_looks() -> None:
    done = subprocess.run(
        [sys.executable, "-c", IN_THE_MAIN_THREAD], capture_output=True, check=True
    )
    assert (done.stdout, done.stderr) == (b"done\n", b"a note\n")


def test_stages_of_opening_a_source(monkeypatch: pytest.MonkeyPatch) -> None:
    assert sources.stage() == ""
    with sources.in_stage("attaching probes by bpf"):
        with sources.in_stage("compiling"):
            assert sources.stage() == "compiling"
        assert sources.stage() == "attaching probes by bpf"
    assert sources.stage() == ""
