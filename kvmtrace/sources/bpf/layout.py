"""This kernel's symbols, offsets and prototypes, as macros for the eBPF programs.

All of it is read from kallsyms and BTF; bpf/common.c lists the macros.
"""

from __future__ import annotations

import contextlib
import hashlib
import os
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from kvmtrace import kvm
from kvmtrace.linux import kvm_module
from kvmtrace.linux.btf import SYS_BTF, Btf, FunctionType
from kvmtrace.linux.kallsyms import Symbol, read_symbols
from kvmtrace.linux.tracefs import mount
from kvmtrace.probes import ProbeSpec
from kvmtrace.sources.bpf import copies, lookup
from kvmtrace.sources.bpf.copies import PLACEHOLDERS
from kvmtrace.sources.bpf.program_cache import ProgramCache

# By the name of the macro (OFF_name in bpf/*.c): struct and member in BTF, the newest names first.
OFFSETS: dict[str, tuple[tuple[str, str], ...]] = {
    "kvm_vcpu_kvm": (("kvm_vcpu", "kvm"),),
    "kvm_vcpu_vcpu_id": (("kvm_vcpu", "vcpu_id"),),
    "kvm_vcpu_run": (("kvm_vcpu", "run"),),
    "kvm_vcpu_stat_exits": (("kvm_vcpu", "stat.exits"),),
    "kvm_vcpu_pid": (("kvm_vcpu", "pid"),),
    "task_struct_thread_pid": (("task_struct", "thread_pid"),),
    "task_struct_files": (("task_struct", "files"),),
    "files_struct_fdt": (("files_struct", "fdt"),),
    "fdtable_fd": (("fdtable", "fd"),),
    "file_private_data": (("file", "private_data"),),
    # The first argument of a system call: on x86-64 of 64 and of 32 bits, on arm64.
    "pt_regs_di": (("pt_regs", "di"),),
    "pt_regs_bx": (("pt_regs", "bx"),),
    "pt_regs_orig_x0": (("pt_regs", "orig_x0"),),
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

_TASK_PT_REGS = "bpf_task_pt_regs"
# A kernel that has both guards tracepoints by SRCU, and by the kind of it that lets readers be
# preempted (include/linux/srcu.h). The function has another name where locking is debugged.
_SRCU_FAST = frozenset({"init_srcu_struct_fast", "__init_srcu_struct_fast"})
_TRACEPOINT_SRCU = "tracepoint_srcu"
_ANY_VARIABLE = "__per_cpu_offset"

# Without these, a probe has nothing to report.
NEEDS: dict[str, tuple[str, ...]] = {
    "run": (
        *("kvm_vcpu_kvm", "kvm_vcpu_vcpu_id", "kvm_vcpu_run", "kvm_vcpu_pid"),
        *("kvm_run_exit_reason", "file_private_data", "task_struct_thread_pid"),
        *("task_struct_files", "files_struct_fdt", "fdtable_fd"),
    ),
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


class Layout:
    """Symbols, member offsets and argument lists for these probes, read once.

    ``cache`` keeps them, per build of the kernel (types) and per boot (symbols). Raises
    KvmtraceError if the kernel has no BTF.
    """

    def __init__(self, specs: Iterable[ProbeSpec], cache: ProgramCache) -> None:
        self.specs = tuple(specs)
        names = {target for spec in self.specs for target in spec.targets}
        facts = {_TASK_PT_REGS, _ANY_VARIABLE, _TRACEPOINT_SRCU, *_SRCU_FAST}
        self.symbols = _symbols(sorted({*names, *facts, *PLACEHOLDERS, *lookup.SYMBOLS}), cache)
        types = _types(sorted(names), cache)
        self.offsets = types.offsets
        self._types = types

    def modules(self) -> set[str]:
        """Modules that have some of the symbols."""
        return {symbol.module for symbol in self.symbols.values() if symbol.module}

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

    def function(self, spec: ProbeSpec) -> FunctionType | None:
        """What an fentry or fexit program is attached to; None if BTF has no target."""
        target = self.target(spec)
        return None if spec.is_tracepoint or target is None else self._types.functions.get(target)

    @property
    def skips_raw_tracepoints(self) -> bool:
        """Whether this kernel may skip a program on a raw tracepoint, as it can be preempted.

        True also where kallsyms has no variables, and so cannot tell.
        """
        names = self.symbols.keys()
        return bool(_SRCU_FAST & names) and (
            _TRACEPOINT_SRCU in names or _ANY_VARIABLE not in names
        )

    def addresses(self) -> dict[int, int]:
        """By placeholder: the address that belongs there."""
        return {
            placeholder: self.symbols[name].address
            for name, placeholder in PLACEHOLDERS.items()
            if name in self.symbols
        }

    def cflags(self, *, kprobes: bool = False) -> list[str]:
        """The macros that bpf/*.c are compiled with; the same for every boot of a kernel.

        ``kprobes``: programs for kprobes as well where BTF has the function.
        """
        types = self._types
        flags = [
            f"-DPAGE_SHIFT_={kvm.PAGE_SHIFT}",
            f"-DCOPY_NUMBER_HELPER={copies.COPY_NUMBER_HELPER}",
        ]
        flags += [f"-DOFF_{name}={-1 if at is None else at}" for name, at in types.offsets.items()]
        flags += [f"-DSIZE_{name}={size}" for name, size in types.sizes.items()]
        flags += [f"-DARG_{name}={place}" for name, place in types.places.items()]
        for spec in self.specs:
            function = self.function(spec)
            if function:
                flags += [f"-DFN_{spec.name}=fn_{spec.name}"]
                flags += [f"-DNARGS_{spec.name}={len(function.arguments)}"]
            if kprobes or not function:
                flags += [f"-DKP_{spec.name}"]
        if _TASK_PT_REGS in self.symbols:
            flags += ["-DHAS_TASK_PT_REGS"]
        # Addresses are zeros for those who may not see them.
        per_cpu = self.symbols.get("__per_cpu_offset")
        if "kvm_running_vcpu" in self.symbols and per_cpu and per_cpu.address:
            flags += [
                f"-DSYM_{name.strip('_').upper()}={placeholder:#x}ULL"
                for name, placeholder in PLACEHOLDERS.items()
            ]
        return flags


@dataclass(frozen=True, slots=True)
class _Types:
    """What BTF says: members and structs by macro name, functions by their own."""

    offsets: dict[str, int | None]
    sizes: dict[str, int]
    places: dict[str, int]
    functions: dict[str, FunctionType]


def _types(functions: Sequence[str], cache: ProgramCache) -> _Types:
    members = OFFSETS | lookup.OFFSETS
    wanted = repr((members, SIZES, TRACEPOINT_ARGUMENTS, functions))
    with_kvm = os.path.exists(f"{SYS_BTF}/kvm")
    name = _types_name(wanted, with_kvm)
    kept = cache.read(name) if name else None
    if kept is not None:
        with contextlib.suppress(TypeError, ValueError, KeyError, AttributeError):
            return _Types(
                {**kept["offsets"]},
                {**kept["sizes"]},
                {**kept["places"]},
                {
                    function: FunctionType(module, type_id, tuple(arguments))
                    for function, (module, type_id, arguments) in kept["functions"].items()
                },
            )
        cache.distrust(name)
    btf = Btf()
    found = _Types(
        {macro: _offset(btf, where) for macro, where in members.items()},
        {struct: btf.size(struct) or 0 for struct in SIZES},
        {f"{event}_{name}": _place(btf, event, name) for event, name in TRACEPOINT_ARGUMENTS},
        {one: known for one in functions if (known := btf.function(one))},
    )
    # kvm may have come or gone meanwhile.
    if name and btf.has_kvm == with_kvm and name == _types_name(wanted, with_kvm):
        cache.write(
            name,
            {
                "offsets": found.offsets,
                "sizes": found.sizes,
                "places": found.places,
                "functions": {
                    one: (known.module, known.type_id, known.arguments)
                    for one, known in found.functions.items()
                },
            },
        )
    return found


def _types_name(wanted: str, with_kvm: bool) -> str:
    """The file with the types of this build of the kernel and of its module kvm, if it has one.

    "" where one build cannot be told from another.
    """
    uname = os.uname()
    taken = hashlib.sha256("\0".join((wanted, *uname)).encode())
    builds = [_bytes("/sys/kernel/notes")]
    if with_kvm:
        module = "/sys/module/kvm"
        builds.append(
            _bytes(f"{module}/notes/.note.gnu.build-id") or _bytes(f"{module}/srcversion")
        )
    for build in builds:
        if not build:
            return ""
        taken.update(build + b"\0")
    for blob in ("vmlinux", "kvm"):
        with contextlib.suppress(OSError):
            taken.update(str(os.stat(f"{SYS_BTF}/{blob}").st_size).encode())
    return f"types-{taken.hexdigest()}"


def _symbols(names: Sequence[str], cache: ProgramCache) -> dict[str, Symbol]:
    """As ``read_symbols``. They stay where they are until kvm is loaded anew."""
    loaded = kvm_module.loaded()
    words = (*names, *os.uname(), _bytes("/proc/sys/kernel/random/boot_id").decode(), *loaded)
    name = f"symbols-{hashlib.sha256(repr(words).encode()).hexdigest()}"
    # Without kvm they may be read while it is being loaded.
    kept = cache.read(name) if loaded else None
    if kept is not None:
        with contextlib.suppress(TypeError, ValueError, AttributeError):
            return {one: Symbol(module, int(at)) for one, (module, at) in kept.items()}
        cache.distrust(name)
    found = read_symbols(names)
    shown = any(symbol.address for symbol in found.values())
    if loaded and shown and kvm_module.loaded() == loaded:
        cache.write(name, {one: (symbol.module, symbol.address) for one, symbol in found.items()})
    return found


def _bytes(path: str) -> bytes:
    """Empty where there is no such file."""
    try:
        with open(path, "rb") as file:
            return file.read()
    except OSError:
        return b""


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
