"""Look up VMM processes in a worker process, so that a read that hangs can be given up.

The functions are those of ``identity``, called by ``proc_reader``.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from typing import TypeVar

from kvmtrace.linux import memory_failure
from kvmtrace.linux.proc_reader import READER, ProcReader, Unreadable
from kvmtrace.vmm import identity
from kvmtrace.vmm.identity import Identity

SCAN_SECONDS = 30.0
LOOKUP_SECONDS = 0.5
MAX_DESCRIPTORS = 4096

_POLL_SECONDS = 0.1
_T = TypeVar("_T")


@dataclass(frozen=True, slots=True)
class VmProcess:
    """A process's identity. ``unread``: why only files were read that cannot hang; None if all."""

    identity: Identity
    unread: str | None = None


def identify(pid: int, proc: str = "/proc", reader: ProcReader = READER) -> VmProcess:
    """Return name, UUID and VMM of a process, without its command line if that cannot be read."""
    try:
        return VmProcess(reader.call(pid, identity.identify, pid, proc))
    except Unreadable as error:
        return VmProcess(identity.identify(pid, proc, command_line=False), str(error))


def vm_processes(proc: str = "/proc", reader: ProcReader = READER) -> dict[int, int]:
    """Return {pid: VMs} of processes that hold a VM, as ``identity.vm_processes``.

    A process whose read hangs is left out; its VM is found by its events.
    """
    counts = _of_each(identity.count_vms, identity.pids(proc), proc, SCAN_SECONDS, reader)
    return {pid: count for pid, count in counts.items() if count is not None}


def guest_memfds(
    pids: Iterable[int], proc: str = "/proc", reader: ProcReader = READER
) -> dict[int, dict[int, int]]:
    """Return {pid: {inode: device}} of processes' guest_memfds, as far as they can be read."""
    return _of_each(identity.guest_memfds, list(pids), proc, LOOKUP_SECONDS, reader)


def vm_descriptor(pid: int, proc: str = "/proc", reader: ProcReader = READER) -> str | None:
    """Return a descriptor by which a process holds a VM; None if it holds none.

    Raises Unreadable, also if the process has more than ``MAX_DESCRIPTORS``.
    """
    found: str | None = reader.call(pid, identity.vm_descriptor, pid, proc, MAX_DESCRIPTORS)
    return found


def memory_failure_wishes(
    pids: Iterable[int], proc: str = "/proc", reader: ProcReader = READER
) -> dict[int, frozenset[str | None]]:
    """Return {pid: ``memory_failure.wishes``}, as far as they can be read."""
    return _of_each(memory_failure.wishes, list(pids), proc, LOOKUP_SECONDS, reader)


def each(
    function: Callable[[int, str], _T], pids: list[int], proc: str
) -> Iterator[tuple[int, _T]]:
    """Yield (pid, the function's result); runs in the worker process."""
    for pid in pids:
        yield pid, function(pid, proc)


def _of_each(
    function: Callable[[int, str], _T],
    pids: list[int],
    proc: str,
    seconds: float,
    reader: ProcReader,
) -> dict[int, _T]:
    found: dict[int, _T] = {}
    pids = [pid for pid in pids if not reader.hung_lately(pid)]
    deadline = time.monotonic() + seconds
    try:
        while pids and time.monotonic() < deadline:
            stream, at = reader.stream(deadline, each, function, pids, proc), 0
            while not stream.done and not stream.stalled and time.monotonic() < deadline:
                some, item = stream.next(min(deadline, time.monotonic() + _POLL_SECONDS))
                if some and item is not None:
                    found[item[0]] = item[1]
                    at += 1
            if stream.done:
                break
            if at < len(pids) and (stream.stalled or stream.sleeps):
                reader.hung(pids[at])
            stream.close()
            pids = pids[at + 1 :]
    except Unreadable:
        pass  # keep what was read until then
    return found
