"""The eBPF source's ``Memory``: memslots and pages by VM key rather than by kernel address."""

from __future__ import annotations

import time
from collections.abc import Callable

from kvmtrace.events import Event, Owner
from kvmtrace.sources.bpf.lookup import KernelLookup, device_of
from kvmtrace.sources.bpf.translator import BpfTranslator
from kvmtrace.sources.guest_memory import Memslot, Page

# Memslots read this recently are not read again: poison comes in bursts, memslots change rarely.
FRESH_SECONDS = 0.25


class BpfMemory:
    """``emit``: called with the VmSeen of VMs that are found during a lookup."""

    def __init__(self, translator: BpfTranslator, emit: Callable[[Event], None]) -> None:
        self._translator = translator
        self._emit = emit
        self._lookup: KernelLookup | None = None
        self._generation: Callable[[int], int] = lambda _struct: 0
        self._slots: dict[int, tuple[float, tuple[Memslot, ...] | None]] = {}

    def use(self, lookup: KernelLookup | None, generation: Callable[[int], int]) -> None:
        """Use these programs from now on, and find the VMs that exist already."""
        self._lookup, self._generation = lookup, generation
        self._slots.clear()
        self._find_vms()

    def slots(self, vm: int) -> tuple[Memslot, ...] | None:
        now = time.monotonic()
        self._slots = {k: v for k, v in self._slots.items() if now - v[0] < FRESH_SECONDS}
        if vm not in self._slots:
            struct = self._struct(vm)
            known = self._lookup.slots(struct) if self._lookup and struct else None
            self._slots[vm] = now, known
        return self._slots[vm][1]

    def huge_entry(self, vm: int, hva: int) -> int | None:
        struct = self._struct(vm)
        return self._lookup.huge_entry(struct, hva) if self._lookup and struct else None

    def page(self, pfn: int) -> tuple[Page, list[Event]] | None:
        result = self._lookup.page(pfn) if self._lookup else None
        if result is None:
            return None
        if not result.file:
            return Page(), []
        events: list[Event] = []
        owners: list[Owner] | None = None
        if result.gmem.seen:
            owners = []
            for place in result.gmem.owners[: result.gmem.nr_owners]:
                vm, seen = self._key(place.kvm, place.pid)
                events += seen
                owners.append(Owner(vm, place.gfn, place.hva or None))
        file = (result.gmem.inode or None, device_of(result.device), result.gmem.index)
        return Page(*file, None if owners is None else tuple(owners)), events

    def _key(self, struct: int, pid: int) -> tuple[int, list[Event]]:
        return self._translator.key_for_struct(struct, self._generation(struct), pid)

    def _struct(self, vm: int) -> int | None:
        known = self._translator.struct_of(vm)
        if known is None:
            self._find_vms()
            known = self._translator.struct_of(vm)
        return known[0] if known else None

    def _find_vms(self) -> None:
        for struct, pid in (self._lookup.vms() if self._lookup else None) or ():
            if pid:
                for event in self._key(struct, pid)[1]:
                    self._emit(event)
