"""Capabilities of a command that runs long, in all its threads and processes."""

from __future__ import annotations

import os
import re
import signal
import subprocess
import sys
import urllib.request
from pathlib import Path

import pytest

from kvmtrace import sources
from kvmtrace.cli import inputs
from kvmtrace.cli.signals import stop
from kvmtrace.linux import privileges
from kvmtrace.linux.proc_reader import ProcReader
from kvmtrace.linux.tracefs import mount
from tests.unit.command_line import invoke
from tests.unit.fake import STORY, FakeSource
from tests.unit.waiting import until

ROOT = Path(__file__).parents[2]
SETPCAP = "SETPCAP" in privileges.held().capabilities

as_root = pytest.mark.skipif(
    os.geteuid() != 0 or not SETPCAP, reason="needs privileges that can be given up"
)


def mask(names: frozenset[str] | set[str]) -> int:
    """As in /proc/PID/status, of those that this process has."""
    held = set(privileges.held().capabilities)
    return sum(1 << privileges._NAMES.index(name) for name in names & held)


def status(text: str) -> dict[str, int]:
    """Capabilities and no_new_privs of /proc/PID/status, as numbers."""
    found = dict(re.findall(r"^(Cap\w+|NoNewPrivs):\s*(\w+)$", text, re.MULTILINE))
    return {name: int(value, 16) for name, value in found.items()}


def run(code: str, *before: str) -> str:
    """In another process, because it is permanent."""
    command = [*before, sys.executable, "-c", code]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return done.stdout


GIVEN_UP = """
import subprocess
from kvmtrace.linux import privileges
print(open("/proc/self/status").read())
assert privileges.give_up(privileges.WATCHING) == []
print("=====")
print(open("/proc/self/status").read())
print("=====")
print(subprocess.run(["cat", "/proc/self/status"], capture_output=True, text=True).stdout)
"""


@as_root
def test_children_do_not_have_what_was_given_up() -> None:
    _, here, child = map(status, run(GIVEN_UP).split("====="))
    kept = mask(privileges.WATCHING)
    for now in (here, child):
        assert now["CapEff"] == now["CapPrm"] == kept
        assert now["NoNewPrivs"] == 1
        assert now["CapBnd"] & ~mask(privileges.WATCHING) == 0


@as_root
def test_a_user_with_ambient_capabilities_keeps_them_for_its_workers() -> None:
    granted = "+sys_ptrace,+net_raw,+dac_read_search"
    user = ["setpriv", "--reuid=65534", "--regid=65534", "--clear-groups"]
    user += ["--inh-caps", granted, "--ambient-caps", granted]
    before, here, child = map(status, run(GIVEN_UP, *user).split("====="))
    assert before["CapEff"] == mask({"SYS_PTRACE", "NET_RAW", "DAC_READ_SEARCH"})
    for now in (here, child):
        assert now["CapEff"] == now["CapAmb"] == mask({"SYS_PTRACE", "DAC_READ_SEARCH"})


def test_without_capabilities_there_is_nothing_to_give_up() -> None:
    user = ["setpriv", "--reuid=65534", "--regid=65534", "--clear-groups"] if SETPCAP else []
    before, here, child = map(status, run(GIVEN_UP, *user).split("====="))
    assert before["CapEff"] == here["CapEff"] == child["CapEff"] == 0
    assert here["CapBnd"] == before["CapBnd"]  # which it may not change
    assert (before["NoNewPrivs"], here["NoNewPrivs"], child["NoNewPrivs"]) == (0, 1, 1)


def read_own_status() -> str:
    return Path("/proc/self/status").read_text()


@as_root
def test_a_worker_may_read_processes_and_no_more() -> None:
    reader = ProcReader()
    try:
        worker = status(reader.call(1, read_own_status))
    finally:
        reader.close()
    assert worker["CapEff"] == worker["CapPrm"] == mask(privileges.READING)
    assert worker["NoNewPrivs"] == 1


SERVE = """
from kvmtrace import cli, sources
from tests.unit.fake import STORY, FakeSource
sources.open_source = lambda kind: FakeSource(STORY)
cli.main()
"""


@as_root
def test_no_thread_of_serve_keeps_more_than_it_needs(own_directory: Path) -> None:
    process = subprocess.Popen(
        [sys.executable, "-c", SERVE, "serve", "--listen", "127.0.0.1:0"],
        stdin=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
        text=True,
        cwd=ROOT,
    )
    try:
        assert process.stderr is not None
        url = process.stderr.readline().removeprefix("serving ").strip()
        threads = [
            status((task / "status").read_text())
            for task in Path(f"/proc/{process.pid}/task").iterdir()
        ]
        assert len(threads) >= 4  # main, end, http, reader
        assert {thread["CapEff"] for thread in threads} == {mask(privileges.WATCHING)}
        assert {thread["NoNewPrivs"] for thread in threads} == {1}
        assert list(own_directory.iterdir())
        with urllib.request.urlopen(url) as answer:
            metrics = answer.read().decode()
        (told,) = re.findall(r'^kvmtrace_privileges_info\{capabilities="(.*?)"', metrics, re.M)
        assert mask(set(told.split(","))) == mask(privileges.WATCHING)
        process.send_signal(signal.SIGTERM)
        said = process.communicate(timeout=30)[1].splitlines()
        assert [line for line in said if not line.startswith("kvmtrace: incident ")] == []
        assert process.returncode == 0
        assert not list(own_directory.iterdir())
    finally:
        process.kill()
        process.wait()


@as_root
def test_a_hook_has_no_capabilities(tmp_path: Path) -> None:
    hook, found = tmp_path / "hook", tmp_path / "status"
    hook.write_text(f"#!/bin/sh\ncat /proc/self/status >{found}.part; mv {found}.part {found}\n")
    hook.chmod(0o755)
    process = subprocess.Popen(
        [sys.executable, "-c", SERVE, "serve", "--listen=127.0.0.1:0", f"--on-incident={hook}"],
        stdin=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
        cwd=ROOT,
    )
    try:
        until(found.exists)
        hooks = status(found.read_text())
        assert hooks["CapEff"] == hooks["CapPrm"] == hooks["CapInh"] == 0
        assert hooks["NoNewPrivs"] == 1
    finally:
        process.terminate()
        assert process.wait(30) == 0


def test_a_refusal_is_printed_and_the_command_goes_on(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    class Refusing:
        def prctl(self, what: int, *_: object) -> int:
            return 1 if what == privileges._PR_CAPBSET_READ else -1

        def capget(self, *_: object) -> int:
            return 0

        def capset(self, *_: object) -> int:
            return -1

    monkeypatch.setattr(privileges, "_LIBC", Refusing())
    monkeypatch.setattr(stop, "owns_process", True)
    monkeypatch.setattr(sources, "open_source", lambda kind: FakeSource(STORY))
    result = invoke("events", "--count", "1", "--source", "bpf")
    assert result.exit_code == 0
    assert len(result.stdout.splitlines()) == 1
    said = [line for line in result.stderr.splitlines() if "privileges" in line]
    assert [line.split(": ")[2] for line in said] == ["no_new_privs", "capset"]


def test_a_tracefs_of_another_user_can_still_be_cleaned_up(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    kept: list[frozenset[str]] = []

    def give_up(keep: frozenset[str]) -> list[str]:
        kept.append(keep)
        return []

    monkeypatch.setattr(stop, "owns_process", True)
    monkeypatch.setattr(privileges, "give_up", give_up)
    monkeypatch.setattr(mount, "tracefs", lambda: str(tmp_path))
    inputs.give_up_privileges()
    monkeypatch.setattr(os, "geteuid", lambda: os.getuid() + 1)
    inputs.give_up_privileges()
    assert kept == [privileges.WATCHING, privileges.WATCHING | {"DAC_OVERRIDE"}]
