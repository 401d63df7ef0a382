"""Records of our probes, and what their fields mean. Pure functions over fields."""

from __future__ import annotations

from typing import Any, NamedTuple

from kvmtrace import kvm
from kvmtrace.sources.ftrace.totals import ExitKey

# A caller of kvm_gmem_get_pfn that is further away from the fault handler's start than this is
# another function. The handler is large, and its helpers are beside it.
_CALLER_NEAR = 0x8000


class Record(NamedTuple):
    """One hit of a probe: time (nanoseconds since the epoch), the probe's name, its fields."""

    ts: int
    probe: str
    fields: dict[str, Any]


def annotated(ret: int, reason: int) -> bool:
    """Whether the kernel has filled in ``memory_fault`` (api.rst, KVM_EXIT_MEMORY_FAULT).

    ``ret`` is 0 for arm64's nested virtualization (see FtraceExits.vncr).
    """
    return reason == kvm.EXIT_MEMORY_FAULT and -ret in (0, kvm.EFAULT, kvm.EHWPOISON)


def exit_key(fields: dict[str, Any]) -> ExitKey:
    """The key of a ``run`` or ``vncr`` record; with gpa and flags if the exit is annotated."""
    ret, reason = fields["ret"], fields["reason"]
    if annotated(ret, reason) and "gpa" in fields and "flags" in fields:
        return ExitKey(fields["vcpu"], ret, reason, fields["gpa"], fields["flags"])
    return ExitKey(fields["vcpu"], ret, reason)


def same_exit(fault: dict[str, Any], run: dict[str, Any]) -> bool:
    """Whether a ``faultin`` record is of the VM exit that ended this KVM_RUN."""
    exits = fault.get("exits")
    return exits is not None and exits == run.get("exits") and fault["vcpu"] == run["vcpu"]


def is_call_of_fault(gmem: dict[str, Any], fault: dict[str, Any]) -> bool:
    """Whether a ``gmem`` record is of a call of kvm_gmem_get_pfn that this fault made.

    ``gmem``: the latest on the thread. It has to have the same gfn, and a caller near the handler's
    start: other functions call it, too (page states of SEV-SNP guests, populating).
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


def add_arm64_fields(fields: dict[str, Any]) -> None:
    """Add x86's fields to a ``faultin`` record of arm64, from its syndrome registers.

    arch/arm64/include/asm/{kvm_arm.h,esr.h}: HPFAR_EL2 bits 39:4 are bits 47:12 of the address.
    """
    if "hpfar" not in fields:
        return
    address = (fields["hpfar"] & ((1 << 44) - 1) & ~0xF) << 8
    fields["gfn"] = address >> kvm.PAGE_SHIFT
    if "esr" in fields:
        fields["exec"] = fields["esr"] >> 26 & 0x3F == 0x20  # ESR_ELx_EC_IABT_LOW
        fields["write"] = not fields["exec"] and bool(fields["esr"] & 1 << 6)  # ESR_ELx_WNR
