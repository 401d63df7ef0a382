"""Lookups in the kernel, as it is now: VMs, memslots, owners of a page.

The programs of bpf/lookup.bpf.c are loaded and never attached: each is run on demand
(BPF_PROG_TEST_RUN, Linux 5.10) with the arguments in its context. Nothing is locked, so results
are checked: a set of slots that changed meanwhile is read again.
"""

from __future__ import annotations

import ctypes
import os
from collections.abc import Callable, Mapping
from ctypes import c_uint64
from typing import Any

from kvmtrace.linux.pagemap import SPECIAL_TYPES
from kvmtrace.sources.bpf.loader import Loader
from kvmtrace.sources.bpf.poison import GmemWalk
from kvmtrace.sources.guest_memory import Memslot

OFFSETS: dict[str, tuple[tuple[str, str], ...]] = {
    "kvm_vm_list": (("kvm", "vm_list"),),
    "kvm_slots": (("kvm", "memslots"),),
    "slots_generation": (("kvm_memslots", "generation"),),
    "slots_id_hash": (("kvm_memslots", "id_hash"),),
    "slots_node_idx": (("kvm_memslots", "node_idx"),),
    "slot_id_node": (("kvm_memory_slot", "id_node"),),
    "slot_npages": (("kvm_memory_slot", "npages"),),
    "slot_id": (("kvm_memory_slot", "id"),),
    "mm_struct_pgd": (("mm_struct", "pgd"),),
    "page_compound_head": (("page", "compound_info"), ("page", "compound_head")),
    "folio_mapping": (("folio", "mapping"),),
    "address_space_a_ops": (("address_space", "a_ops"),),
    "inode_i_data": (("inode", "i_data"),),
    "inode_i_sb": (("inode", "i_sb"),),
    "super_block_s_dev": (("super_block", "s_dev"),),
}
"""Members that only bpf/lookup.bpf.c reads, in the form of ``layout.OFFSETS``."""

SYMBOLS = (
    "vm_list",
    "vmemmap_base",
    "page_offset_base",
    "pgdir_shift",
    "sme_me_mask",
    "memstart_addr",
    "kvm_gmem_aops",
)

# What each program needs: members by macro name, and variables of the kernel.
_NEEDS: dict[str, tuple[tuple[str, ...], tuple[str, ...]]] = {
    "walk_vms": (("kvm_vm_list",), ("vm_list",)),
    "walk_slots": (
        tuple(
            "kvm_slots slots_generation slots_id_hash slots_node_idx slot_id_node slot_npages "
            "slot_id kvm_memory_slot_base_gfn kvm_memory_slot_userspace_addr".split()
        ),
        (),
    ),
    "huge_entry": (("kvm_mm", "mm_struct_pgd"), ("page_offset_base",)),
    "huge_entry_arm64": (("kvm_mm", "mm_struct_pgd"), ("memstart_addr",)),
    "page_of": (
        tuple(
            "page_compound_head folio_mapping folio_index address_space_host inode_i_data "
            "inode_i_sb super_block_s_dev address_space_a_ops".split()
        ),
        ("vmemmap_base",),
    ),
}

# KVM_MAX_NR_ADDRESS_SPACES: x86 has a second one for SMM.
_ARCH = os.uname().machine
_SPACES = 2 if _ARCH == "x86_64" else 1
_VM_ROWS, _SLOT_STEPS, _ID_BUCKETS = 64, 128, 128
_MAX_RUNS = 1024
_TRIES = 3


class _VmRow(ctypes.Structure):
    _fields_ = (("kvm", c_uint64), ("pid", c_uint64))


class _VmsResult(ctypes.Structure):
    _fields_ = (
        ("rows", c_uint64),
        ("next", c_uint64),
        ("ended", c_uint64),
        ("row", _VmRow * _VM_ROWS),
    )


class _SlotRow(ctypes.Structure):
    _fields_ = (("gfn", c_uint64), ("pages", c_uint64), ("hva", c_uint64), ("id", c_uint64))


class _SlotsResult(ctypes.Structure):
    _fields_ = (
        ("slots", c_uint64),
        ("generation", c_uint64),
        ("bucket", c_uint64),
        ("node", c_uint64),
        ("row", _SlotRow * _SLOT_STEPS),
    )


class _EntryResult(ctypes.Structure):
    _fields_ = (("entry", c_uint64), ("shift", c_uint64))


class PageResult(ctypes.Structure):
    """``file``: 1 for a page of a file; ``gmem.seen``: of a guest_memfd, with its owners."""

    _fields_ = (("file", c_uint64), ("device", c_uint64), ("gmem", GmemWalk))


class KernelLookup:
    """Looks up VMs, memslots and pages; None for what cannot be looked up on this kernel.

    ``loader`` has the programs. ``offsets`` by macro name, ``symbols``: addresses of variables.
    """

    def __init__(
        self, loader: Loader, offsets: Mapping[str, int | None], symbols: Mapping[str, int]
    ) -> None:
        self._loader = loader
        self._symbols = symbols
        self._programs: dict[str, int | None] = {}
        self.why: dict[str, str] = {}
        """By program: why it cannot be run."""
        for name, (members, variables) in _NEEDS.items():
            missing = [member for member in members if offsets.get(member) is None]
            missing += [variable for variable in variables if not symbols.get(variable)]
            if missing:
                self.why[name] = f"this kernel's BTF does not say where {missing[0]} is"
                self._programs[name] = None

    def vms(self) -> list[tuple[int, int]] | None:
        """(struct kvm, pid of its process or 0) of all VMs."""
        found: dict[int, int] = {}
        at = 0
        for _ in range(_MAX_RUNS):
            result = self._run_program(
                "walk_vms", "vms_results", _VmsResult, self._symbol("vm_list"), at
            )
            if result is None:
                return None
            found |= {row.kvm: row.pid for row in result.row[: result.rows]}
            at = result.next
            if result.ended or not at or not result.rows:
                break
        return list(found.items())

    def slots(self, struct: int) -> tuple[Memslot, ...] | None:
        """All memslots of the VM at ``struct``."""
        found: list[Memslot] = []
        for space in range(_SPACES):
            for _ in range(_TRIES):
                slots = self._slots(struct, space)
                if slots is not None:
                    break
            else:
                return None
            found += slots
        return tuple(found)

    def _slots(self, struct: int, space: int) -> list[Memslot] | None:
        """None if the slots changed while they were read."""
        found: list[Memslot] = []
        bucket = node = 0
        version = None
        for _ in range(_MAX_RUNS):
            result = self._run_program(
                "walk_slots", "slots_results", _SlotsResult, struct, space, bucket, node
            )
            if result is None or version not in (None, (result.slots, result.generation)):
                return None
            version = result.slots, result.generation
            rows = [row for row in result.row if row.pages]
            found += [Memslot(row.id, row.gfn, row.pages, row.hva, space) for row in rows]
            bucket, node = result.bucket, result.node
            if not node and bucket >= _ID_BUCKETS:
                return found
        return None

    def huge_entry(self, struct: int, hva: int) -> int | None:
        """First pfn of the poisoned huge page in the page table of the VM's process."""
        if _ARCH not in _PAGE_TABLES:
            return None
        program, names, decode = _PAGE_TABLES[_ARCH]
        variables = (self._symbol(name) for name in names)
        result = self._run_program(program, "entry_results", _EntryResult, struct, hva, *variables)
        return decode(result.entry) if result else None

    def page(self, pfn: int) -> Any:
        """A ``PageResult``: what ``pfn`` belongs to."""
        return self._run_program(
            "page_of",
            "page_results",
            PageResult,
            pfn,
            self._symbol("vmemmap_base"),
            self._symbol("kvm_gmem_aops"),
        )

    def _symbol(self, name: str) -> int:
        return self._symbols.get(name, 0)

    def _run_program(
        self, program: str, table: str, kind: type[ctypes.Structure], *arguments: int
    ) -> Any | None:
        if program not in self._programs:
            try:
                self._programs[program] = self._loader.load(program)
            except OSError as error:
                self.why[program] = f"{error.strerror} {getattr(error, 'log', '')}".strip()
                self._programs[program] = None
        fd = self._programs[program]
        if fd is None:
            return None
        try:
            self._loader.run(fd, arguments)
        except OSError:
            return None
        value = self._loader.maps[table].lookup(bytes(4))
        return kind.from_buffer_copy(value) if value else None


def poisoned_x86(entry: int) -> int | None:
    """The pfn of a poisoned entry in an x86-64 page table (arch/x86/include/asm/pgtable_64.h).

    Five bits of type at the top, the offset inverted below them, from bit 9 on (L1TF).
    """
    if not entry or entry & 0x101 or entry >> 59 not in SPECIAL_TYPES:
        return None
    return ((~entry << 5) & (1 << 64) - 1) >> 14


def poisoned_arm64(entry: int) -> int | None:
    """The pfn of a poisoned huge page's entry on arm64 (arch/arm64/include/asm/pgtable.h).

    Type at bit 6 and offset at bit 12 (Linux 6.13), before that at 3 and 8. A huge page's first pfn
    ends in zeros: read in the newer way, an older entry has a type below the special ones. (Swap
    devices' types, which could be mistaken, are not found there: huge pages are not swapped.)
    """
    if not entry or entry & 1:
        return None
    for type_at, offset_at in ((6, 12), (3, 8)):
        if entry >> type_at & 0x1F in SPECIAL_TYPES:
            return entry >> offset_at & (1 << 50) - 1
    return None


# Program, the variables that it is given, and how to read an entry.
_PAGE_TABLES: dict[str, tuple[str, tuple[str, ...], Callable[[int], int | None]]] = {
    "x86_64": ("huge_entry", ("page_offset_base", "pgdir_shift", "sme_me_mask"), poisoned_x86),
    "aarch64": ("huge_entry_arm64", ("memstart_addr",), poisoned_arm64),
}


def device_of(kernel_dev: int) -> int:
    """dev_t inside the kernel (12:20) → as stat(2) gives it."""
    return os.makedev(kernel_dev >> 20, kernel_dev & 0xFFFFF)
