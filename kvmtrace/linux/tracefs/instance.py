"""A tracing instance of our own: rings, filters, counters (Documentation/trace/ftrace.rst).

Other users' settings (``tracing_on``, clocks, filters) do not affect an instance, and an instance
does not affect theirs.
"""

from __future__ import annotations

import contextlib
import errno
import os
import re
import resource
import time
from collections.abc import Iterator

from kvmtrace.linux import task_stat
from kvmtrace.linux.read import read_text
from kvmtrace.linux.tracefs.ring_page import PageLayout

_CPUS = re.compile(r"(?<!\d)(\d{1,4})(?:-(\d{1,4}))?(?!\d)", re.ASCII)
_NAME = re.compile(r"kvmtrace_(\d+)_(\d+)_([0-9a-f]+)(?:_[a-z]+)?")


class Instance:
    """One set of per-CPU rings. Raises OSError where the kernel refuses."""

    def __init__(self, root: str, name: str, kib_per_cpu: int, layout: PageLayout) -> None:
        self.path = f"{root}/instances/{name}"
        self.layout = layout
        self.capacity = kib_per_cpu * 1024
        self._fds: dict[int, int] = {}
        self._last: dict[int, int] = {}
        os.mkdir(self.path)
        try:
            # CLOCK_MONOTONIC, as BPF has it.
            self.write("trace_clock", "mono")
            self.write("buffer_size_kb", str(kib_per_cpu))
            # A full ring drops and counts newer events, and keeps the first ones.
            self.write("options/overwrite", "0")
            with contextlib.suppress(OSError):
                # Entries are smaller without comms, which nothing here reads.
                self.write("options/record-cmd", "0")
            with contextlib.suppress(OSError):
                self.write("buffer_percent", "0")  # poll() wakes for the first event
        except OSError:
            self.close()
            raise

    def open_cpus(self) -> list[int]:
        """Open the rings of CPUs that came online since the last call; return their descriptors.

        Raises OSError if no descriptors are left in the first call. Later, a ring that cannot be
        opened is tried again by the next call, and keeps its events meanwhile.
        """
        opened: list[int] = []
        begun = bool(self._fds)
        for cpu in online_cpus():
            if cpu not in self._fds:
                path = f"{self.path}/per_cpu/cpu{cpu}/trace_pipe_raw"
                with contextlib.suppress(OSError if begun else FileNotFoundError):
                    fd = _open(path)
                    self._fds[cpu] = fd
                    opened.append(fd)
        return opened

    def fds(self) -> list[int]:
        """All open descriptors, for poll."""
        return list(self._fds.values())

    def drain(self) -> Iterator[bytes]:
        """Read every page that there is now, CPU by CPU, with those that are partly filled."""
        for fd in self._fds.values():
            # A ring may be filled as fast as it is read: stop after so many pages.
            for _ in range(2 + 2 * self.capacity // self.layout.size):
                try:
                    page = os.read(fd, self.layout.size)
                except (BlockingIOError, InterruptedError):
                    break
                except OSError:
                    break  # the CPU is gone
                if len(page) <= self.layout.data:
                    break
                yield page

    def dropped(self) -> int:
        """How many events found no room since the last call, on all CPUs."""
        fresh = 0
        for cpu in self._fds:
            total = sum(
                int(number)
                for number in re.findall(
                    r"^(?:overrun|commit overrun|dropped events): (\d{1,20})",
                    self.read(f"per_cpu/cpu{cpu}/stats"),
                    re.MULTILINE,
                )
            )
            fresh += max(0, total - self._last.get(cpu, 0))
            self._last[cpu] = total
        return fresh

    def write(self, file: str, text: str) -> None:
        descriptor = os.open(f"{self.path}/{file}", os.O_WRONLY | os.O_TRUNC | os.O_CLOEXEC)
        try:
            os.write(descriptor, text.encode())
        finally:
            os.close(descriptor)

    def append(self, file: str, text: str) -> None:
        """Add a line to a control file (triggers are added, not replaced)."""
        descriptor = os.open(f"{self.path}/{file}", os.O_WRONLY | os.O_APPEND | os.O_CLOEXEC)
        try:
            os.write(descriptor, f"{text}\n".encode())
        finally:
            os.close(descriptor)

    def read(self, file: str) -> str:
        """The text of a file of the instance; "" where it cannot be read."""
        return read_text(f"{self.path}/{file}")

    def close(self) -> None:
        """Close the rings and remove the instance with its triggers and filters."""
        for fd in self._fds.values():
            with contextlib.suppress(OSError):
                os.close(fd)
        self._fds.clear()
        remove(self.path)


def _open(path: str) -> int:
    """Open a ring. Each CPU needs a descriptor; the usual limit of 1024 is raised if needed."""
    flags = os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC
    try:
        return os.open(path, flags)
    except OSError as error:
        if error.errno != errno.EMFILE:
            raise
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    # Root may exceed the hard limit.
    wanted = (min(2 * soft, hard), hard) if soft < hard else (2 * soft, 2 * soft)
    with contextlib.suppress(OSError, ValueError):
        resource.setrlimit(resource.RLIMIT_NOFILE, wanted)
    return os.open(path, flags)


def remove(path: str) -> bool:
    """Remove an instance; try again for a second, as the last reader may still hold it."""
    end = time.monotonic() + 1.0
    while True:
        try:
            os.rmdir(path)
        except FileNotFoundError:
            return True
        except OSError:
            if time.monotonic() >= end:
                return False
            time.sleep(0.02)
        else:
            return True


def online_cpus(path: str = "/sys/devices/system/cpu/online") -> list[int]:
    """The CPUs that are online: ``0-3,8`` → [0, 1, 2, 3, 8]; NR_CPUS is 8192 at most."""
    try:
        with open(path, encoding="ascii", errors="replace") as file:
            found = _CPUS.findall(file.read(4096))
    except OSError:
        found = []
    if not found:
        return list(range(os.cpu_count() or 1))
    return sorted({n for first, last in found for n in range(int(first), int(last or first) + 1)})


# -- ownership by name


def own_name() -> str:
    """The name of this process's group and, with a suffix, of its instances.

    It holds the pid, the start time in ticks since boot, and the PID namespace: no other process
    ever has it, and another kvmtrace can check whether this process still runs.
    """
    pid = os.getpid()
    return f"kvmtrace_{pid}_{_started(pid)}_{_namespace():x}"


def is_dead(name: str) -> bool:
    """Whether ``name`` is the name of a kvmtrace process that has ended.

    Never true for another PID namespace, whose processes cannot be seen from here.
    """
    match = _NAME.fullmatch(name)
    if match is None or int(match[3], 16) != _namespace():
        return False
    return _started(int(match[1])) != match[2]


def _started(pid: int) -> str | None:
    return task_stat.start_of(read_text(f"/proc/{pid}/stat", 4096))


def _namespace() -> int:
    try:
        return os.stat("/proc/self/ns/pid").st_ino
    except OSError:
        return 0
