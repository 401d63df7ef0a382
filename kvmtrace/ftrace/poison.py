"""Poison, machine checks, and the signals they lead to.

A page of a guest_memfd is joined with its pfn as correlate.py does it, by the thread, so that a
fault on it can tell its owner (``Owned``) where the slot was not known at the time of the poison.
A signal that KVM sends is sent from within the fault handler to the thread itself: the fault that
returns next on this thread with the "poisoned" pfn is the one it was sent for.
"""

from __future__ import annotations

import dataclasses
from collections import OrderedDict
from typing import Any

from kvmtrace import kvm
from kvmtrace.events import Event, GmemPoison, Mce, Owned, Owner, Poison, Sigbus
from kvmtrace.ftrace import records
from kvmtrace.ftrace.guest import GuestMemory
from kvmtrace.ftrace.people import People
from kvmtrace.ftrace.records import Record

# A signal waits this long for the fault it was sent from, which returns right after.
SIGNAL_WAIT_NS = 50_000_000
_MCI_STATUS_ADDRV = 1 << 58  # arch/x86/include/asm/mce.h
_MAX_PENDING = 4096


class Poisons:
    """``gmem_error``, ``poison``, ``mce`` and ``slot`` records.

    ``names``: of memory_failure_event's ``type`` and ``result``.
    """

    def __init__(self, people: People, names: tuple[dict[int, str], dict[int, str]]) -> None:
        self._people = people
        self._types, self._results = names
        self._memory = GuestMemory()
        self._pages: OrderedDict[int, tuple[int, int]] = OrderedDict()  # thread → (ino, index)
        self._owned: OrderedDict[tuple[int, int, int], None] = OrderedDict()

    def slot(self, record: Record) -> None:
        """A memslot was made, changed or removed."""
        self._memory.changed(record.fields)

    def forget(self, struct: int) -> None:
        """The VM is gone."""
        self._memory.forget(struct)

    def gmem_error(self, record: Record) -> Event:
        """memory_failure tells guest_memfd."""
        fields = record.fields
        tid, index, ino = fields["common_pid"], fields["index"], fields.get("ino")
        owners: list[Owner] = []
        held: set[int] = set()
        if ino is not None:
            self._pages[tid] = (ino, index)
            _bound(self._pages)
            for struct, gfn, hva in self._memory.bindings(ino, index):
                vm = self._people.known(struct)
                if vm is not None:
                    owners.append(Owner(vm, gfn, hva))
                    held.add(struct)
        listed = records.first_listed(fields)
        if listed is not None and listed not in held:
            vm = self._people.known(listed)
            if vm is None and fields.get("tgid"):
                vm = self._people.key(record)
            if vm is not None:
                owners.append(Owner(vm, None))
        complete = listed is not None and held == {listed} and records.only_one_listed(fields)
        return GmemPoison(record.ts, tid, ino, index, tuple(owners), complete)

    def poison(self, record: Record) -> Event:
        """memory_failure's verdict."""
        fields = record.fields
        kind, result, tid = fields["type"], fields["result"], fields["common_pid"]
        page = self._pages.pop(tid, None)
        if page is not None:
            self._memory.poisoned(*page, fields["pfn"])
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
        """kvm_gmem_get_pfn failed: if for poison, the slot it was asked for owns the page."""
        fields = record.fields
        self._memory.learn(fields)
        vm = self._people.known(fields["kvm"])
        found = self._memory.poisoned_pfn(fields["kvm"], fields["gfn"])
        if fields["ret"] != -kvm.EHWPOISON or found is None or vm is None:
            return []
        pfn, hva = found
        if (pfn, vm, fields["gfn"]) in self._owned:
            return []
        self._owned[pfn, vm, fields["gfn"]] = None
        _bound(self._owned)
        return [Owned(record.ts, pfn, Owner(vm, fields["gfn"], hva), "fault")]

    def mce(self, record: Record) -> Event:
        """A machine check."""
        fields = record.fields
        addr = fields["addr"] if fields["status"] & _MCI_STATUS_ADDRV else None
        return Mce(
            record.ts,
            addr,
            None if addr is None else addr >> kvm.PAGE_SHIFT,
            fields["bank"],
            fields["cpu"],
            fields["socketid"],
            fields["status"],
            fields.get("misc"),
        )


class Signals:
    """``sigbus`` and ``sigbus_forced`` records."""

    def __init__(self, people: People) -> None:
        self._people = people
        self._waiting: OrderedDict[int, Sigbus] = OrderedDict()  # by thread

    def __bool__(self) -> bool:
        return bool(self._waiting)

    def sigbus(self, record: Record) -> list[Event]:
        """A signal is sent; told now, or when the fault that it was sent from is known."""
        fields = record.fields
        sender = fields["common_pid"]
        tid = fields.get("tid", sender)
        pid = self._people.process_of(tid, fields.get("tgid"))
        event = Sigbus(
            record.ts,
            pid,
            tid,
            fields["code"],
            fields["addr"],
            fields.get("lsb"),
            sender,
            self._people.only_vm_of(pid),  # asked now: it may be gone when the waiting is over
        )
        if record.probe != "sigbus" or tid != sender or event.code != kvm.BUS_MCEERR_AR:
            return [event]
        earlier = self._waiting.pop(tid, None)
        self._waiting[tid] = event
        return [] if earlier is None else [earlier]

    def fault(self, record: Record) -> list[Event]:
        """A fault on poisoned memory returned: its thread's signal was for this."""
        event = self._waiting.pop(record.fields["common_pid"], None)
        if event is None:
            return []
        fields = record.fields
        vm = self._people.key(record, event.ts)
        return [dataclasses.replace(event, vm=vm, vcpu=fields["vid"], gfn=fields["gfn"])]

    def overdue(self, now: float) -> list[Event]:
        """Signals whose fault did not come."""
        late = [tid for tid, event in self._waiting.items() if now - event.ts > SIGNAL_WAIT_NS]
        return [self._waiting.pop(tid) for tid in late]


def _bound(pending: OrderedDict[Any, Any]) -> None:
    while len(pending) > _MAX_PENDING:
        pending.popitem(last=False)
