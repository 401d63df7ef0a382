"""Records as the probes give them, and what their fields mean. Pure functions over fields."""

from __future__ import annotations

from typing import Any, NamedTuple

from kvmtrace import kvm
from kvmtrace.sources.ftrace.totals import ExitKey

# A list head lies in the inode, around the address_space that is a part of it.
_HEAD_NEAR = 0x1000
# Callers of kvm_gmem_get_pfn further away than this are not the fault handler (it is one of the
# larger functions, and its helpers are beside it).
_CALLER_NEAR = 0x8000


class Record(NamedTuple):
    """One event of ours: nanoseconds since the epoch, probe, fields."""

    ts: int
    probe: str
    fields: dict[str, Any]


def annotated(ret: int, reason: int) -> bool:
    """Whether ``memory_fault`` is the kernel's (api.rst, KVM_EXIT_MEMORY_FAULT).

    KVM_RUN returns 0 with it for arm64's nested virtualization (see Faults.vncr).
    """
    return reason == kvm.EXIT_MEMORY_FAULT and -ret in (0, kvm.EFAULT, kvm.EHWPOISON)


def exit_key(fields: dict[str, Any]) -> ExitKey:
    """The key of a ``run`` or ``vncr`` record; gpa and flags only where they are the kernel's."""
    ret, reason = fields["ret"], fields["reason"]
    if annotated(ret, reason) and "gpa" in fields and "flags" in fields:
        return ExitKey(fields["vcpu"], ret, reason, fields["gpa"], fields["flags"])
    return ExitKey(fields["vcpu"], ret, reason)


def same_exit(fault: dict[str, Any], run: dict[str, Any]) -> bool:
    """Whether a fault record is of the very VM exit that ended this KVM_RUN."""
    exits = fault.get("exits")
    return exits is not None and exits == run.get("exits") and fault["vcpu"] == run["vcpu"]


def asked_by(gmem: dict[str, Any], fault: dict[str, Any]) -> bool:
    """Whether kvm_gmem_get_pfn's record is of a call that this fault made.

    Its latest record on the thread, for the same gfn, and called from near the handler's start:
    others call it too (page states of SEV-SNP guests, populating).
    """
    if gmem["kvm"] != fault["kvm"] or gmem["gfn"] != fault["gfn"]:
        return False
    if "__probe_func" not in fault or "__probe_ret_ip" not in gmem:
        return True
    return abs(int(gmem["__probe_ret_ip"]) - int(fault["__probe_func"])) < _CALLER_NEAR


def access(fault: dict[str, Any]) -> str | None:
    """``r``, ``w`` or ``x``."""
    if "write" not in fault or "exec" not in fault:
        return None
    return "x" if fault["exec"] else "w" if fault["write"] else "r"


def from_arm64(fields: dict[str, Any]) -> None:
    """Turn the syndrome registers of an arm64 guest abort into the fields that x86 has.

    arch/arm64/include/asm/{kvm_arm.h,esr.h}: HPFAR_EL2 bits 39:4 are bits 47:12 of the address.
    """
    if "hpfar" not in fields:
        return
    address = (fields["hpfar"] & ((1 << 44) - 1) & ~0xF) << 8
    fields["gfn"] = address >> kvm.PAGE_SHIFT
    if "esr" in fields:
        fields["exec"] = fields["esr"] >> 26 & 0x3F == 0x20  # ESR_ELx_EC_IABT_LOW
        fields["write"] = not fields["exec"] and bool(fields["esr"] & 1 << 6)  # ESR_ELx_WNR


def first_listed(fields: dict[str, Any]) -> int | None:
    """The ``struct kvm`` of the first file on a guest_memfd's list (``gmem_error``), if any."""
    entry = fields.get("entry")
    if not entry or "kvm" not in fields or abs(entry - fields["mapping"]) < _HEAD_NEAR:
        return None
    return int(fields["kvm"]) or None


def only_one_listed(fields: dict[str, Any]) -> bool:
    """Whether the list's second entry is its head: the first one is all there is."""
    return bool(fields.get("next")) and abs(fields["next"] - fields["mapping"]) < _HEAD_NEAR
