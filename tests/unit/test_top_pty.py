"""The live table in a pseudo-terminal: every kind of end restores the terminal."""

from __future__ import annotations

import fcntl
import os
import pty
import re
import select
import signal
import struct
import sys
import termios
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
PATIENCE = 60.0
_NOT_PASSED_ON = ("COLUMNS", "LINES", "NO_COLOR")

PROGRAM = """
import sys
from kvmtrace.views.terminal import app, watched
from tests.unit import snapshots
calls = 0
def snapshot():
    global calls
    calls += 1
    if calls > 3 and "fail" in sys.argv:
        raise RuntimeError("the reader failed")
    return snapshots.small()
try:
    app.run(watched.Watched(snapshot), 0.1)
except RuntimeError as failure:
    print(f"raised: {failure}")
print("back in the shell")
"""


class Terminal:
    """A program in a pseudo-terminal, and its output."""

    def __init__(self, *arguments: str) -> None:
        self.pid, self.fd = pty.fork()
        if self.pid == 0:
            try:
                os.chdir(ROOT)
                # Not execv: readline sets LINES and COLUMNS behind os.environ's back.
                environ = {k: v for k, v in os.environ.items() if k not in _NOT_PASSED_ON}
                environ |= {"TERM": "xterm-256color", "PYTHONPATH": str(ROOT)}
                os.execve(sys.executable, [sys.executable, "-c", PROGRAM, *arguments], environ)
            finally:
                os._exit(127)
        self.output = b""
        self.status: int | None = None
        self.resize(80, 24)
        self.before = termios.tcgetattr(self.fd)

    def resize(self, width: int, height: int) -> None:
        fcntl.ioctl(self.fd, termios.TIOCSWINSZ, struct.pack("HHHH", height, width, 0, 0))

    def send(self, keys: bytes) -> None:
        os.write(self.fd, keys)

    def read(self) -> bool:
        """Read available output; False at the end."""
        if not select.select([self.fd], [], [], 0.1)[0]:
            return True
        try:
            data = os.read(self.fd, 65536)
        except OSError:  # EIO: the other end is closed
            return False
        self.output += data
        return bool(data)

    def wait_for(self, text: str, after: int = 0) -> int:
        """Until ``text`` was written (after that much output); the length of the output then."""
        deadline = time.monotonic() + PATIENCE
        while text.encode() not in self.output[after:]:
            assert time.monotonic() < deadline, self.output[after:]
            assert self.read(), self.output[after:]
        return len(self.output)

    def wait(self) -> int:
        """Wait for its end; return the exit status."""
        deadline = time.monotonic() + PATIENCE
        while self.read():
            assert time.monotonic() < deadline, self.output
        self.status = os.waitstatus_to_exitcode(os.waitpid(self.pid, 0)[1])
        return self.status

    def close(self) -> None:
        if self.status is None:
            os.kill(self.pid, signal.SIGKILL)
            os.waitpid(self.pid, 0)
        os.close(self.fd)


@pytest.fixture
def shown(request: pytest.FixtureRequest) -> Iterator[Terminal]:
    terminal = Terminal(*getattr(request, "param", ()))
    try:
        terminal.wait_for("web-1")
        yield terminal
    finally:
        terminal.close()


def restored(terminal: Terminal) -> None:
    """Whether each mode was reset after it was last set, and the line discipline restored."""
    modes = terminal.output
    assert b"\x1b[?1049h" in modes  # or this test sees nothing
    for on, off in (
        (b"\x1b[?1049h", b"\x1b[?1049l"),  # alternate screen
        (b"\x1b[?25l", b"\x1b[?25h"),  # cursor
        (b"\x1b[?2004h", b"\x1b[?2004l"),  # bracketed paste
        (b"\x1b[?1004h", b"\x1b[?1004l"),  # focus reports
        (b"\x1b[?7l", b"\x1b[?7h"),  # line wrap
        (b"\x1b[>", b"\x1b[<u"),  # kitty's keyboard protocol
    ):
        assert modes.rfind(off) > modes.rfind(on) >= 0, (on, off)
    for mouse in (b"1000", b"1002", b"1003", b"1006", b"1015"):
        on, off = b"\x1b[?" + mouse + b"h", b"\x1b[?" + mouse + b"l"
        assert modes.rfind(off) >= modes.rfind(on), mouse
    assert termios.tcgetattr(terminal.fd)[:4] == terminal.before[:4]


def test_keys_resize_and_quit(shown: Terminal) -> None:
    at = shown.wait_for("looping")
    shown.send(b"2\r")
    at = shown.wait_for("exits by errno and cause", at)
    shown.send(b"q1")
    at = shown.wait_for("INCIDENT", at)
    shown.resize(120, 30)
    shown.wait_for("database-with-a-long-name", at)
    shown.send(b"q")
    shown.wait_for("back in the shell")
    restored(shown)
    assert shown.wait() == 0


def test_an_idle_table_sends_its_clock_and_no_more(shown: Terminal) -> None:
    """As over ssh, where a whole screen a second would be felt."""

    def after(ticks: int, begin: int) -> bytes:
        deadline = time.monotonic() + PATIENCE
        while len(re.findall(rb"\d\d:\d\d:\d\d", shown.output[begin:])) < ticks:
            assert time.monotonic() < deadline
            assert shown.read()
        return shown.output[begin:]

    after(3, shown.wait_for("q quit"))  # with rates, which come with the second snapshot
    assert len(after(4, len(shown.output))) < 4 * 100
    shown.send(b"q")
    shown.wait_for("back in the shell")
    assert shown.wait() == 0


def test_drawn_again_on_request_and_after_a_stop(shown: Terminal) -> None:
    at = shown.wait_for("looping")
    shown.send(b"\x0c")
    at = shown.wait_for("looping", at)
    shown.send(b"\x1a")
    os.waitpid(shown.pid, os.WUNTRACED)
    shown.wait_for("\x1b[?1049l", at)
    at = len(shown.output)
    os.kill(shown.pid, signal.SIGCONT)
    shown.wait_for("looping", at)
    shown.send(b"q")
    shown.wait_for("back in the shell")
    restored(shown)
    assert shown.wait() == 0


def test_control_c(shown: Terminal) -> None:
    shown.send(b"\x03")
    shown.wait_for("back in the shell")
    restored(shown)
    assert shown.wait() == 0


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGHUP, signal.SIGINT])
def test_signals(shown: Terminal, number: signal.Signals) -> None:
    os.kill(shown.pid, number)
    shown.wait_for("back in the shell")
    restored(shown)
    assert shown.wait() == 0


@pytest.mark.parametrize("shown", [("fail",)], indirect=True)
def test_failed_reader_is_reported_on_a_restored_terminal(shown: Terminal) -> None:
    shown.wait_for("raised: the reader failed")
    shown.wait_for("back in the shell")
    restored(shown)
    assert b"Traceback" not in shown.output
    assert shown.output.rfind(b"\x1b[?1049l") < shown.output.find(b"raised: the reader failed")
    assert shown.wait() == 0


def test_a_terminal_that_hangs_up_ends_it(shown: Terminal) -> None:
    # As when ssh dies: the terminal is gone before anything can be restored.
    os.close(shown.fd)
    shown.fd = os.open(os.devnull, os.O_RDONLY)
    deadline = time.monotonic() + PATIENCE
    while (ended := os.waitpid(shown.pid, os.WNOHANG))[0] == 0:
        assert time.monotonic() < deadline
        time.sleep(0.05)
    shown.status = ended[1]
