"""Commands in a process of their own: signals, pipes, terminals."""

from __future__ import annotations

import fcntl
import os
import select
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from tests.unit.fake import STORY


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
