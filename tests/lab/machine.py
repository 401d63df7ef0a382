"""A machine: boot it, run things in it, get told when it dies.

Why not virtme-ng, which was tried first and boots these kernels as fast: a machine here serves many
tests, so it needs a channel that carries many programs, their input, signals and exit status at
once, where virtme-ng runs one script (and, without udev in the root, finds no port for it and
loses its status); it wants the kernel's modules copied into each root; and a panic, another
QEMU beside the system's, a read-only root shared by machines, and firmware on arm64 would each be
worked in around it. What is left of the plumbing is qemu.py and initramfs.py.
"""

from __future__ import annotations

import contextlib
import functools
import json
import os
import re
import shutil
import socket
import subprocess
import tempfile
import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Any, Self

from tests.lab import initramfs, kernel, layer, qemu, root, terminal
from tests.lab.channel import Channel, Job
from tests.lab.config import Row, row
from tests.lab.errors import CommandFailed, LabError, LabPanic, LabTimeout
from tests.lab.progress import say

__all__ = ["DEFAULT", "MOUNTS", "Job", "Machine", "Prepared", "Result", "prepare"]

DEFAULT = "trixie-newest"
BOOT_SECONDS = 90.0
LIFE_SECONDS = 3600.0
DYING = re.compile(
    r"Kernel panic - not syncing|^.{0,40}\bOops: |BUG: unable to handle", re.MULTILINE
)
STATIC_KEY_OOPS = re.compile(r"\bint3: 0000 \[#\d+\]")
MOUNTS = {
    "debugfs": "/sys/kernel/debug",
    "tracefs": "/sys/kernel/tracing",
    "cgroup2": "/sys/fs/cgroup",
    "bpf": "/sys/fs/bpf",
    "securityfs": "/sys/kernel/security",
}
WORK = "kvmtrace-lab-"
INJECTORS = ("hwpoison-inject", "mce-inject")


@dataclass(frozen=True)
class Result:
    """How a program in the machine ended: -N is signal N."""

    status: int
    stdout: str
    stderr: str


@dataclass(frozen=True)
class Prepared:
    """Everything a machine is made from, in the cache."""

    row: Row
    qemu: qemu.Qemu
    kernel: kernel.Kernel
    root: Path


@functools.cache
def prepare(name: str) -> Prepared:
    """Download and build what the machine called `name` needs; asked once per process."""
    wanted = row(name)
    found = qemu.find(wanted.arch)
    initramfs.busybox(wanted)
    return Prepared(wanted, found, kernel.fetch(wanted), root.fetch(wanted))


def _sweep() -> None:
    """Remove what killed processes left of their machines; QEMU itself ends with its process."""
    for left in Path(tempfile.gettempdir()).glob(f"{WORK}[0-9]*-*"):
        owner = left.name.removeprefix(WORK).partition("-")[0]
        if owner.isdigit() and not Path("/proc", owner).exists():
            shutil.rmtree(left, ignore_errors=True)


class Machine:
    """A running machine; use `Machine.boot` in a `with` statement."""

    def __init__(self, prepared: Prepared, memory: str, cmdline: str, life: float) -> None:
        self.row = prepared.row
        self.release = prepared.kernel.release
        _sweep()
        self.work = Path(tempfile.mkdtemp(prefix=f"{WORK}{os.getpid()}-"))
        self._share = self.work / "share"
        self._share.mkdir()
        self._shares = prepared.kernel.has("9p")
        self.boot_seconds = 0.0
        initrd = self.work / "initramfs.cpio"
        initramfs.write(prepared.row, prepared.kernel, initrd)
        parts = qemu.Parts(
            image=prepared.kernel.image,
            initramfs=initrd,
            root=prepared.root,
            modules=prepared.kernel.modules_image,
            layer=layer.fetch(prepared.row.arch),
            share=self._share,
            work=self.work,
        )
        command = qemu.arguments(prepared.qemu, prepared.row, parts, memory, cmdline)
        (self.work / "console.log").touch()
        self._errors = (self.work / "qemu.log").open("w+")
        self.process = subprocess.Popen(
            command,
            stdin=subprocess.DEVNULL,
            stdout=self._errors,
            stderr=self._errors,
            start_new_session=True,
        )
        self._outlived = ""
        self._scanned = 0
        self._life: threading.Timer | None = None
        self.limit(life)
        self.channel = Channel(self._connect(self.work / "agent.sock"), self._check)

    @classmethod
    def boot(
        cls,
        kernel: str = DEFAULT,
        *,
        cmdline_extra: str = "",
        memory: str = "3G",
        modules: Sequence[str] | None = None,
        mounts: Sequence[str] = tuple(MOUNTS),
        life: float = LIFE_SECONDS,
    ) -> Self:
        """Boot a kernel of kernels.toml and wait until programs can be run in it.

        `modules` are loaded at boot (default: KVM and the error injectors, those that the kernel
        has); `mounts` are names of MOUNTS. A boot that dies of the int3 oops that old QEMUs
        cause is tried a second time.
        """
        prepared = prepare(kernel)
        for attempt in (1, 2):
            machine = cls(prepared, memory, cmdline_extra, life)
            try:
                machine._set_up(modules, mounts)
            except LabPanic as error:
                machine.close()
                if attempt == 2 or not STATIC_KEY_OOPS.search(error.console):
                    raise
                say(f"{kernel}: the boot died of the int3 oops (QEMU's doing): trying once more")
            except BaseException:
                machine.close()
                raise
            else:
                return machine
        raise AssertionError("unreachable")

    def _connect(self, path: Path) -> socket.socket:
        """A connection to a socket that QEMU makes when it starts."""
        connection = socket.socket(socket.AF_UNIX)
        deadline = time.monotonic() + 15
        while True:
            try:
                connection.connect(str(path))
            except OSError:
                if self.process.poll() is not None or time.monotonic() > deadline:
                    connection.close()
                    said = self._qemu_said()
                    self.close()
                    raise LabError(f"QEMU does not start: {said}") from None
                time.sleep(0.02)
            else:
                return connection

    def limit(self, seconds: float) -> None:
        """End the machine in `seconds` from now, whatever it does then."""

        def end() -> None:
            self._outlived = f"its {seconds:g} s are over"
            self.process.kill()

        if self._life is not None:
            self._life.cancel()
        self._life = threading.Timer(seconds, end)
        self._life.daemon = True
        self._life.start()

    def _qemu_said(self) -> str:
        with contextlib.suppress(OSError):
            lines = (self.work / "qemu.log").read_text().splitlines()
            return " ".join(line for line in lines if "warning:" not in line)[-500:]
        return ""

    def _set_up(self, modules: Sequence[str] | None, mounts: Sequence[str]) -> None:
        start = time.monotonic()
        self.channel.wait(lambda: bool(self.channel.ready), BOOT_SECONDS, "agent in the machine")
        if modules is None:
            modules = (*self.row.arch.kvm_modules, *INJECTORS)
        lines = ["hostname lab", "ip link set lo up", "mkdir -p /dev/pts /dev/shm"]
        lines.append("mount -t tmpfs -o mode=1777 shm /dev/shm")
        lines.append("mount -t devpts -o mode=620,ptmxmode=666 devpts /dev/pts")
        lines += [f"mount -t {kind} {kind} {MOUNTS[kind]}" for kind in mounts]
        lines += [f"modprobe -q {module} || true" for module in modules]
        self.run("\n".join(lines), timeout=BOOT_SECONDS)
        self.boot_seconds = time.monotonic() - start

    @property
    def share(self) -> Path:
        """A directory here that is /mnt/share there; it ends with the machine."""
        if not self._shares:
            raise LabError(f"the kernel of {self.row.name} has no 9p: it cannot share files")
        return self._share

    @property
    def console(self) -> str:
        """What the kernel and the firmware have said on the console so far."""
        with contextlib.suppress(OSError):
            return (self.work / "console.log").read_text(errors="replace")
        return ""

    def _check(self) -> None:
        """Raise if the kernel has died or QEMU is gone."""
        status = self.process.poll()
        written = (self.work / "console.log").stat().st_size
        if status is None and written == self._scanned:
            return
        said = self.console
        dying = DYING.search(said)
        self._scanned = written
        if dying is None and status is None:
            return
        if dying is not None:
            with contextlib.suppress(subprocess.TimeoutExpired):
                self.process.wait(10)  # the kernel reboots after a panic, and QEMU ends then
            said = self.console
            line = said[said.rfind("\n", 0, dying.start()) + 1 :].partition("\n")[0].strip()
            raise LabPanic(f"the kernel of {self.row.name} died: {line}", said[-6000:])
        raise LabError(
            f"the machine {self.row.name} ended (QEMU's status {status}): "
            f"{self._outlived or self._qemu_said() or said.strip()[-300:]}"
        )

    @property
    def alive(self) -> bool:
        """Whether programs can still be run in it."""
        try:
            self._check()
        except LabError:
            return False
        return not self.channel.closed

    def start(
        self,
        command: str | list[str],
        *,
        pty: tuple[int, int] | None = None,
        env: dict[str, str] | None = None,
        on_output: Callable[[bytes], None] | None = None,
    ) -> Job:
        """Start a program in the background, with `pty=(rows, columns)` on a terminal.

        `on_output` gets its bytes as they come, in the thread that reads them.
        """
        return self.channel.start(command, pty=pty, env=env, on_output=on_output)

    def attach(self, command: str | list[str]) -> int:
        """Run a program on the terminal of whoever runs this, to its end; its status."""
        return terminal.attach(self.channel, command)

    def run(
        self,
        command: str | list[str],
        timeout: float = 60,
        *,
        check: bool = False,
        stdin: str = "",
        env: dict[str, str] | None = None,
    ) -> Result:
        """Run a program to its end; it is killed when time is up, and LabTimeout raised."""
        job = self.start(command, env=env)
        if stdin:
            job.send(stdin)
        job.close_stdin()
        try:
            job.wait(timeout)
        except LabTimeout as error:
            job.kill()
            raise LabTimeout(f"{error}; {job.tail()}") from None
        result = Result(job.status or 0, job.stdout, job.stderr)
        if check and result.status:
            said = (result.stderr or result.stdout).strip()[-1000:]
            raise CommandFailed(f"`{job.command}` ended with status {result.status}: {said}")
        return result

    def qmp(self, command: str, **arguments: object) -> dict[str, Any]:
        """One QMP command to QEMU itself; its answer."""
        with self._connect(self.work / "qmp.sock") as connection:
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
        """End the machine. What it left in `share` goes with it."""
        if self._life is not None:
            self._life.cancel()
        if self.process.poll() is None:
            self.process.kill()
        self.process.wait()
        if hasattr(self, "channel"):
            self.channel.close()
        self._errors.close()
        shutil.rmtree(self.work, ignore_errors=True)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        value: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.close()
