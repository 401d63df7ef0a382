"""A machine: boot it, run programs in it, and detect that its kernel has died.

virtme-ng was tried first; it boots these kernels as fast. It was not chosen because it runs one
script, while a machine of the lab serves many tests and needs a channel for many programs at once,
with input, signals and exit status. Without udev in the root, virtme-ng finds no port for the
script's status. It needs the kernel's modules copied into each root. Panics, a second QEMU, a
read-only root shared by machines, and firmware on arm64 would each have needed a workaround.
"""

from __future__ import annotations

import functools
import re
import tarfile
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from types import TracebackType
from typing import Any, Self

from tests.lab import initramfs, kernel, layer, qemu, root, terminal, without
from tests.lab.channel import Channel, Job
from tests.lab.compiled import BYTECODE, PROGRAMS, Compiled, program_sources
from tests.lab.config import Row, roots, row
from tests.lab.emulator import Emulator, work_directory
from tests.lab.errors import CommandFailed, LabError, LabPanic, LabTimeout
from tests.lab.progress import print_status, step

__all__ = ["DEFAULT", "MOUNTS", "Job", "Machine", "Prepared", "Result", "prepare"]

DEFAULT = "trixie-newest"
BOOT_SECONDS = 180.0
COMPILE_SECONDS = 600.0
LIFE_SECONDS = 3600.0
STATIC_KEY_OOPS = re.compile(r"\bint3: 0000 \[#\d+\]")
MOUNTS = {
    "debugfs": "/sys/kernel/debug",
    "tracefs": "/sys/kernel/tracing",
    "cgroup2": "/sys/fs/cgroup",
    "bpf": "/sys/fs/bpf",
    "securityfs": "/sys/kernel/security",
}
INJECTORS = ("hwpoison-inject", "mce-inject")


@dataclass(frozen=True)
class Result:
    """The end of a program in the machine; status -N means signal N."""

    status: int
    stdout: str
    stderr: str


@dataclass(frozen=True)
class Prepared:
    """Everything that a machine is made from, in the cache."""

    row: Row
    qemu: qemu.Qemu
    kernel: kernel.Kernel
    root: Path

    def compiled(self, lacking: Sequence[str]) -> tuple[Compiled, ...]:
        """What the first start compiles on this kernel and root, with the current tree."""
        row = self.row
        if self.kernel.modules_image is None:
            return ()  # files of an initramfs have no times, by which Python judges its bytecode
        root, tree = self.root.parent.name, layer.fetch(row.arch).parent.name
        found = [Compiled(f"bytecode-{row.root.name}-{row.arch.name}", BYTECODE, root, tree)]
        # By eBPF, little is tested on other architectures, and compiling takes minutes.
        if not row.arch.foreign and "bcc" not in lacking:
            build, sources = self.kernel.image.parent.name, program_sources()
            found.append(Compiled(f"programs-{row.name}", PROGRAMS, root, build, sources))
        return tuple(found)


@functools.cache
def prepare(name: str, root_name: str = "") -> Prepared:
    """Download and build what the machine called `name` needs, once per process.

    ``root_name``: another root of kernels.toml than the kernel's own.
    """
    wanted = row(name)
    if root_name:
        wanted = replace(wanted, root=roots()[root_name])
    found = qemu.find(wanted.arch)
    initramfs.busybox(wanted)
    return Prepared(wanted, found, kernel.fetch(wanted), root.fetch(wanted))


class Machine:
    """A running machine: `with Machine.boot(...) as machine`."""

    def __init__(
        self,
        prepared: Prepared,
        memory: str,
        cmdline: str,
        life: float,
        *,
        choices: qemu.Choices = qemu.PLAIN,
        over: Mapping[str, bytes] | None = None,
    ) -> None:
        self.row = prepared.row
        self.release = prepared.kernel.release
        self.work = work = work_directory()
        self._share = work / "share"
        self._share.mkdir()
        self._shares = prepared.kernel.has("9p")
        self.boot_seconds = 0.0
        self._over = over or {}
        parts = self._parts(prepared)
        if choices.nested:
            cmdline = f"kvm-arm.mode=nested {cmdline}"
        command = qemu.arguments(prepared.qemu, prepared.row, parts, memory, cmdline, choices)
        self.emulator = Emulator(prepared.row.name, work, command, life)
        agent = self.emulator.connect(work / "agent.sock")
        self.channel = Channel(agent, self.emulator.check)

    @classmethod
    def boot(
        cls,
        kernel: str = DEFAULT,
        *,
        cmdline_extra: str = "",
        memory: str = "3G",
        modules: Sequence[str] | None = None,
        mounts: Sequence[str] = tuple(MOUNTS),
        lacking: Sequence[str] = (),
        life: float = LIFE_SECONDS,
        ras: bool = False,
        nested: bool = False,
        cpu: str = "",
        counting: bool = False,
    ) -> Self:
        """Boot a kernel of kernels.toml and wait until programs can be run in it.

        `modules`: loaded at boot (default: KVM and the error injectors that the kernel has).
        `mounts`: names of MOUNTS. `lacking`: what is removed from the root, names of without.py
        ("bcc", "textual"). `ras`: the machine's firmware reports hardware errors (ACPI's GHES;
        arm64 only), see cper.py. `nested`: its guests can be hypervisors (arm64 only). `cpu`:
        another vendor's ("intel"; amd64 only), which has no KVM. `counting`: its clock advances by
        1 ns an instruction, and jumps to the next timer when it is idle.

        A boot that dies of the int3 oops of old QEMUs is retried once.
        """
        prepared = prepare(kernel)
        kept = {one: one.files for one in prepared.compiled(lacking)}
        over = {path: content for files in kept.values() for path, content in (files or {}).items()}
        is_usual = not (cmdline_extra or lacking or cpu or modules is not None)
        is_usual = is_usual and set(mounts) == set(MOUNTS)
        choices = qemu.Choices(ras, nested, cpu, counting)
        for attempt in (1, 2):
            machine = cls(prepared, memory, cmdline_extra, life, choices=choices, over=over)
            try:
                machine._set_up(modules, mounts, lacking)
                if is_usual:
                    machine._compile(one for one, files in kept.items() if files is None)
            except LabPanic as error:
                machine.close()
                if attempt == 2 or not STATIC_KEY_OOPS.search(error.console):
                    raise
                print_status(
                    f"{kernel}: the boot died of an int3 oops, a bug of old QEMUs: retrying"
                )
            except BaseException:
                machine.close()
                raise
            else:
                return machine
        raise AssertionError("unreachable")

    def _parts(self, prepared: Prepared) -> qemu.Parts:
        """Write its initramfs and name its disks."""
        initrd = self.work / "initramfs.cpio"
        disks: tuple[Path, ...] = (prepared.root, layer.fetch(prepared.row.arch))
        if prepared.kernel.modules_image is None:
            initramfs.write_whole(prepared.row, disks, initrd)
            disks = ()
        else:
            initramfs.write(prepared.row, prepared.kernel, initrd, self._over)
            disks = (*disks, prepared.kernel.modules_image)
        return qemu.Parts(prepared.kernel.image, initrd, disks, self._share, self.work)

    def _set_up(
        self, modules: Sequence[str] | None, mounts: Sequence[str], lacking: Sequence[str]
    ) -> None:
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
        for line in without.commands(lacking):
            self.run(line, timeout=BOOT_SECONDS, check=True)
        self.boot_seconds = time.monotonic() - start

    def _compile(self, missing: Iterable[Compiled]) -> None:
        """Compile what no usual machine has yet compiled, and keep it for the next ones."""
        for one in missing:
            with step(f"{self.row.name}: what the first start compiles"):
                why = self._kept(one)
            if why:
                print_status(f"{self.row.name}: each machine compiles anew: {why}")

    def _kept(self, compiled: Compiled) -> str | None:
        """Compile it and keep it; returns why that failed."""
        job = self.start(compiled.command)
        job.close_stdin()
        try:
            if job.wait(COMPILE_SECONDS):
                return job.stderr[-300:].strip() or f"status {job.status}"
            compiled.keep(bytes(job.output["out"]))
        except (LabTimeout, tarfile.TarError) as error:
            job.kill()
            return str(error)
        return None

    @functools.cached_property
    def page_shift(self) -> int:
        """Base-2 logarithm of the machine's page size."""
        return int(self.run("getconf PAGESIZE", check=True).stdout).bit_length() - 1

    @property
    def share(self) -> Path:
        """A directory of this host that is /mnt/share in the machine; removed with it."""
        if not self._shares:
            raise LabError(f"the kernel of {self.row.name} has no 9p: it cannot share files")
        return self._share

    @property
    def console(self) -> str:
        """Everything printed on the console so far by the kernel and the firmware."""
        return self.emulator.console

    def limit(self, seconds: float) -> None:
        """Kill the machine `seconds` from now."""
        self.emulator.limit(seconds)

    def qmp(self, command: str, **arguments: object) -> dict[str, Any]:
        """Send a QMP command to QEMU and return its answer; LabError if it is refused."""
        return self.emulator.qmp(command, **arguments)

    def suspend(self, seconds: float) -> None:
        """Suspend it to RAM (ACPI's S3) for that long; return once it runs again.

        Its share is unmounted first: the 9p driver does not outlive the reset of its device.
        Boot it with ``tsc=reliable``: QEMU's ACPI timer, by which the TSC is judged, stands still
        after S3, and time with it.
        """
        job = self.start(
            "umount /mnt/share && echo deep >/sys/power/mem_sleep && echo mem >/sys/power/state"
        )
        deadline = time.monotonic() + BOOT_SECONDS
        while self.qmp("query-status")["return"]["status"] != "suspended":
            if job.poll() is not None or time.monotonic() > deadline:
                raise LabError(f"{self.row.name} cannot be suspended: {job.tail()}")
            time.sleep(0.2)
        time.sleep(seconds)
        self.qmp("system_wakeup")
        job.wait(BOOT_SECONDS)

    @property
    def alive(self) -> bool:
        """Whether it can still run programs."""
        try:
            self.emulator.check()
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

        `on_output` is called with its output, in the thread that reads it.
        """
        return self.channel.start(command, pty=pty, env=env, on_output=on_output)

    def attach(self, command: str | list[str]) -> int:
        """Run a program on this process's terminal and return its exit status."""
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
        """Run a program to its end. On timeout it is killed and LabTimeout raised."""
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
            output = (result.stderr or result.stdout).strip()[-1000:]
            raise CommandFailed(f"`{job.command}` ended with status {result.status}: {output}")
        return result

    def close(self) -> None:
        """End the machine and remove its `share`."""
        self.emulator.close()
        self.channel.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        value: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.close()
