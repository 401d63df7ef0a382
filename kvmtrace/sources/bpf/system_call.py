"""bpf(2) without a library: the system call, and what libbpf would add to it.

Structures here and in the modules that import this one are parts of ``union bpf_attr``
(include/uapi/linux/bpf.h), named as there.
"""

from __future__ import annotations

import contextlib
import ctypes
import errno
import os
import resource

_NUMBERS = {"x86_64": 321, "aarch64": 280}  # include/uapi/asm-generic/unistd.h, syscall_64.tbl
_TRIES = 5  # of a call that a signal interrupts in the verifier

LIBC = ctypes.CDLL(None, use_errno=True)
LIBC.syscall.restype = ctypes.c_long


def bpf(command: int, attributes: ctypes.Structure) -> int:
    """One command of bpf(2); its result. Raises OSError."""
    for _ in range(_TRIES):
        result = int(
            LIBC.syscall(
                ctypes.c_long(_NUMBERS.get(os.uname().machine, 280)),
                ctypes.c_long(command),
                ctypes.byref(attributes),
                ctypes.c_ulong(ctypes.sizeof(attributes)),
            )
        )
        if result >= 0:
            return result
        number = ctypes.get_errno()
        if number != errno.EAGAIN:
            break
    raise OSError(number, os.strerror(number))


def bpf_charged(command: int, attributes: ctypes.Structure) -> int:
    """As ``bpf``, for what takes memory: before Linux 5.11 that counts as locked memory."""
    try:
        return bpf(command, attributes)
    except PermissionError:
        endless = (resource.RLIM_INFINITY, resource.RLIM_INFINITY)
        with contextlib.suppress(OSError, ValueError):
            resource.setrlimit(resource.RLIMIT_MEMLOCK, endless)
        return bpf(command, attributes)
