"""Capabilities that kvmtrace needs, and how it gives up the others (capabilities(7)).

Capabilities belong to a thread. ``give_up`` is permanent, and for the calling thread and the
threads and processes that it starts afterwards.
"""

from __future__ import annotations

import ctypes
import os
from collections.abc import Collection
from dataclasses import dataclass

# include/uapi/linux/capability.h, by number
_NAMES = (
    "CHOWN DAC_OVERRIDE DAC_READ_SEARCH FOWNER FSETID KILL SETGID SETUID SETPCAP LINUX_IMMUTABLE "
    "NET_BIND_SERVICE NET_BROADCAST NET_ADMIN NET_RAW IPC_LOCK IPC_OWNER SYS_MODULE SYS_RAWIO "
    "SYS_CHROOT SYS_PTRACE SYS_PACCT SYS_ADMIN SYS_BOOT SYS_NICE SYS_RESOURCE SYS_TIME "
    "SYS_TTY_CONFIG MKNOD LEASE AUDIT_WRITE AUDIT_CONTROL SETFCAP MAC_OVERRIDE MAC_ADMIN SYSLOG "
    "WAKE_ALARM BLOCK_SUSPEND AUDIT_READ PERFMON BPF CHECKPOINT_RESTORE"
).split()

# For a VMM's descriptors, memory map and page table (fs/proc: ptrace_may_access; file modes), and
# for the pfns in the page table (pagemap shows them to CAP_SYS_ADMIN only).
READING = frozenset({"SYS_PTRACE", "DAC_READ_SEARCH", "SYS_ADMIN"})
"""For a worker that reads other processes."""

# When kvm is loaded again, programs and probes are attached again. That needs the types of modules
# (BPF_BTF_GET_FD_BY_ID: CAP_SYS_ADMIN), addresses of functions (/proc/kallsyms: CAP_SYSLOG), locked
# memory (before 5.11) and, with new CPUs, descriptors beyond the hard limit (CAP_SYS_RESOURCE).
WATCHING = READING | {"BPF", "PERFMON", "SYSLOG", "SYS_RESOURCE"}
"""For a command that watches, once it is attached, listens and has opened its files."""

WRITING_ELSEWHERE = "DAC_OVERRIDE"
"""In addition to ``WATCHING``, to detach if tracefs belongs to another user."""

_VERSION_3 = 0x20080522
_PR_CAPBSET_READ, _PR_CAPBSET_DROP = 23, 24
_PR_SET_NO_NEW_PRIVS, _PR_GET_NO_NEW_PRIVS = 38, 39
_BITS = 64

_LIBC = ctypes.CDLL(None, use_errno=True)


class _CapHeader(ctypes.Structure):
    _fields_ = (("version", ctypes.c_uint32), ("pid", ctypes.c_int))


_SETS = ("effective", "permitted", "inheritable")


class _Data(ctypes.Structure):
    """The lower half of each set, or the upper one."""

    _fields_ = tuple((name, ctypes.c_uint32) for name in _SETS)


@dataclass(frozen=True, slots=True)
class Held:
    """What a thread may do.

    ``no_new_privileges``: programs that it runs get no more than it has.
    """

    capabilities: tuple[str, ...]
    no_new_privileges: bool


def held() -> Held:
    """Return what this thread may do."""
    data = _sets()
    effective = data[0].effective | data[1].effective << 32
    names = (_name(number) for number in range(_BITS) if effective >> number & 1)
    return Held(tuple(names), _prctl(_PR_GET_NO_NEW_PRIVS) == 1)


def give_up(keep: Collection[str]) -> list[str]:
    """Give up all capabilities but ``keep``, also for programs that are run.

    Returns what the kernel refused, as text for the user; empty if nothing.
    """
    kept = sum(1 << _NAMES.index(name) for name in keep)
    for number in range(_BITS):
        if not kept >> number & 1 and _prctl(_PR_CAPBSET_READ, number) == 1:
            # This fails without CAP_SETPCAP; no_new_privs has the same effect.
            _prctl(_PR_CAPBSET_DROP, number)
    refused = []
    if _prctl(_PR_SET_NO_NEW_PRIVS, 1) != 0:
        refused.append(f"no_new_privs: {_reason()}")
    data = _sets()
    for half in (0, 1):
        mask = kept >> 32 * half & 0xFFFFFFFF
        for name in _SETS:
            setattr(data[half], name, getattr(data[half], name) & mask)
    if _LIBC.capset(ctypes.byref(_CapHeader(_VERSION_3, 0)), data) != 0:
        refused.append(f"capset: {_reason()}")
    return refused


def _sets() -> ctypes.Array[_Data]:
    """Return the capability sets; all zeros if they cannot be read."""
    data = (_Data * 2)()
    _LIBC.capget(ctypes.byref(_CapHeader(_VERSION_3, 0)), data)
    return data


def _prctl(what: int, value: int = 0) -> int:
    arguments = (ctypes.c_ulong(one) for one in (value, 0, 0, 0))
    return int(_LIBC.prctl(what, *arguments))


def _reason() -> str:
    return os.strerror(ctypes.get_errno())


def _name(number: int) -> str:
    return _NAMES[number] if number < len(_NAMES) else str(number)
