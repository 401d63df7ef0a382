"""Guest memory as the kernel keeps it: memslots, and what a source may know of pages.

A source that can look into the kernel offers a ``Memory`` as its attribute ``memory``; the others
leave it out, and what only it could know stays unknown.
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

    ``space``: the address space (x86: 1 is SMM's). A slot on guest_memfd alone has ``hva`` 0; an
    ``id`` that the source did not see is None.
    """

    id: int | None
    gfn: int
    pages: int
    hva: int
    space: int = 0

    def hva_of(self, gfn: int) -> int | None:
        """Where the VMM has a guest frame of this slot mapped."""
        if not self.hva or not self.gfn <= gfn < self.gfn + self.pages:
            return None
        return self.hva + ((gfn - self.gfn) << kvm.PAGE_SHIFT)


@dataclass(frozen=True, slots=True)
class Page:
    """What a page belongs to, from its struct folio, whether or not anybody has it mapped.

    ``inode``, ``device`` (dev_t as stat(2) gives it) and ``index`` (page offset) of a file's page,
    None for anonymous and free ones. ``owners``: for guest_memfd, whose bindings lead to the VMs;
    None for any other page.
    """

    inode: int | None = None
    device: int | None = None
    index: int | None = None
    owners: tuple[Owner, ...] | None = None


class Memory(Protocol):
    """What a source can look up of VMs' memory at any time; None where it cannot."""

    def slots(self, vm: int) -> tuple[Memslot, ...] | None:
        """The memslots of a VM as they are now; only some where the source has not seen all."""

    def huge_entry(self, vm: int, hva: int) -> int | None:
        """The first pfn of the poisoned huge page that the VMM's page table names for ``hva``."""

    def page(self, pfn: int) -> tuple[Page, list[Event]] | None:
        """What ``pfn`` belongs to, and the VmSeen of owners that were not known yet."""


@runtime_checkable
class HasMemory(Protocol):
    """A source with a ``Memory``."""

    memory: Memory


def gfns_at(slots: Iterable[Memslot], hva: int, page_shift: int = kvm.PAGE_SHIFT) -> list[int]:
    """The guest frames that live at ``hva``; several where slots alias, in order."""
    return sorted(
        {
            slot.gfn + ((hva - slot.hva) >> page_shift)
            for slot in slots
            if slot.hva and slot.hva <= hva < slot.hva + (slot.pages << page_shift)
        }
    )
