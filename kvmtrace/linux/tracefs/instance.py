"""A tracing instance of our own: rings, filters, counters (Documentation/trace/ftrace.rst).

What other users of tracefs do is never touched, and what they do (``tracing_on``, clocks, filters)
does not reach into an instance.
"""

from __future__ import annotations

import contextlib
import errno
import os
import re
import resource
import time
from collections.abc import Iterator

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
            # The clock that BPF stamps with, too.
            self.write("trace_clock", "mono")
            self.write("buffer_size_kb", str(kib_per_cpu))
            # Full means: newer events are dropped and counted. What began a storm stays.
            self.write("options/overwrite", "0")
            with contextlib.suppress(OSError):
                # Without them an entry is smaller; nothing here reads them.
                self.write("options/record-cmd", "0")
            with contextlib.suppress(OSError):
                self.write("buffer_percent", "0")  # poll() wakes for the first event
        except OSError:
            self.close()
            raise

    def open_cpus(self) -> list[int]:
        """Open the rings of CPUs that came online since the last call; their descriptors.

        Raises OSError where there are no descriptors left for the first of them; CPUs that come
        later are tried again, and their rings keep what is in them meanwhile.
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
        """Every page that there is now, CPU by CPU; partly filled ones too."""
        for fd in self._fds.values():
            # A ring that is filled as fast as it is read must not hold us forever.
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
        """Events that found no room since the last call, on all CPUs."""
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
        """Write a control file of the instance."""
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
        try:
            with open(f"{self.path}/{file}", encoding="utf-8", errors="replace") as lines:
                return lines.read()
        except OSError:
            return ""

    def close(self) -> None:
        """Close the rings and remove the instance, with its triggers and filters."""
        for fd in self._fds.values():
            with contextlib.suppress(OSError):
                os.close(fd)
        self._fds.clear()
        remove(self.path)


def _open(path: str) -> int:
    """A ring's descriptor. There is one for each CPU, and the usual limit is 1024 of them."""
    flags = os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC
    try:
        return os.open(path, flags)
    except OSError as error:
        if error.errno != errno.EMFILE:
            raise
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    # Where the hard limit is reached, root may go beyond it.
    wanted = (min(2 * soft, hard), hard) if soft < hard else (2 * soft, 2 * soft)
    with contextlib.suppress(OSError, ValueError):
        resource.setrlimit(resource.RLIMIT_NOFILE, wanted)
    return os.open(path, flags)


def remove(path: str, seconds: float = 1.0) -> bool:
    """Remove an instance; tries again for a while, since the last reader may still be leaving."""
    end = time.monotonic() + seconds
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
    """``0-3,8`` → [0, 1, 2, 3, 8]; NR_CPUS is 8192 at most."""
    try:
        with open(path, encoding="ascii", errors="replace") as file:
            found = _CPUS.findall(file.read(4096))
    except OSError:
        found = []
    if not found:
        return list(range(os.cpu_count() or 1))
    return sorted({n for first, last in found for n in range(int(first), int(last or first) + 1)})


# -- whose is it


def own_name() -> str:
    """The name of this process's group and, with a suffix, instances.

    Process, its start in ticks since boot, and its PID namespace: a name that no other process
    ever has, and from which another kvmtrace can see whether we still live.
    """
    pid = os.getpid()
    return f"kvmtrace_{pid}_{_started(pid)}_{_namespace():x}"


def is_dead(name: str) -> bool:
    """Whether ``name`` was given by a kvmtrace that is no more.

    Never true for one of another PID namespace: its processes cannot be seen from here.
    """
    match = _NAME.fullmatch(name)
    if match is None or int(match[3], 16) != _namespace():
        return False
    return _started(int(match[1])) != int(match[2])


def _started(pid: int) -> int | None:
    try:
        with open(f"/proc/{pid}/stat", "rb") as file:
            # The command name, in parentheses, may hold anything.
            return int(file.read().rpartition(b")")[2].split()[19])
    except (OSError, IndexError, ValueError):
        return None


def _namespace() -> int:
    try:
        return os.stat("/proc/self/ns/pid").st_ino
    except OSError:
        return 0
