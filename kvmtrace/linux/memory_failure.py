"""Read how the kernel handles memory failures: its settings, and what processes asked for."""

from __future__ import annotations

import contextlib
import glob
import os
import re
from collections.abc import Iterable, Mapping

from kvmtrace.linux import task_stat
from kvmtrace.linux.read import read_text

# include/linux/sched.h; proc_pid_stat(5), field 9
PF_MCE_PROCESS = 0x00000080
PF_MCE_EARLY = 0x08000000
_MAX_THREADS = 4096

_PATTERNS = ("*memory_failure*", "*soft_offline*")


def settings(vm: str = "/proc/sys/vm") -> dict[str, int]:
    """Return the sysctls by name ("memory_failure_early_kill"), as far as this kernel has them."""
    found = {}
    for pattern in _PATTERNS:
        for path in sorted(glob.glob(f"{vm}/{pattern}")):
            text = read_text(path, 64).strip()
            if re.fullmatch(r"-?\d{1,9}", text, re.ASCII):
                found[os.path.basename(path)] = int(text)
    return found


def wishes(pid: int, proc: str = "/proc") -> frozenset[str | None]:
    """Return what the threads of a process asked for (prctl(2), PR_MCE_KILL).

    "early", "late", or None for a thread that leaves it to the sysctl; empty if it is gone. A read
    can wait for the process: call it by ``proc_reader``.
    """
    found = set()
    with contextlib.suppress(OSError):
        for number, name in enumerate(os.listdir(f"{proc}/{pid}/task")):
            if number == _MAX_THREADS:
                break
            flags = flags_of(read_text(f"{proc}/{pid}/task/{name}/stat", 4096))
            if flags is not None:
                found.add(_wish(flags))
    return frozenset(found)


def flags_of(stat: str) -> int | None:
    """Return the flags of a task; None if this is not its stat."""
    flags = "".join(task_stat.fields(stat)[task_stat.FLAGS : task_stat.FLAGS + 1])
    return int(flags) if re.fullmatch(r"\d{1,10}", flags, re.ASCII) else None


def _wish(flags: int) -> str | None:
    if not flags & PF_MCE_PROCESS:
        return None
    return "early" if flags & PF_MCE_EARLY else "late"


def is_notified_early(wished: Iterable[str | None], sysctls: Mapping[str, int]) -> bool | None:
    """Whether the kernel notifies the process of a poisoned page before it accesses it.

    One thread that wants it is enough (find_early_kill_thread, mm/memory-failure.c). None if that
    is not known.
    """
    wished = frozenset(wished)
    if "early" in wished:
        return True
    by_default = sysctls.get("memory_failure_early_kill")
    if None in wished:
        return None if by_default is None else bool(by_default)
    return False if wished else None
