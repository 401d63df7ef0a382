"""Memslots as probes report them (``slot``, ``gmem``), and the owners of pages by them.

Pure. A slot is reported when it is created or changed, and by a failed fault on it. Slots of VMs
from before the start are unknown until such a fault.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from kvmtrace.bounded import BoundedDict
from kvmtrace.probes import ProbeSpec
from kvmtrace.sources.ftrace.fields import ProbeRequest, needed, optional, slot_fields
from kvmtrace.sources.guest_memory import Memslot
from kvmtrace.sources.limits import MAX_POISONED_PAGES, MAX_SLOTS

# include/uapi/linux/kvm.h
_MEM_GUEST_MEMFD = 1 << 2
_MR_DELETE = 1  # include/linux/kvm_host.h, enum kvm_mr_change

SLOT = ProbeSpec("slot", ("kvm_arch_commit_memory_region",), "entry", "")
"""Not in probes.specs: it only serves other probes, and ``doctor`` does not list it."""
PROBES = {
    "slot": ProbeRequest(
        "poison",
        (
            needed("kvm", "kvm:x64"),
            needed("change", "change"),  # include/linux/kvm_host.h, enum kvm_mr_change
            needed("old_base", "old->base_gfn"),
            optional("old_as_id", "old->as_id"),
            *slot_fields("new"),
        ),
    )
}


@dataclass(frozen=True, slots=True)
class TracedSlot(Memslot):
    """A memslot; ``ino`` and ``pgoff`` (in pages) only where guest_memfd backs it."""

    ino: int | None = None
    pgoff: int | None = None

    def gfn_of_index(self, ino: int, index: int) -> int | None:
        """The gfn at which page ``index`` of guest_memfd ``ino`` is bound here."""
        if self.ino != ino or self.pgoff is None:
            return None
        if not self.pgoff <= index < self.pgoff + self.pages:
            return None
        return self.gfn + index - self.pgoff


class Memslots:
    """Slots by VM (address of ``struct kvm``), and poisoned guest_memfd pages by (ino, index).

    Bounded: the oldest are forgotten first.
    """

    def __init__(self) -> None:
        self._slots: OrderedDict[int, dict[tuple[int, int], TracedSlot]] = OrderedDict()
        self._count = 0
        self._poisoned: BoundedDict[tuple[int, int], int] = BoundedDict(MAX_POISONED_PAGES)

    def apply_change(self, fields: Mapping[str, Any]) -> None:
        """A ``slot`` record: a memslot was created, deleted, moved, or its flags changed."""
        slots = self._slots.get(fields["kvm"], {})
        old = (fields.get("old_as_id") or 0, fields["old_base"])
        if slots.pop(old, None) is not None:
            self._count -= 1
        if fields["change"] != _MR_DELETE and fields.get("npages"):
            self.add(fields)

    def add(self, fields: Mapping[str, Any]) -> None:
        """Remember the slot of a record with ``kvm`` and fields.slot_fields."""
        base, npages = fields.get("base"), fields.get("npages")
        if base is None or not npages:
            return
        is_gmem = bool((fields.get("flags") or 0) & _MEM_GUEST_MEMFD)
        slot = TracedSlot(
            None,
            base,
            npages,
            fields.get("hva") or 0,
            fields.get("as_id") or 0,
            (fields.get("ino") or None) if is_gmem else None,
            fields.get("pgoff") if is_gmem else None,
        )
        slots = self._slots.setdefault(fields["kvm"], {})
        key = (slot.space, base)
        known = slots.get(key)
        if known is not None and known.ino and not slot.ino:
            # Its guest_memfd was closed. Poisoned pages are still found by the old binding.
            return
        self._count += known is None
        slots[key] = slot
        while self._count > MAX_SLOTS and len(self._slots) > 1:
            _, forgotten = self._slots.popitem(last=False)
            self._count -= len(forgotten)

    def forget(self, vm: int) -> None:
        self._count -= len(self._slots.pop(vm, ()))

    def slot_of(self, vm: int, gfn: int) -> TracedSlot | None:
        """The memslot that holds a gfn."""
        for slot in self._slots.get(vm, {}).values():
            if slot.gfn <= gfn < slot.gfn + slot.pages:
                return slot
        return None

    def slots(self, vm: int) -> tuple[TracedSlot, ...]:
        """The known memslots of a VM."""
        return tuple(self._slots.get(vm, {}).values())

    def page(self, pfn: int) -> tuple[int, int] | None:
        """(ino, index) of a poisoned page, if it is of a guest_memfd."""
        return next((page for page, poisoned in self._poisoned.items() if poisoned == pfn), None)

    def bindings(self, ino: int, index: int) -> list[tuple[int, int, int | None]]:
        """Known owners of a guest_memfd page: [(struct kvm, gfn, hva)]."""
        found = []
        for vm, slots in self._slots.items():
            for slot in slots.values():
                gfn = slot.gfn_of_index(ino, index)
                if gfn is not None:
                    found.append((vm, gfn, slot.hva_of(gfn)))
        return found

    def add_poisoned(self, ino: int, index: int, pfn: int) -> None:
        """Remember a poisoned page of a guest_memfd."""
        self._poisoned[ino, index] = pfn

    def poisoned_pfn(self, vm: int, gfn: int) -> tuple[int, int | None] | None:
        """(pfn, hva) of the page at ``gfn`` if it is known to be poisoned."""
        slot = self.slot_of(vm, gfn)
        if slot is None or slot.ino is None or slot.pgoff is None:
            return None
        pfn = self._poisoned.get((slot.ino, gfn - slot.gfn + slot.pgoff))
        return None if pfn is None else (pfn, slot.hva_of(gfn))
