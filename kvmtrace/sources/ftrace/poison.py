"""Poison: ``poison``, ``gmem_error``, ``soft_offline``, ``unpoison``.

memory_failure calls kvm_gmem_error_folio and then traces its result in the same thread
(mm/memory-failure.c), so a guest_memfd page (``gmem_error``) is of the next ``poison`` of its
thread. A later fault on the page names its owner (``Owned``) if the memslot was not known at the
time of the poison.
"""

from __future__ import annotations

from typing import Any

from kvmtrace import kvm
from kvmtrace.bounded import BoundedDict
from kvmtrace.events import JOIN_NS, Event, GmemPage, Owned, Owner
from kvmtrace.sources import convert
from kvmtrace.sources.ftrace.fields import RET, TGID, ProbeRequest, helper, needed, optional
from kvmtrace.sources.ftrace.memslots import Memslots
from kvmtrace.sources.ftrace.records import Record
from kvmtrace.sources.ftrace.vms import VmResolver
from kvmtrace.sources.limits import MAX_POISONED_PAGES, MAX_THREADS

# The guest_memfd files on an inode: struct gmem_inode has the list since 7.2 (reached by a cast,
# 7.3), the address_space had it before; an entry is the last member of {kvm, bindings, entry}
# (virt/kvm/guest_memfd.c), bindings being an xarray of 16 bytes.
_HEAD = "(gmem_inode,vfs_inode)(mapping->host)->gmem_file_list.next"
_OLD_HEAD = "mapping->i_private_list.next"

# A list head is in the inode, near the address_space, which is part of the inode.
_HEAD_NEAR = 0x1000

_PAGE = (needed("pfn", "pfn:u64"), RET)

PROBES = {
    "poison": ProbeRequest("poison"),
    "gmem_error": ProbeRequest(
        "poison",
        (
            needed("mapping", "mapping:x64"),
            needed("index", "folio->index"),
            optional("ino", "mapping->host->i_ino"),
            helper("entry", f"{_HEAD}:x64", f"{_OLD_HEAD}:x64"),
            helper("next", f"{_HEAD}->next:x64", f"{_OLD_HEAD}->next:x64"),
            helper("kvm", f"(gmem_file,entry)({_HEAD})->kvm:x64", f"-24({_OLD_HEAD}):x64"),
            helper("tgid", f"(gmem_file,entry)({_HEAD})->{TGID}"),
        ),
    ),
    "soft_offline": ProbeRequest("poison", _PAGE),
    "unpoison": ProbeRequest("poison", _PAGE),
}


class Poisons:
    """Records → ``Poison``, ``Owned``, ``SoftOffline``, ``Unpoison``.

    ``names``: of memory_failure_event's ``type`` and ``result``.
    """

    def __init__(self, vms: VmResolver, names: convert.Names) -> None:
        self._vms = vms
        self._names = names
        self.memory = Memslots()
        """The memslots that probes have reported."""
        self._pages: BoundedDict[int, tuple[int, GmemPage]] = BoundedDict(MAX_THREADS)
        """{thread: (time, page)} between ``gmem_error`` and ``poison``."""
        self._owned: BoundedDict[tuple[int, int, int], None] = BoundedDict(MAX_POISONED_PAGES)

    def slot(self, record: Record) -> None:
        """A memslot was created, changed or removed."""
        self.memory.apply_change(record.fields)

    def forget(self, struct: int) -> None:
        self.memory.forget(struct)

    def gmem_error(self, record: Record) -> None:
        """memory_failure calls guest_memfd."""
        fields = record.fields
        index, ino = fields["index"], fields.get("ino")
        owners: list[Owner] = []
        held: set[int] = set()
        if ino is not None:
            for struct, gfn, hva in self.memory.bindings(ino, index):
                vm = self._vms.known_key(struct)
                if vm is not None:
                    owners.append(Owner(vm, gfn, hva))
                    held.add(struct)
        listed = _first_gmem_file_vm(fields)
        if listed is not None and listed not in held:
            vm = self._vms.known_key(listed)
            if vm is None and fields.get("tgid"):
                vm = self._vms.key(record)
            if vm is not None:
                owners.append(Owner(vm, None))
        complete = listed is not None and held == {listed} and _has_single_gmem_file(fields)
        page = GmemPage(ino, index, tuple(owners), complete)
        self._pages.renew(fields["common_pid"], (record.ts, page))

    def poison(self, record: Record) -> Event:
        """memory_failure has handled a page."""
        fields = record.fields
        tid = fields["common_pid"]
        called, gmem = self._pages.pop(tid, (0, None))
        if record.ts - called > JOIN_NS:
            gmem = None
        if gmem is not None and gmem.inode is not None:
            self.memory.add_poisoned(gmem.inode, gmem.index, fields["pfn"])
        pfn, numbers = fields["pfn"], (fields["type"], fields["result"])
        return convert.poison(record.ts, pfn, numbers, self._names, tid=tid, gmem=gmem)

    def gmem(self, record: Record) -> list[Event]:
        """kvm_gmem_get_pfn failed: if for poison, the page belongs to the slot of this fault."""
        fields = record.fields
        self.memory.add(fields)
        vm = self._vms.known_key(fields["kvm"])
        found = self.memory.poisoned_pfn(fields["kvm"], fields["gfn"])
        if fields["ret"] != -kvm.EHWPOISON or found is None or vm is None:
            return []
        pfn, hva = found
        if (pfn, vm, fields["gfn"]) in self._owned:
            return []
        self._owned[pfn, vm, fields["gfn"]] = None
        return [Owned(record.ts, pfn, Owner(vm, fields["gfn"], hva), "fault")]

    def page(self, record: Record) -> list[Event]:
        """A page was moved off bad memory (or could not be), or taken off the poison list."""
        pfn, ret = record.fields["pfn"], record.fields["ret"]
        return convert.page_change(record.ts, pfn, ret, is_unpoison=record.probe == "unpoison")


def _first_gmem_file_vm(fields: dict[str, Any]) -> int | None:
    """The address of the VM of the first file on a guest_memfd's list; from ``gmem_error``."""
    entry = fields.get("entry")
    if not entry or "kvm" not in fields or abs(entry - fields["mapping"]) < _HEAD_NEAR:
        return None
    return int(fields["kvm"]) or None


def _has_single_gmem_file(fields: dict[str, Any]) -> bool:
    """Whether the list has one file only: what follows the first entry is the head."""
    return bool(fields.get("next")) and abs(fields["next"] - fields["mapping"]) < _HEAD_NEAR
