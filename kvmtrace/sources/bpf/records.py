"""What the eBPF programs send: ctypes mirrors of bpf/record.h, name for name."""

from __future__ import annotations

import ctypes
from ctypes import c_char, c_int32, c_uint8, c_uint32, c_uint64

EXIT, POISON, SIGBUS, FAULT, MCE, VM_NEW, VM_GONE, HW, PAGE = range(1, 10)
HW_MC_EVENT, HW_EXTLOG, HW_APEI, HW_ARM, HW_NON_STANDARD = range(5)

ACCESS_READ, ACCESS_WRITE, ACCESS_EXEC, ACCESS_PRIVATE, ACCESS_KNOWN = 1, 2, 4, 8, 16
ACCESS_PRIVATE_KNOWN = 32
GMEM_NOT_WATCHED = -0x7FFFFFFF
NO_GFN = NO_GPA = (1 << 64) - 1
NO_VCPU = NO_REASON = (1 << 32) - 1
MAX_OWNERS = 8
HW_TEXT = 96

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


class ExitKeyRecord(ctypes.Structure):
    _fields_ = (
        ("kvm", c_uint64),
        ("gen", c_uint64),
        ("gpa", c_uint64),
        ("size", c_uint64),
        ("flags", c_uint64),
        ("gfn", c_uint64),
        ("ret", c_int32),
        ("reason", c_uint32),
        ("gmem", c_int32),
        ("vcpu", c_uint32),
        ("access", c_uint32),
        ("annotated", c_uint32),
    )


class ExitCount(ctypes.Structure):
    _fields_ = (
        ("total", c_uint64),
        ("last_ts", c_uint64),
        ("told_ts", c_uint64),
        ("tid", c_uint32),
        ("tgid", c_uint32),
        ("gpa", c_uint64),
        ("since", c_uint64),
    )


class ExitRecord(ctypes.Structure):
    _fields_ = (
        ("h", Header),
        ("key", ExitKeyRecord),
        ("total", c_uint64),
        ("gpa", c_uint64),
        ("since", c_uint64),
    )


class OwnerRecord(ctypes.Structure):
    _fields_ = (
        ("kvm", c_uint64),
        ("gen", c_uint64),
        ("gfn", c_uint64),
        ("hva", c_uint64),
        ("pid", c_uint32),
        ("pad", c_uint32),
    )


class GmemWalk(ctypes.Structure):
    _fields_ = (
        ("inode", c_uint64),
        ("index", c_uint64),
        ("seen", c_uint32),
        ("complete", c_uint32),
        ("nr_owners", c_uint32),
        ("pad", c_uint32),
        ("owners", OwnerRecord * MAX_OWNERS),
    )


class PoisonRecord(ctypes.Structure):
    _fields_ = (
        ("h", Header),
        ("pfn", c_uint64),
        ("page_type", c_int32),
        ("result", c_int32),
        ("gmem", GmemWalk),
    )


class SigbusRecord(ctypes.Structure):
    _fields_ = (
        ("h", Header),
        ("hva", c_uint64),
        ("code", c_int32),
        ("lsb", c_int32),
        ("target_tid", c_uint32),
        ("target_tgid", c_uint32),
        ("vcpu", c_int32),
        ("pad", c_uint32),
        ("total", c_uint64),
        ("comm", c_char * 16),
    )


class SigbusKey(ctypes.Structure):
    _fields_ = (
        ("kvm", c_uint64),
        ("gen", c_uint64),
        ("hva", c_uint64),
        ("code", c_int32),
        ("lsb", c_int32),
        ("target_tid", c_uint32),
        ("target_tgid", c_uint32),
        ("vcpu", c_int32),
        ("sender", c_uint32),
    )


class SigbusCount(ctypes.Structure):
    _fields_ = (
        ("total", c_uint64),
        ("sent", c_uint64),
        ("last_ts", c_uint64),
        ("since", c_uint64),
        ("left", c_uint64),
    )


class FaultRecord(ctypes.Structure):
    _fields_ = (
        ("h", Header),
        ("gfn", c_uint64),
        ("hva", c_uint64),
        ("vcpu", c_int32),
        ("access", c_uint32),
    )


class MceRecord(ctypes.Structure):
    _fields_ = (
        ("h", Header),
        ("status", c_uint64),
        ("addr", c_uint64),
        ("misc", c_uint64),
        ("bank", c_uint32),
        ("mce_cpu", c_uint32),
        ("socket", c_uint32),
        ("pad", c_uint32),
        ("ipid", c_uint64),
        ("vendor_data", c_uint8 * 16),
    )


class VmRecord(ctypes.Structure):
    _fields_ = (("h", Header), ("comm", c_char * 16))


class HwRecord(ctypes.Structure):
    _fields_ = (
        ("h", Header),
        ("valid", c_uint64),
        ("addr", c_uint64),
        ("mask", c_uint64),
        ("place", c_uint64),
        ("kind", c_uint64),
        ("via", c_uint32),
        ("severity", c_int32),
        ("count", c_uint32),
        ("grain_bits", c_uint32),
        ("label", c_char * HW_TEXT),
        ("message", c_char * HW_TEXT),
    )


class PageRecord(ctypes.Structure):
    _fields_ = (("h", Header), ("pfn", c_uint64), ("ret", c_int32), ("unpoison", c_uint32))


class RefusalKeyRecord(ctypes.Structure):
    _fields_ = (("kvm", c_uint64), ("gen", c_uint64), ("gfn", c_uint64))


class RefusedCount(ctypes.Structure):
    _fields_ = (("total", c_uint64), ("last_ts", c_uint64), ("tgid", c_uint32), ("pad", c_uint32))


RECORDS: dict[int, type[ctypes.Structure]] = {
    EXIT: ExitRecord,
    POISON: PoisonRecord,
    SIGBUS: SigbusRecord,
    FAULT: FaultRecord,
    MCE: MceRecord,
    VM_NEW: VmRecord,
    VM_GONE: VmRecord,
    HW: HwRecord,
    PAGE: PageRecord,
}


def access_text(access: int) -> str | None:
    """``"r"``, ``"w"``, ``"x"``; None where the fault handler was not seen."""
    if not access & ACCESS_KNOWN:
        return None
    for bit, text in ((ACCESS_WRITE, "w"), (ACCESS_EXEC, "x"), (ACCESS_READ, "r")):
        if access & bit:
            return text
    return None


def access_private(access: int) -> bool | None:
    """Whether the guest accessed the page as private; None where that is not known."""
    return bool(access & ACCESS_PRIVATE) if access & ACCESS_PRIVATE_KNOWN else None
