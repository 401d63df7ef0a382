"""Poison: ``poison``, ``gmem_error``, ``soft_offline``, ``unpoison``.

A guest_memfd page (``gmem_error``) and its pfn (``poison``) are joined by the thread, as the
correlator does it. So a later fault on the page can name its owner (``Owned``) if the memslot was
not known at the time of the poison.
"""

from __future__ import annotations

from typing import Any

from kvmtrace import kvm
from kvmtrace.bounded import BoundedDict
from kvmtrace.events import Event, GmemPoison, Owned, Owner, Poison, SoftOffline, Unpoison
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
    """Records → ``Poison``, ``GmemPoison``, ``Owned``, ``SoftOffline``, ``Unpoison``.

    ``names``: of memory_failure_event's ``type`` and ``result``.
    """

    def __init__(self, vms: VmResolver, names: tuple[dict[int, str], dict[int, str]]) -> None:
        self._vms = vms
        self._types, self._results = names
        self.memory = Memslots()
        """The memslots that probes have reported."""
        self._pages: BoundedDict[int, tuple[int, int]] = BoundedDict(MAX_THREADS)
        """{thread: (ino, index)} between ``gmem_error`` and ``poison``."""
        self._owned: BoundedDict[tuple[int, int, int], None] = BoundedDict(MAX_POISONED_PAGES)

    def slot(self, record: Record) -> None:
        """A memslot was created, changed or removed."""
        self.memory.apply_change(record.fields)

    def forget(self, struct: int) -> None:
        """Forget a destroyed VM."""
        self.memory.forget(struct)

    def gmem_error(self, record: Record) -> Event:
        """memory_failure calls guest_memfd."""
        fields = record.fields
        tid, index, ino = fields["common_pid"], fields["index"], fields.get("ino")
        owners: list[Owner] = []
        held: set[int] = set()
        if ino is not None:
            self._pages[tid] = (ino, index)
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
        return GmemPoison(record.ts, tid, ino, index, tuple(owners), complete)

    def poison(self, record: Record) -> Event:
        """memory_failure has handled a page."""
        fields = record.fields
        kind, result, tid = fields["type"], fields["result"], fields["common_pid"]
        page = self._pages.pop(tid, None)
        if page is not None:
            self.memory.add_poisoned(*page, fields["pfn"])
        return Poison(
            record.ts,
            fields["pfn"],
            self._types.get(kind, str(kind)),
            self._results.get(result, str(result)),
            kind,
            result,
            tid,
        )

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
        fields = record.fields
        if record.probe == "soft_offline":
            return [SoftOffline(record.ts, fields["pfn"], -fields["ret"])]
        return [Unpoison(record.ts, fields["pfn"])] if fields["ret"] == 0 else []


def _first_gmem_file_vm(fields: dict[str, Any]) -> int | None:
    """The address of the VM of the first file on a guest_memfd's list; from ``gmem_error``."""
    entry = fields.get("entry")
    if not entry or "kvm" not in fields or abs(entry - fields["mapping"]) < _HEAD_NEAR:
        return None
    return int(fields["kvm"]) or None


def _has_single_gmem_file(fields: dict[str, Any]) -> bool:
    """Whether the list has one file only: what follows the first entry is the head."""
    return bool(fields.get("next")) and abs(fields["next"] - fields["mapping"]) < _HEAD_NEAR
