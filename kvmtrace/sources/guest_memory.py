"""Guest memory in the kernel: memslots, and pages that a source can look up.

A source that can read kernel memory has a ``Memory`` as its attribute ``memory``. Without it, what
only it could look up stays unknown.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Protocol, runtime_checkable

from kvmtrace import kvm
from kvmtrace.events import Event, Owner


@dataclass(frozen=True, slots=True)
class Memslot:
    """A memslot (struct kvm_memory_slot): ``pages`` host pages at ``hva``, from ``gfn`` on.

    ``space``: the address space (x86: 1 is SMM's). ``hva`` is 0 if guest_memfd alone backs the
    slot. ``id`` is None if the source did not see it.
    """

    id: int | None
    gfn: int
    pages: int
    hva: int
    space: int = 0

    def hva_of(self, gfn: int) -> int | None:
        """Return where the VMM has ``gfn`` mapped; None if it is not in this slot."""
        if not self.hva or not self.gfn <= gfn < self.gfn + self.pages:
            return None
        return self.hva + ((gfn - self.gfn) << kvm.PAGE_SHIFT)


@dataclass(frozen=True, slots=True)
class Page:
    """What a page belongs to, from its struct folio, whether or not it is mapped.

    ``inode``, ``device`` (dev_t as in stat(2)) and ``index`` (page offset) of a file's page; None
    for anonymous and free pages. ``owners``: VMs, by the bindings of guest_memfd; None for any
    other page.
    """

    inode: int | None = None
    device: int | None = None
    index: int | None = None
    owners: tuple[Owner, ...] | None = None


class Memory(Protocol):
    """What a source can look up of guest memory at any time; None if it cannot."""

    def slots(self, vm: int) -> tuple[Memslot, ...] | None:
        """Return the memslots of a VM; only some if the source has not seen all of them."""

    def huge_entry(self, vm: int, hva: int) -> int | None:
        """Return the first pfn of the poisoned huge page at ``hva``, from the VMM's page table."""

    def page(self, pfn: int) -> tuple[Page, list[Event]] | None:
        """Return what ``pfn`` belongs to, and VmSeen for owners that were not known."""


@runtime_checkable
class HasMemory(Protocol):
    """A source with a ``Memory``."""

    memory: Memory


def gfns_at(slots: Iterable[Memslot], hva: int) -> list[int]:
    """Return the guest frames at ``hva``, sorted; several if slots alias."""
    return sorted(
        {
            slot.gfn + ((hva - slot.hva) >> kvm.PAGE_SHIFT)
            for slot in slots
            if slot.hva and slot.hva <= hva < slot.hva + (slot.pages << kvm.PAGE_SHIFT)
        }
    )
