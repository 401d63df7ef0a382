"""What each probe asks the kernel for: data only, one list of fields per probe.

A field has forms, from the one that says most to the one that older kernels take; BTF argument
names (``vcpu->kvm``, Linux 6.6) come before registers (``$arg1``). A field that no form brings is
left out, and with it the one fact; the probe fails only where a ``needed`` one cannot be had.
``{struct.member}`` in a form is an offset, taken from BTF where libbpf is at hand.
"""

from __future__ import annotations

import signal
from dataclasses import dataclass

from kvmtrace import kvm
from kvmtrace.linux import cper

KVM_PFN_ERR_HWPOISON = 0x7FF0000000000001  # include/linux/kvm_host.h: KVM_PFN_ERR_MASK | 1


@dataclass(frozen=True, slots=True)
class Field:
    """``name=form`` in a dynamic event.

    ``needed``: the probe is useless without. ``helper``: its value is known otherwise, too, so
    that a refusal need not be reported.
    """

    name: str
    forms: tuple[str, ...]
    needed: bool = False
    helper: bool = False


def _field(name: str, *forms: str) -> Field:
    return Field(name, forms)


def _helper(name: str, *forms: str) -> Field:
    return Field(name, forms, helper=True)


def _needed(name: str, *forms: str) -> Field:
    return Field(name, forms, needed=True)


_RET = _needed("ret", "$retval:s32")
# The process, not the thread that made the VM (kvm->userspace_pid), which may be gone.
_TGID = "kvm->mm->owner->tgid"
_MAKER = "kvm->userspace_pid"


def _slot(slot: str) -> tuple[Field, ...]:
    return (
        _field("base", f"{slot}->base_gfn"),
        _field("npages", f"{slot}->npages"),
        _field("hva", f"{slot}->userspace_addr"),
        _field("flags", f"{slot}->flags"),
        _field("as_id", f"{slot}->as_id"),
        _field("pgoff", f"{slot}->gmem.pgoff"),
        _field("ino", f"{slot}->gmem.file->f_inode->i_ino"),
    )


def _section(word: str) -> tuple[str, ...]:
    """A word of a memory error section, which is as UEFI lays it out on every kernel."""
    return tuple(f"+{cper.MEMORY_WORDS[word]}({at}):x64" for at in ("mem_err", "$arg2"))


_VCPU = (
    _needed("vcpu", "vcpu:x64"),
    _needed("kvm", "vcpu->kvm:x64"),
    _needed("vid", "vcpu->vcpu_id"),
    _helper("tgid", f"vcpu->{_TGID}"),
    _helper("maker", f"vcpu->{_MAKER}"),
)

_FAULTIN_X86 = (
    *_VCPU,
    _field("exits", "vcpu->stat.exits"),
    _needed("gfn", "fault->gfn:x64"),
    _field("pfn", "fault->pfn:x64"),
    _field("write", "fault->write"),
    _field("exec", "fault->exec"),
    _field("private", "fault->is_private"),
    _field("prefetch", "fault->prefetch"),
    _RET,
)

# kvm_handle_guest_abort(vcpu): HPFAR_EL2 holds the address of the page (bits 39:4 are 47:12 of
# it), ESR_EL2 the syndrome (arch/arm64/include/asm/kvm_emulate.h, esr.h).
_FAULTIN_ARM64 = (
    *_VCPU,
    _field("exits", "vcpu->stat.exits"),
    _needed("hpfar", "vcpu->arch.fault.hpfar_el2:x64"),
    _field("esr", "vcpu->arch.fault.esr_el2:x64"),
    _RET,
)

# The guest_memfd files on an inode: struct gmem_inode has the list since 7.2 (reached by a cast,
# 7.3), the address_space had it before; an entry is the last member of {kvm, bindings, entry}
# (virt/kvm/guest_memfd.c), bindings being an xarray of 16 bytes.
_HEAD = "(gmem_inode,vfs_inode)(mapping->host)->gmem_file_list.next"
_OLD_HEAD = "mapping->i_private_list.next"

_RUN = (
    *_VCPU,
    _needed("reason", "vcpu->run->exit_reason:u32"),
    _field("gpa", "vcpu->run->memory_fault.gpa:x64"),
    _field("flags", "vcpu->run->memory_fault.flags:x64"),
    _field("size", "vcpu->run->memory_fault.size:x64"),
    _field("exits", "vcpu->stat.exits"),
    _helper("pending", "$current->pending.signal.sig:x64"),
    _RET,
)

# Whether a VM may have private memory, and so exits that convert it: none has on arm64.
_HAS_PRIVATE = "arch.has_private_mem:u8"
_NONE_HAS_PRIVATE = _helper("has_private", "\\0:u8")

FIELDS: dict[str, tuple[Field, ...]] = {
    "run": (*_RUN, _helper("has_private", f"vcpu->kvm->{_HAS_PRIVATE}")),
    "run/aarch64": (*_RUN, _NONE_HAS_PRIVATE),
    "gmem": (
        _needed("kvm", "kvm:x64"),
        _needed("gfn", "gfn:x64"),
        _helper("tgid", f"{_TGID}"),
        *_slot("slot"),
        _RET,
    ),
    "faultin": _FAULTIN_X86,
    "faultin/aarch64": _FAULTIN_ARM64,
    "gmem_error": (
        _needed("mapping", "mapping:x64"),
        _needed("index", "folio->index"),
        _field("ino", "mapping->host->i_ino"),
        _helper("entry", f"{_HEAD}:x64", f"{_OLD_HEAD}:x64"),
        _helper("next", f"{_HEAD}->next:x64", f"{_OLD_HEAD}->next:x64"),
        _helper("kvm", f"(gmem_file,entry)({_HEAD})->kvm:x64", f"-24({_OLD_HEAD}):x64"),
        _helper("tgid", f"(gmem_file,entry)({_HEAD})->{_TGID}"),
    ),
    "sigbus": (
        _needed("code", "code", "$arg1:s32"),
        _needed("addr", "addr:x64", "$arg2:x64"),
        _field("lsb", "lsb", "$arg3:s16"),
        _needed("tid", "t->pid", "+{task_struct.pid}($arg4):s32"),
        _needed("tgid", "t->tgid", "+{task_struct.tgid}($arg4):s32"),
        _helper("comm", "t->comm:string"),
    ),
    "sigbus_forced": (
        _needed("code", "code", "$arg1:s32"),
        _needed("addr", "addr:x64", "$arg2:x64"),
        _field("lsb", "lsb", "$arg3:s16"),
        _helper("tgid", "$current->tgid"),
        _helper("comm", "$comm:string"),
    ),
    "sigbus_bare": (
        _needed("sig", "sig", "$arg1:s32"),
        _helper("tgid", "$current->tgid"),
        _helper("comm", "$comm:string"),
    ),
    "vm_new": (
        _needed("kvm", "kvm:x64"),
        _helper("tgid", f"{_TGID}"),
        _helper("comm", "$comm:string"),
        _helper("has_private", f"kvm->{_HAS_PRIVATE}"),
        _RET,
    ),
    # Where a return probe cannot have arguments (before 6.6): at entry. A VM that then fails to be
    # made is one too many, until its process ends.
    "vm_new/entry": (
        _needed("kvm", "$arg1:x64"),
        _helper("comm", "$comm:string"),
    ),
    "vm_gone": (
        _needed("kvm", "kvm:x64", "$arg1:x64"),
        _helper("tgid", f"{_TGID}"),
        _helper("maker", f"{_MAKER}"),
        _helper("comm", "$comm:string"),
    ),
    # drivers/acpi/apei/ghes.c
    "apei": (
        _needed("sev", "sev", "$arg1:s32"),
        _needed("valid", *_section("valid")),
        _needed("addr", *_section("addr")),
        _field("mask", *_section("mask")),
        _field("place", *_section("place")),
        _field("kind", *_section("kind")),
    ),
    "arm_sea": (
        *_VCPU,
        _needed("reason", "vcpu->run->exit_reason:u32"),
        _needed("flags", "vcpu->run->arm_sea.flags:x64"),
        _needed("gpa", "vcpu->run->arm_sea.gpa:x64"),
        _RET,
    ),
    "vncr": (
        *_VCPU,
        _needed("reason", "vcpu->run->exit_reason:u32"),
        _needed("gpa", "vcpu->run->memory_fault.gpa:x64"),
        _needed("flags", "vcpu->run->memory_fault.flags:x64"),
        _field("size", "vcpu->run->memory_fault.size:x64"),
        _RET,
    ),
    "soft_offline": (_needed("pfn", "pfn:u64"), _RET),
    "unpoison": (_needed("pfn", "pfn:u64"), _RET),
    # include/linux/kvm_host.h, enum kvm_mr_change: CREATE, DELETE, MOVE, FLAGS_ONLY
    "slot": (
        _needed("kvm", "kvm:x64"),
        _needed("change", "change"),
        _needed("old_base", "old->base_gfn"),
        _field("old_as_id", "old->as_id"),
        *_slot("new"),
    ),
}

# Not in probes.specs: it only serves others, by reporting where guest memory is.
SLOT_TARGET = "kvm_arch_commit_memory_region"

# What goes into the ring, by the field that it takes to ask; the first that can be had. The most
# frequent events are judged in the kernel: EINTR and EAGAIN are how KVM_RUN ordinarily ends for a
# signal or an uninitialised vCPU. With a SIGBUS pending, EINTR shows which vCPU it was sent to.
FAILED = "ret < 0 && ret != -4 && ret != -11"
_SIGBUS_PENDING = f"pending & {1 << signal.SIGBUS - 1:#x}"
FILTERS: dict[str, tuple[tuple[str, str], ...]] = {
    "run": (("pending", f"({FAILED}) || (ret == -4 && {_SIGBUS_PENDING})"), ("ret", FAILED)),
    "gmem": (("ret", "ret < 0"),),
    "faultin": (
        ("pfn", f"(ret < 0 && ret != -4) || pfn == {KVM_PFN_ERR_HWPOISON:#x}"),
        ("ret", "ret < 0 && ret != -4"),
    ),
    "run_under_way": (("errno", FAILED.replace("ret", "errno")),),
    "vm_new": (("ret", "ret == 0"),),
    "arm_sea": (("ret", f"ret == 0 && reason == {kvm.EXIT_ARM_SEA}"),),
    "vncr": (("ret", f"ret == 0 && reason == {kvm.EXIT_MEMORY_FAULT}"),),
    "sigbus": (("code", "code == 4 || code == 5"),),
    "sigbus_forced": (("code", "code == 4 || code == 5"),),
    "sigbus_bare": (("sig", f"sig == {int(signal.SIGBUS)}"),),
}

# Which ring: a storm of one kind must not crowd out the rare and precious of another.
RINGS: dict[str, tuple[str, ...]] = {
    "poison": (
        *("poison", "gmem_error", "mce", "vm_new", "vm_gone", "slot", "arm_sea", "sigbus_bare"),
        *("mc_event", "extlog", "apei", "arm_event", "non_standard", "soft_offline", "unpoison"),
    ),
    "signals": ("sigbus", "sigbus_forced"),
    "faults": ("run", "vncr", "gmem", "faultin", "run_under_way"),
}
# What of a ring has to be counted (hist.triggers), that nothing is lost when the ring is full.
COUNTED = {"signals": ("sigbus", "sigbus_forced"), "faults": ("run", "vncr")}
RING_KIB = {"poison": 128, "signals": 128, "faults": 128}
