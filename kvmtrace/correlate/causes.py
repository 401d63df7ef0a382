"""Why a KVM_RUN failed."""

from __future__ import annotations

from kvmtrace import kvm
from kvmtrace.events import Exit


def cause_of(exit_: Exit) -> str | None:
    """Return one of ``model.CAUSES``; None where no probe shows the cause.

    An annotated EFAULT is demand paging if the flags show it, a conversion if kvm_gmem_get_pfn was
    not called, and a failure of the backing if it was called and failed. Flags that are not known
    may mean anything: ``other``.
    """
    if exit_.is_poison:
        return "hwpoison"
    if exit_.errno != kvm.EFAULT:
        return "other"
    if exit_.annotated is False:
        return "unannotated"
    if exit_.annotated is None:
        return None
    flags = exit_.flags or 0
    if flags & kvm.MEMORY_EXIT_FLAG_USERFAULT:
        return "userfault"
    if kvm.unknown_flags(flags):
        return "other"
    if exit_.gmem is None:
        return None
    return "backing" if exit_.gmem else "conversion"
