"""VMM processes looked up where a hanging read may be given up on: see ``proc_reader``.

The same questions as in ``identity``, which answers them in a worker process.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from typing import TypeVar

from kvmtrace.linux.proc_reader import READER, ProcReader, Unreadable
from kvmtrace.vmm import identity
from kvmtrace.vmm.identity import Identity

SCAN_SECONDS = 30.0
LOOK_SECONDS = 0.5
MAX_DESCRIPTORS = 4096

_POLL_SECONDS = 0.1
_T = TypeVar("_T")


@dataclass(frozen=True, slots=True)
class VmProcess:
    """Who a process is. ``unread``: why only what cannot hang was read; None if all was."""

    identity: Identity
    unread: str | None = None


def identify(pid: int, proc: str = "/proc", reader: ProcReader = READER) -> VmProcess:
    """Name, UUID and VMM of a process. A command line that cannot be read is done without."""
    try:
        return VmProcess(reader.call(pid, identity.identify, pid, proc))
    except Unreadable as error:
        return VmProcess(identity.identify(pid, proc, command_line=False), str(error))


def vm_processes(proc: str = "/proc", reader: ProcReader = READER) -> dict[int, int]:
    """{pid: VMs} of processes that hold a VM, as ``identity.vm_processes``.

    A process that hangs is left out: it is met by what its VM does.
    """
    counts = _of_each(identity.count_vms, identity.pids(proc), proc, SCAN_SECONDS, reader)
    return {pid: count for pid, count in counts.items() if count is not None}


def guest_memfds(
    pids: Iterable[int], proc: str = "/proc", reader: ProcReader = READER
) -> dict[int, dict[int, int]]:
    """{pid: {inode: device}} of the guest_memfds that processes hold, as far as that is read."""
    return _of_each(identity.guest_memfds, list(pids), proc, LOOK_SECONDS, reader)


def vm_descriptor(pid: int, proc: str = "/proc", reader: ProcReader = READER) -> str | None:
    """A descriptor by which a process holds a VM; None if it holds none.

    Raises Unreadable, also where it has too many to look through.
    """
    found: str | None = reader.call(pid, identity.vm_descriptor, pid, proc, MAX_DESCRIPTORS)
    return found


def each(
    function: Callable[[int, str], _T], pids: list[int], proc: str
) -> Iterator[tuple[int, _T]]:
    """(pid, what the function says of it); called in the worker process."""
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
        pass  # what was read until then
    return found
