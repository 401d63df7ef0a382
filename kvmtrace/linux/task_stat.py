"""Read /proc/PID/stat, which is of a process or of one thread (proc(5))."""

from __future__ import annotations

from kvmtrace.linux.read import read_text

# Places in ``fields``.
FLAGS = 6
_CPU_TIME = slice(11, 13)
_START = 19


def fields(stat: str) -> list[str]:
    """Return the fields after the name, state first. The name may contain anything."""
    return stat.rpartition(")")[2].split()


def start_of(stat: str) -> str | None:
    """Return when the task began (clock ticks since boot); a later one of the same id differs."""
    found = fields(stat)
    return found[_START] if len(found) > _START else None


def read_state(path: str, if_unreadable: str) -> tuple[str, ...]:
    """Return state letter, and user and system time in ticks. Takes no lock of the task's."""
    found = fields(read_text(path, 4096))
    return (found[0], *found[_CPU_TIME]) if found else (if_unreadable,)
