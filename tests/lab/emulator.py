"""A QEMU process: its life, its time limit, its console and its QMP monitor."""

from __future__ import annotations

import contextlib
import json
import os
import re
import shutil
import socket
import subprocess
import tempfile
import threading
import time
from pathlib import Path
from typing import Any

from tests.lab.errors import LabError, LabPanic

WORK = "kvmtrace-lab-"
PANIC = re.compile(
    r"Kernel panic - not syncing|^.{0,40}\bOops: |BUG: unable to handle", re.MULTILINE
)
CONSOLE_TAIL = 6000


def work_directory() -> Path:
    """Make a directory for a machine, named after this process; remove those of dead processes.

    A killed process leaves its directory but no QEMU: the agent in the machine powers off when the
    connection closes.
    """
    for left in Path(tempfile.gettempdir()).glob(f"{WORK}[0-9]*-*"):
        owner = left.name.removeprefix(WORK).partition("-")[0]
        if owner.isdigit() and not Path("/proc", owner).exists():
            shutil.rmtree(left, ignore_errors=True)
    return Path(tempfile.mkdtemp(prefix=f"{WORK}{os.getpid()}-"))


class Emulator:
    """A running QEMU, with its sockets and logs in a work directory."""

    def __init__(self, name: str, work: Path, command: list[str], life: float) -> None:
        self.name = name
        self.work = work
        self._log = work / "console.log"
        self._log.touch()
        with (work / "qemu.log").open("w") as errors:
            self.process = subprocess.Popen(
                command,
                stdin=subprocess.DEVNULL,
                stdout=errors,
                stderr=errors,
                start_new_session=True,
            )
        self._scanned = 0
        self._ended_because = ""
        self._life: threading.Timer | None = None
        self.limit(life)

    def connect(self, path: Path) -> socket.socket:
        """Connect to a socket that QEMU creates when it starts; LabError if it does not."""
        connection = socket.socket(socket.AF_UNIX)
        deadline = time.monotonic() + 15
        while True:
            try:
                connection.connect(str(path))
            except OSError:
                if self.process.poll() is not None or time.monotonic() > deadline:
                    connection.close()
                    errors = self._qemu_errors()
                    self.close()
                    raise LabError(f"QEMU does not start: {errors}") from None
                time.sleep(0.02)
            else:
                return connection

    def limit(self, seconds: float) -> None:
        """Kill the machine `seconds` from now."""

        def end() -> None:
            self._ended_because = f"its {seconds:g} s are over"
            self.process.kill()

        if self._life is not None:
            self._life.cancel()
        self._life = threading.Timer(seconds, end)
        self._life.daemon = True
        self._life.start()

    def _qemu_errors(self) -> str:
        with contextlib.suppress(OSError):
            lines = (self.work / "qemu.log").read_text().splitlines()
            return " ".join(line for line in lines if "warning:" not in line)[-500:]
        return ""

    @property
    def console(self) -> str:
        """Everything printed on the console so far by the kernel and the firmware."""
        with contextlib.suppress(OSError):
            return self._log.read_text(errors="replace")
        return ""

    def check(self) -> None:
        """Raise LabPanic if the kernel has died, LabError if QEMU has ended."""
        status = self.process.poll()
        written = self._log.stat().st_size if self._log.exists() else 0
        if status is None and written == self._scanned:
            return
        console = self.console
        panic = PANIC.search(console)
        self._scanned = written
        if panic is None and status is None:
            return
        if panic is not None:
            with contextlib.suppress(subprocess.TimeoutExpired):
                self.process.wait(10)  # the kernel reboots after a panic, and QEMU ends then
            console = self.console
            line = console[console.rfind("\n", 0, panic.start()) + 1 :].partition("\n")[0].strip()
            raise LabPanic(f"the kernel of {self.name} died: {line}", console[-CONSOLE_TAIL:])
        raise LabError(
            f"the machine {self.name} ended (QEMU's status {status}): "
            f"{self._ended_because or self._qemu_errors() or console.strip()[-300:]}"
        )

    def qmp(self, command: str, **arguments: object) -> dict[str, Any]:
        """Send a QMP command to QEMU and return its answer; LabError if it is refused."""
        with self.connect(self.work / "qmp.sock") as connection:
            connection.settimeout(30)
            with connection.makefile("rw") as lines:
                lines.readline()
                for request in (
                    {"execute": "qmp_capabilities"},
                    {"execute": command, "arguments": arguments},
                ):
                    lines.write(json.dumps(request) + "\n")
                    lines.flush()
                    answer: dict[str, Any] = {"event": ""}
                    while "event" in answer:
                        answer = json.loads(lines.readline())
        if "error" in answer:
            raise LabError(f"QMP {command}: {answer['error'].get('desc')}")
        return answer

    def close(self) -> None:
        """Kill it and remove its directory."""
        if self._life is not None:
            self._life.cancel()
        if self.process.poll() is None:
            self.process.kill()
        self.process.wait()
        shutil.rmtree(self.work, ignore_errors=True)
