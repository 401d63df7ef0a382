"""Run a program of a machine on the host's terminal."""

from __future__ import annotations

import os
import select
import signal
import sys
import termios
import tty

from tests.lab.channel import Channel
from tests.lab.errors import LabError

LEAVE = b"\x1b[?1049l\x1b[?1000l\x1b[?1002l\x1b[?1003l\x1b[?1006l\x1b[?2004l\x1b[?25h\x1b[0m\r\n"
"""Resets terminal modes (alternate screen, mouse reports, …) after a machine has died."""


def attach(channel: Channel, command: str | list[str]) -> int:
    """Run `command` on this process's terminal and return its exit status."""
    keys, screen = sys.stdin.fileno(), sys.stdout.fileno()
    if not (os.isatty(keys) and os.isatty(screen)):
        raise LabError("stdin and stdout have to be a terminal")
    environment = {name: os.environ[name] for name in ("TERM", "COLORTERM") if name in os.environ}
    saved = termios.tcgetattr(keys)
    resized = False

    def on_resize(*_: object) -> None:
        nonlocal resized
        resized = True

    before = signal.signal(signal.SIGWINCH, on_resize)
    tty.setraw(keys)
    finished = False
    try:
        job = channel.start(
            command, pty=_size(screen), env=environment, on_output=lambda data: _show(screen, data)
        )
        while job.poll() is None:
            channel.alive()
            if channel.closed:
                raise LabError("the machine is gone")
            if resized:
                resized = False
                job.resize(*_size(screen))
            if select.select([keys], [], [], 0.1)[0]:
                job.send(os.read(keys, 4096))
        finished = True
        return job.wait(1)
    finally:
        if not finished:
            os.write(screen, LEAVE)
        termios.tcsetattr(keys, termios.TCSADRAIN, saved)
        signal.signal(signal.SIGWINCH, before)


def _size(screen: int) -> tuple[int, int]:
    size = os.get_terminal_size(screen)
    return (size.lines or 24, size.columns or 80)


def _show(screen: int, data: bytes) -> None:
    while data:
        data = data[os.write(screen, data) :]
