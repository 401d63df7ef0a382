"""What the eBPF programs send: the parts of bpf/record.h that all its topics share.

The records of a topic are in the module of that name (``exits``, ``signals``, ``poison``,
``hardware``), each a ctypes mirror of its struct in C, field by field.
"""

from __future__ import annotations

import ctypes
from ctypes import c_char, c_uint32, c_uint64

from kvmtrace import sanitize

EXIT, POISON, SIGBUS, FAULT, MCE, VM_NEW, VM_GONE, HW, PAGE = range(1, 10)
"""``enum record_type``."""

HW_TEXT = 96
"""The longest text in a record, in bytes."""

LOST_PLACES = ("ring", "exit_keys", "exit_counts")
"""Names of ``enum lost_place``, in its order."""


class Header(ctypes.Structure):
    """``ts``: CLOCK_MONOTONIC ns; ``kvm``, ``gen``: the VM; the thread it happened in."""

    _fields_ = (
        ("ts", c_uint64),
        ("kvm", c_uint64),
        ("gen", c_uint64),
        ("type", c_uint32),
        ("tid", c_uint32),
        ("tgid", c_uint32),
        ("cpu", c_uint32),
    )


class VmRecord(ctypes.Structure):
    _fields_ = (("h", Header), ("comm", c_char * 16))


def text(raw: bytes) -> str:
    """A text of a record, cleaned; it ends in "…" if the record had no room for the rest."""
    decoded = raw.decode(errors="replace")
    return sanitize.clean(decoded + "…" if len(raw) >= HW_TEXT - 1 else decoded)
