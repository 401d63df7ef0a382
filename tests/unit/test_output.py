"""Files that commands read and write: whose they are, who is at the other end, what goes wrong."""

from __future__ import annotations

import os
import select
import signal
import stat
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from kvmtrace import identity, sources
from tests.unit.command_line import invoke
from tests.unit.fake import STORY, FakeSource

NOBODY = 65534
ROOT = Path(__file__).parents[2]
needs_root = pytest.mark.skipif(os.geteuid() != 0, reason="gives files away")


@pytest.fixture(autouse=True)
def source(monkeypatch: pytest.MonkeyPatch) -> FakeSource:
    source = FakeSource(STORY)
    monkeypatch.setattr(sources, "open_source", lambda kind: source)
    monkeypatch.setattr(identity, "vm_processes", lambda: {})
    return source


@pytest.fixture
def recording(tmp_path: Path, source: FakeSource) -> str:
    path = str(tmp_path / "recording")
    assert invoke("record", path, "--duration", "0.1").exit_code == 0
    return path


# -- --force replaces what is ours, and nothing else


def link(path: Path) -> None:
    path.symlink_to("elsewhere")


def link_to_a_pipe(path: Path) -> None:
    os.mkfifo(path.with_name("elsewhere"))
    path.symlink_to("elsewhere")


@needs_root
@pytest.mark.parametrize("make", [Path.touch, os.mkfifo, link, link_to_a_pipe])
@pytest.mark.parametrize("command", [("record", "--duration", "0.1"), ("bundle", "-o")])
def test_what_somebody_else_put_there_is_left_alone(
    tmp_path: Path, make: Callable[[Path], None], command: tuple[str, ...], source: FakeSource
) -> None:
    path = tmp_path / "case"
    make(path)
    os.chown(path, NOBODY, NOBODY, follow_symlinks=False)
    before = path.lstat()
    for force in ((), ("--force",)):
        result = invoke(*command, str(path), *force)
        assert result.exit_code == 1
        assert "hint: name another file, or remove what is there" in result.stderr
        assert path.lstat() == before
    assert not source.polls


@pytest.mark.parametrize("make", [link, link_to_a_pipe])
def test_a_link_of_ours_is_replaced_whatever_it_leads_to(
    tmp_path: Path, make: Callable[[Path], None]
) -> None:
    path = tmp_path / "case"
    make(path)
    assert invoke("record", str(path), "--force", "--duration", "0.1").exit_code == 0
    assert path.lstat().st_mode == stat.S_IFREG | 0o600


# -- signals end what waits for somebody at the other end

WAITING = """
import contextlib, os, sys
from kvmtrace import cli, sources
from kvmtrace.cli import ending
from tests.unit.fake import STORY, FakeSource

waiting = ending.stop.waiting

@contextlib.contextmanager
def announced(blocked):
    with waiting(blocked):
        os.write(2, b"waiting\\n")
        yield

ending.stop.waiting = announced
sources.open_source = lambda kind: FakeSource(STORY)
cli.main()
"""


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
@pytest.mark.parametrize(
    "command",
    [
        ("record", "--force", "{pipe}"),
        ("replay", "{pipe}"),
        ("replay", "/dev/stdin"),
        ("explain", "web-1", "--from", "{pipe}"),
        ("bundle", "-o", "{new}", "--from", "{pipe}"),
    ],
)
def test_a_signal_ends_what_waits_for_a_pipe(
    tmp_path: Path, command: tuple[str, ...], number: signal.Signals
) -> None:
    os.mkfifo(tmp_path / "pipe")
    words = [word.format(pipe=tmp_path / "pipe", new=tmp_path / "new") for word in command]
    process = subprocess.Popen(
        [sys.executable, "-c", WAITING, *words],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        cwd=ROOT,
    )
    assert process.stderr is not None
    assert process.stderr.readline() == b"waiting\n"
    process.send_signal(number)
    process.wait(30)
    out, err = process.communicate()
    assert (process.returncode, out, err) == (0, b"", b"")
    assert list(tmp_path.iterdir()) == [tmp_path / "pipe"]


def test_a_signal_ends_a_recording_that_nobody_reads() -> None:
    read, write = os.pipe()
    chatty = "\n".join(
        (
            "from kvmtrace import cli, sources",
            "from tests.unit.fake import STORY, FakeSource",
            "FakeSource.poll = lambda self, timeout: list(STORY) * 100",
            "sources.open_source = lambda kind: FakeSource()",
            "cli.main()",
        )
    )
    process = subprocess.Popen(
        [sys.executable, "-c", chatty, "record", "--force", "/dev/stdout"],
        stdout=write,
        stderr=subprocess.PIPE,
        cwd=ROOT,
    )
    poller = select.poll()
    poller.register(write, select.POLLOUT)
    while poller.poll(0):
        assert process.poll() is None
    process.send_signal(signal.SIGTERM)
    _, err = process.communicate(timeout=30)
    os.close(read)
    os.close(write)
    assert process.returncode == 0
    assert b"ended by force" not in err


# -- errors name the file


@pytest.mark.parametrize("command", [("record", "--duration", "0.1"), ("bundle", "-o")])
def test_a_full_disk_is_told_with_its_file(command: tuple[str, ...], recording: str) -> None:
    given = ("--from", recording) if command[0] == "bundle" else ()
    result = invoke(*command, "/dev/full", "--force", *given)
    assert result.exit_code == 1
    assert "kvmtrace: /dev/full: No space left on device\n" in result.stderr


def test_a_full_standard_output_is_told(recording: str) -> None:
    with open("/dev/full", "w") as full:
        done = subprocess.run(
            [sys.executable, "-m", "kvmtrace", "replay", recording],
            stdout=full,
            stderr=subprocess.PIPE,
            cwd=ROOT,
            check=False,
            timeout=60,
        )
    assert done.returncode == 1
    assert done.stderr == b"kvmtrace: standard output: No space left on device\n"


def test_a_file_that_cannot_be_read_is_named() -> None:
    result = invoke("replay", "/proc/self/mem")
    assert (result.exit_code, result.stderr) == (
        1,
        "kvmtrace: /proc/self/mem: Input/output error\n",
    )
