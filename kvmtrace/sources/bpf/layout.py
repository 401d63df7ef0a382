"""This kernel's symbols, offsets and prototypes, as macros for the eBPF programs.

All of it is read from kallsyms and BTF; bpf/common.c lists the macros.
"""

from __future__ import annotations

import os
from collections.abc import Iterable
from dataclasses import dataclass

from kvmtrace import kvm
from kvmtrace.linux.btf import Btf
from kvmtrace.linux.kallsyms import read_symbols
from kvmtrace.linux.tracefs import mount
from kvmtrace.probes import ProbeSpec
from kvmtrace.sources.bpf import copies, lookup

# By the name of the macro (OFF_name in bpf/*.c): struct and member in BTF, the newest names first.
OFFSETS: dict[str, tuple[tuple[str, str], ...]] = {
    "kvm_vcpu_kvm": (("kvm_vcpu", "kvm"),),
    "kvm_vcpu_vcpu_id": (("kvm_vcpu", "vcpu_id"),),
    "kvm_vcpu_run": (("kvm_vcpu", "run"),),
    "kvm_vcpu_stat_exits": (("kvm_vcpu", "stat.exits"),),
    "kvm_vcpu_hpfar": (("kvm_vcpu", "arch.fault.hpfar_el2"),),
    "kvm_vcpu_esr": (("kvm_vcpu", "arch.fault.esr_el2"),),
    "kvm_run_exit_reason": (("kvm_run", "exit_reason"),),
    "kvm_run_memory_fault": (("kvm_run", "memory_fault"),),
    "kvm_run_arm_sea": (("kvm_run", "arm_sea"),),
    "kvm_page_fault_gfn": (("kvm_page_fault", "gfn"),),
    "kvm_page_fault_write": (("kvm_page_fault", "write"),),
    "kvm_page_fault_exec": (("kvm_page_fault", "exec"),),
    "kvm_page_fault_is_private": (("kvm_page_fault", "is_private"),),
    "kvm_page_fault_pfn": (("kvm_page_fault", "pfn"),),
    "kvm_page_fault_slot": (("kvm_page_fault", "slot"),),
    "kvm_memory_slot_userspace_addr": (("kvm_memory_slot", "userspace_addr"),),
    "kvm_memory_slot_base_gfn": (("kvm_memory_slot", "base_gfn"),),
    "kvm_memory_slot_gmem_pgoff": (("kvm_memory_slot", "gmem.pgoff"),),
    "xarray_xa_head": (("xarray", "xa_head"),),
    "xa_node_shift": (("xa_node", "shift"),),
    "xa_node_slots": (("xa_node", "slots"),),
    "address_space_host": (("address_space", "host"),),
    "address_space_i_private_list": (("address_space", "i_private_list"),),
    "inode_i_ino": (("inode", "i_ino"),),
    "folio_index": (("folio", "index"),),
    "gmem_inode_vfs_inode": (("gmem_inode", "vfs_inode"),),
    "gmem_inode_gmem_file_list": (("gmem_inode", "gmem_file_list"),),
    "gmem_file_entry": (("gmem_file", "entry"), ("kvm_gmem", "entry")),
    "gmem_file_bindings": (("gmem_file", "bindings"), ("kvm_gmem", "bindings")),
    "gmem_file_kvm": (("gmem_file", "kvm"), ("kvm_gmem", "kvm")),
    "kvm_mm": (("kvm", "mm"),),
    "kvm_has_private_mem": (("kvm", "arch.has_private_mem"),),
    "kvm_userspace_pid": (("kvm", "userspace_pid"),),
    "mm_struct_owner": (("mm_struct", "owner"),),
    "task_struct_pid": (("task_struct", "pid"),),
    "task_struct_tgid": (("task_struct", "tgid"),),
    "task_struct_comm": (("task_struct", "comm"),),
    "mce_status": (("mce", "status"),),
    "mce_addr": (("mce", "addr"),),
    "mce_misc": (("mce", "misc"),),
    "mce_bank": (("mce", "bank"),),
    "mce_extcpu": (("mce", "extcpu"),),
    "mce_socketid": (("mce", "socketid"),),
    "mce_ipid": (("mce", "ipid"),),
    "mce_vendor": (("mce_hw_err", "vendor"),),
    "cper_arm_err_info_num": (("cper_sec_proc_arm", "err_info_num"),),
}

# Arguments of tracepoints that only newer kernels have.
TRACEPOINT_ARGUMENTS = (("arm_event", "sev"),)

SIZES = ("cper_sec_proc_arm", "page")

# Without these, a probe has nothing to report.
NEEDS: dict[str, tuple[str, ...]] = {
    "run": ("kvm_vcpu_kvm", "kvm_vcpu_vcpu_id", "kvm_vcpu_run", "kvm_run_exit_reason"),
    "faultin": ("kvm_vcpu_kvm", "kvm_vcpu_vcpu_id", "kvm_page_fault_gfn"),
    "faultin/aarch64": ("kvm_vcpu_kvm", "kvm_vcpu_vcpu_id", "kvm_vcpu_hpfar"),
    "arm_sea": ("kvm_vcpu_kvm", "kvm_vcpu_vcpu_id", "kvm_vcpu_run", "kvm_run_arm_sea"),
    "vncr": (
        *("kvm_vcpu_kvm", "kvm_vcpu_vcpu_id", "kvm_vcpu_run"),
        *("kvm_run_exit_reason", "kvm_run_memory_fault"),
    ),
    "gmem_error": ("address_space_host", "folio_index"),
    "sigbus": ("task_struct_pid", "task_struct_tgid"),
    "mce": ("mce_status", "mce_addr", "mce_bank"),
}


@dataclass(frozen=True, slots=True)
class Trampoline:
    """A function that an fentry or fexit program can be attached to."""

    kind: str  # bcc's name: kfunc (fentry) or kretfunc (fexit)
    module: str | None  # None: built in
    function: str

    @property
    def macro(self) -> str:
        """The program's name in C: bpf/common.c makes it the one that this bcc needs."""
        return f"ON_FUNCTION({self.kind},{self.module or 'vmlinux'},{self.function})"

    @property
    def full_name(self) -> str:
        """The name for a bcc that can attach to modules."""
        return f"{self.kind}__{self.module or 'vmlinux'}__{self.function}"

    @property
    def plain_name(self) -> str:
        """The name for a bcc that can attach to vmlinux only."""
        return f"{self.kind}__{self.function}"


class Layout:
    """Symbols, member offsets and argument lists for these probes, read once.

    Raises KvmtraceError if the kernel has no BTF.
    """

    def __init__(self, specs: Iterable[ProbeSpec]) -> None:
        self.specs = tuple(specs)
        names = {target for spec in self.specs for target in spec.targets}
        variables = {"kvm_running_vcpu", "__per_cpu_offset", *lookup.SYMBOLS}
        self.symbols = read_symbols(names | variables)
        btf = Btf()
        members = OFFSETS | lookup.OFFSETS
        self.offsets = {name: _offset(btf, where) for name, where in members.items()}
        self._sizes = {name: btf.size(name) or 0 for name in SIZES}
        self._places = {
            f"{event}_{name}": _place(btf, event, name) for event, name in TRACEPOINT_ARGUMENTS
        }
        self._arguments = {
            target: btf.arguments(target) for target in names if target in self.symbols
        }

    def target(self, spec: ProbeSpec) -> str | None:
        """The first of a probe's targets that this kernel has.

        A raw tracepoint is attached by the event's name alone, and whether it exists shows then.
        Only tracefs has the event's system. Without tracefs that is left out if kernels differ in
        it.
        """
        if spec.is_tracepoint:
            root = mount.tracefs()
            found = mount.tracepoint(spec.targets, root) if root else None
            event = spec.targets[0].partition(":")[2]
            return found or (spec.targets[0] if len(spec.targets) == 1 else event)
        return next((target for target in spec.targets if target in self.symbols), None)

    def missing(self, probe: str) -> str | None:
        """A member that this probe needs and BTF does not have."""
        needs = NEEDS.get(f"{probe}/{os.uname().machine}", NEEDS.get(probe, ()))
        return next((name for name in needs if self.offsets.get(name) is None), None)

    def trampoline(self, spec: ProbeSpec) -> Trampoline | None:
        """What an fentry or fexit program is attached to; None if BTF has no target."""
        target = self.target(spec)
        if spec.is_tracepoint or target is None or self._arguments.get(target) is None:
            return None
        kind = "kfunc" if spec.at == "entry" else "kretfunc"
        return Trampoline(kind, self.symbols[target].module, target)

    def cflags(self) -> list[str]:
        """The macros that bpf/*.c are compiled with."""
        flags = [
            f"-DPAGE_SHIFT_={kvm.PAGE_SHIFT}",
            f"-DCOPY_NUMBER_HELPER={copies.COPY_NUMBER_HELPER}",
        ]
        flags += [f"-DOFF_{name}={-1 if at is None else at}" for name, at in self.offsets.items()]
        flags += [f"-DSIZE_{name}={size}" for name, size in self._sizes.items()]
        flags += [f"-DARG_{name}={place}" for name, place in self._places.items()]
        for spec in self.specs:
            place = self.trampoline(spec)
            if place:
                arguments = self._arguments[place.function] or ()
                flags += [f"-DFN_{spec.name}={place.macro}"]
                flags += [f"-DNARGS_{spec.name}={len(arguments)}"]
        running = self.symbols.get("kvm_running_vcpu")
        per_cpu = self.symbols.get("__per_cpu_offset")
        if running and per_cpu and per_cpu.address:
            flags.append(f"-DSYM_KVM_RUNNING_VCPU={running.address:#x}ULL")
            flags.append(f"-DSYM_PER_CPU_OFFSET={per_cpu.address:#x}ULL")
        return flags


def _offset(btf: Btf, candidates: tuple[tuple[str, str], ...]) -> int | None:
    for struct, member in candidates:
        offset = btf.offset(struct, member)
        if offset is not None:
            return offset
    return None


def _place(btf: Btf, event: str, argument: str) -> int:
    """The position of a tracepoint's argument; -1 if it has none of that name."""
    # include/linux/tracepoint.h: __traceiter_EVENT(void *__data, the tracepoint's arguments)
    names = (btf.arguments(f"__traceiter_{event}") or ("",))[1:]
    return names.index(argument) if argument in names else -1
