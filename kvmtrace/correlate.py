"""The correlator: events in, model out. Pure and bounded: no clock but the events', no I/O.

The joins, and why each is exact:

- poison with guest_memfd: memory_failure calls kvm_gmem_error_folio and then traces its result in
  the same thread (mm/memory-failure.c), so a ``GmemPoison`` waits for the next ``Poison`` of its
  thread;
- poison with the SIGBUS that memory_failure itself sends: likewise, by the sending thread;
- poison with HVA-backed memory: the VMM's page table names the pfn (``Owned``, ``Sigbus.pfn``);
- poison with exits: by the owner's VM and gfn.
"""

from __future__ import annotations

import bisect
from collections import OrderedDict
from dataclasses import dataclass, field, replace
from typing import Any, TypeVar

from kvmtrace import kvm
from kvmtrace.events import (
    Event,
    Exit,
    GmemPoison,
    Lost,
    Owned,
    Owner,
    Poison,
    Sigbus,
    VmGone,
    VmSeen,
)
from kvmtrace.model import LATENCY_BUCKETS, Incident, Latency, Snapshot, Vm

# A vCPU told this often of one gfn has been re-entered on it without anything being mended: one
# telling per vCPU is the rule, a signal that raced with the exit or a retry makes it two or three.
LOOPING_AFTER = 4

# How long a half of a same-thread join may wait for its other half, which follows within one call
# of memory_failure: longer means that the other half was lost.
JOIN_NS = 5_000_000_000

MAX_INCIDENTS = 1024
MAX_GONE_VMS = 256
MAX_PENDING = 1024
MAX_PENDING_EACH = 64  # per thread or page
MAX_KINDS = 256

_Place = tuple[int, int | None]  # VM key, gfn
_T = TypeVar("_T")


@dataclass(slots=True)
class _Vm:
    seen: VmSeen
    exits: dict[tuple[str, str | None], int] = field(default_factory=dict)
    sigbus: dict[str, int] = field(default_factory=dict)
    last_ts: int | None = None
    gone: bool = False


@dataclass(slots=True)
class _Incident:
    id: str
    pfn: int | None = None
    page_type: str | None = None
    result: str | None = None
    poisoned_ts: int | None = None
    owners: dict[_Place, Owner] = field(default_factory=dict)
    exits: int = 0
    sigbus: int = 0
    sigbus_at_poison: int = 0
    first_delivery_ts: int | None = None
    last_delivery_ts: int | None = None
    told: dict[tuple[int, int | None], int] = field(default_factory=dict)  # (VM, vCPU): times
    looping: bool = False
    closed: bool = False

    @property
    def state(self) -> str:
        if self.closed:
            return "closed"
        if self.looping:
            return "looping"
        if self.first_delivery_ts is not None:
            return "delivered"
        return "latent" if self.owners else "unowned"


@dataclass(frozen=True, slots=True)
class Told:
    """An event with what the correlator made of it: this is what the line views show.

    ``vm``: identity at the time; ``owners`` only for a Poison; ``pfn`` is the incident's.
    """

    event: Event
    vm: VmSeen | None = None
    cause: str | None = None
    incident: str | None = None
    owners: tuple[tuple[Owner, VmSeen | None], ...] = ()


def cause_of(exit_: Exit) -> str | None:
    """The cause of a fault, of the five in ``model.CAUSES``; None where no probe could tell.

    An annotated EFAULT is a conversion if kvm_gmem_get_pfn was never asked, and a failure of the
    backing if it was and failed.
    """
    if exit_.errno == kvm.EHWPOISON:
        return "hwpoison"
    if exit_.errno != kvm.EFAULT:
        return "other"
    if not exit_.annotated:
        return "unannotated"
    if exit_.gmem is None:
        return None
    return "backing" if exit_.gmem else "conversion"


class Correlator:
    """Feed it events in the order the source gave them; take ``snapshot()`` at any time.

    Memory is bounded by the constants above and the number of live VMs; what has to be forgotten
    is counted in ``lost`` ("incidents", "vms").
    """

    def __init__(self) -> None:
        self._vms: OrderedDict[int, _Vm] = OrderedDict()
        self._gone: OrderedDict[int, None] = OrderedDict()
        self._incidents: OrderedDict[str, _Incident] = OrderedDict()
        self._by_pfn: dict[int, _Incident] = {}
        self._by_place: dict[_Place, _Incident] = {}
        self._gmem: OrderedDict[int, GmemPoison] = OrderedDict()  # by thread
        self._signals: OrderedDict[int, list[Sigbus]] = OrderedDict()  # by sending thread
        self._owned: OrderedDict[int, list[Owner]] = OrderedDict()  # by pfn, before its Poison
        self._serial: dict[str, int] = {}
        self._poisons: dict[tuple[str, str], int] = {}
        self._latency = [0] * (len(LATENCY_BUCKETS) + 1)
        self._latency_sum = 0.0
        self._lost: dict[str, int] = {}
        self._last_ts: int | None = None

    def feed(self, event: Event) -> Told:
        """Take one event; returns it with its joins. Never raises for any order of events."""
        if self._last_ts is None or event.ts > self._last_ts:
            self._last_ts = event.ts
        match event:
            case VmSeen():
                return self._vm_seen(event)
            case VmGone():
                return self._vm_gone(event)
            case Exit():
                return self._exit(event)
            case Poison():
                return self._poison(event)
            case GmemPoison():
                self._gmem[event.tid] = event
                _bound(self._gmem)
            case Owned():
                return self._late_owner(event)
            case Sigbus():
                return self._sigbus(event)
            case Lost():
                self._lose(event.where, event.count)
        return Told(event)

    def identity(self, vm: int | None) -> VmSeen | None:
        """What is known of a VM, or None."""
        state = self._vms.get(vm) if vm is not None else None
        return state.seen if state else None

    # -- VMs

    def _vm_seen(self, event: VmSeen) -> Told:
        known = self._vms.get(event.vm)
        if known is None:
            self._vms[event.vm] = _Vm(event)
        else:
            known.seen = event
        return Told(event, vm=event)

    def _vm_gone(self, event: VmGone) -> Told:
        vm = self._vms.get(event.vm)
        if vm is None:
            return Told(event)
        if vm.gone:
            return Told(event, vm=vm.seen)
        vm.gone = True
        for incident in list(self._incidents.values()):
            if not incident.closed and any(o.vm == event.vm for o in incident.owners.values()):
                alive = (self._vms.get(o.vm) for o in incident.owners.values())
                if all(other is None or other.gone for other in alive):
                    self._close(incident)
        if vm.exits or vm.sigbus or any(self._mentions(event.vm)):
            self._gone[event.vm] = None
            while len(self._gone) > MAX_GONE_VMS:
                oldest, _ = self._gone.popitem(last=False)
                del self._vms[oldest]
                self._lose("vms", 1)
        else:
            del self._vms[event.vm]
        return Told(event, vm=vm.seen)

    def _mentions(self, vm: int) -> list[str]:
        return [
            i.id for i in self._incidents.values() if any(o.vm == vm for o in i.owners.values())
        ]

    # -- faults

    def _exit(self, event: Exit) -> Told:
        cause = cause_of(event)
        vm = self._vms.get(event.vm)
        if vm is not None:
            key = (kvm.errno_name(event.errno), cause)
            if key not in vm.exits and len(vm.exits) >= MAX_KINDS:
                key = ("other", cause)
            vm.exits[key] = vm.exits.get(key, 0) + event.count
            vm.last_ts = _latest(vm.last_ts, event.ts)
        incident = None
        if cause == "hwpoison":
            place = (event.vm, event.gfn)
            incident = self._by_place.get(place)
            if incident is None and vm is not None and vm.gone:
                # The last counts may be read after the VM's end; they open nothing any more.
                incident = self._closed_at(place)
            elif incident is None:
                incident = self._open(f"vm{event.vm}" if event.gfn is None else f"g{event.gfn:x}")
                self._own(incident, Owner(event.vm, event.gfn))
            if incident is not None:
                incident.exits += event.count
                self._deliver(incident, event.ts, event.vm, event.vcpu, event.count)
        return Told(
            event,
            vm=vm.seen if vm else None,
            cause=cause,
            incident=incident.id if incident else None,
        )

    def _closed_at(self, place: _Place) -> _Incident | None:
        return next((i for i in reversed(self._incidents.values()) if place in i.owners), None)

    # -- poison

    def _poison(self, event: Poison) -> Told:
        kind = (event.page_type, event.result)
        if kind in self._poisons or len(self._poisons) < MAX_KINDS:
            self._poisons[kind] = self._poisons.get(kind, 0) + 1
        owners = list(self._owned.pop(event.pfn, ()))
        if event.tid is not None:
            gmem = self._gmem.pop(event.tid, None)
            if gmem is not None and 0 <= event.ts - gmem.ts <= JOIN_NS:
                owners += gmem.owners
        incident = self._by_pfn.get(event.pfn)
        if incident is None:
            incident = self._adoptable(owners) or self._open(f"{event.pfn:x}")
            incident.pfn = event.pfn
            incident.page_type, incident.result = event.page_type, event.result
            incident.poisoned_ts = event.ts
            self._by_pfn[event.pfn] = incident
        for owner in owners:
            self._own(incident, owner)
        if event.tid is not None:
            for signal in self._signals.pop(event.tid, ()):
                if 0 <= event.ts - signal.ts <= JOIN_NS:
                    self._take_signal(incident, signal, at_poison=True)
        return Told(event, incident=incident.id, owners=self._named_owners(incident))

    def _adoptable(self, owners: list[Owner]) -> _Incident | None:
        """An incident opened by an exit that overtook its poison."""
        for owner in owners:
            incident = self._by_place.get((owner.vm, owner.gfn))
            if incident is not None and incident.pfn is None:
                return incident
        return None

    def _late_owner(self, event: Owned) -> Told:
        incident = self._by_pfn.get(event.pfn)
        if incident is None:
            _keep(self._owned, event.pfn, event.owner)
            return Told(event, vm=self.identity(event.owner.vm))
        self._own(incident, event.owner)
        return Told(event, vm=self.identity(event.owner.vm), incident=incident.id)

    def _sigbus(self, event: Sigbus) -> Told:
        vm = self._vms.get(event.vm) if event.vm is not None else None
        if vm is not None:
            code = kvm.sigbus_code_name(event.code)
            vm.sigbus[code] = vm.sigbus.get(code, 0) + 1
            vm.last_ts = _latest(vm.last_ts, event.ts)
        incident = self._incident_of_signal(event)
        if incident is not None:
            self._take_signal(incident, event, at_poison=False)
        elif event.sender is not None:
            # Sent by memory_failure, which traces the poison only afterwards.
            _keep(self._signals, event.sender, event)
        return Told(event, vm=vm.seen if vm else None, incident=incident.id if incident else None)

    def _incident_of_signal(self, event: Sigbus) -> _Incident | None:
        if event.pfn is not None and event.pfn in self._by_pfn:
            return self._by_pfn[event.pfn]
        if event.vm is None:
            return None
        if event.gfn is not None and (event.vm, event.gfn) in self._by_place:
            return self._by_place[(event.vm, event.gfn)]
        lsb = event.lsb or kvm.PAGE_SHIFT
        for incident in self._incidents.values():
            for owner in incident.owners.values():
                if (
                    not incident.closed
                    and owner.vm == event.vm
                    and owner.hva is not None
                    and owner.hva >> lsb == event.hva >> lsb
                ):
                    return incident
        return None

    def _take_signal(self, incident: _Incident, event: Sigbus, *, at_poison: bool) -> None:
        if event.vm is not None:
            known = self._by_place.get((event.vm, event.gfn))
            has_vm = any(owner.vm == event.vm for owner in incident.owners.values())
            if known is None and (event.gfn is not None or not has_vm):
                self._own(incident, Owner(event.vm, event.gfn, event.hva))
        if at_poison and event.vcpu is None and event.tid == event.sender:
            incident.sigbus_at_poison += 1
            return
        incident.sigbus += 1
        if event.vm is not None:
            self._deliver(incident, event.ts, event.vm, event.vcpu, 1)

    # -- incidents

    def _open(self, stem: str) -> _Incident:
        number = self._serial.get(stem, 0) + 1
        while f"{stem}-{number}" in self._incidents:  # the number was forgotten, the incident not
            number += 1
        self._serial[stem] = number
        incident = _Incident(f"{stem}-{number}")
        self._incidents[incident.id] = incident
        while len(self._incidents) > MAX_INCIDENTS:
            victim = next((i for i in self._incidents.values() if i.closed), None)
            victim = victim or next(iter(self._incidents.values()))
            self._close(victim)
            del self._incidents[victim.id]
            self._lose("incidents", 1)
        while len(self._serial) > 4 * MAX_INCIDENTS:
            del self._serial[next(iter(self._serial))]
        return incident

    def _own(self, incident: _Incident, owner: Owner) -> None:
        vm = self._vms.get(owner.vm)
        if vm is not None and vm.gone:
            return
        place = (owner.vm, owner.gfn)
        known = incident.owners.get(place)
        if known is None and owner.gfn is not None:
            # The same place, first known without its gfn.
            vague = incident.owners.get((owner.vm, None))
            if vague is not None and (vague.hva is None or _same_page(vague.hva, owner.hva)):
                del incident.owners[(owner.vm, None)]
                if self._by_place.get((owner.vm, None)) is incident:
                    del self._by_place[(owner.vm, None)]
                owner = replace(owner, hva=owner.hva if vague.hva is None else vague.hva)
        elif known is not None and owner.hva is None:
            owner = known
        incident.owners[place] = owner
        self._by_place.setdefault(place, incident)

    def _deliver(self, incident: _Incident, ts: int, vm: int, vcpu: int | None, count: int) -> None:
        if incident.first_delivery_ts is None:
            incident.first_delivery_ts = ts
            if incident.poisoned_ts is not None and ts >= incident.poisoned_ts:
                seconds = (ts - incident.poisoned_ts) / 1e9
                self._latency[bisect.bisect_left(LATENCY_BUCKETS, seconds)] += 1
                self._latency_sum += seconds
        incident.last_delivery_ts = _latest(incident.last_delivery_ts, ts)
        told = incident.told.get((vm, vcpu), 0) + count
        incident.told[(vm, vcpu)] = told
        incident.looping |= told >= LOOPING_AFTER

    def _close(self, incident: _Incident) -> None:
        incident.closed = True
        if incident.pfn is not None and self._by_pfn.get(incident.pfn) is incident:
            del self._by_pfn[incident.pfn]
        for place in incident.owners:
            if self._by_place.get(place) is incident:
                del self._by_place[place]

    def _named_owners(self, incident: _Incident) -> tuple[tuple[Owner, VmSeen | None], ...]:
        return tuple((owner, self.identity(owner.vm)) for owner in incident.owners.values())

    def _lose(self, where: str, count: int) -> None:
        if where not in self._lost and len(self._lost) >= MAX_KINDS:
            where = "other"
        self._lost[where] = self._lost.get(where, 0) + count

    # -- out

    def snapshot(self) -> Snapshot:
        """The model as of the last event; immutable, safe to hand to another thread."""
        pages: dict[int, int] = {}
        for incident in self._incidents.values():
            if not incident.closed:
                for owner in incident.owners.values():
                    pages[owner.vm] = pages.get(owner.vm, 0) + 1
        return Snapshot(
            vms={
                key: Vm(
                    key=key,
                    pid=vm.seen.pid,
                    name=vm.seen.name,
                    uuid=vm.seen.uuid,
                    vmm=vm.seen.vmm,
                    exits=dict(vm.exits),
                    sigbus=dict(vm.sigbus),
                    poisoned_pages=pages.get(key, 0),
                    last_ts=vm.last_ts,
                    gone=vm.gone,
                )
                for key, vm in self._vms.items()
            },
            incidents=tuple(
                Incident(
                    id=i.id,
                    state=i.state,
                    pfn=i.pfn,
                    page_type=i.page_type,
                    result=i.result,
                    poisoned_ts=i.poisoned_ts,
                    owners=tuple(i.owners.values()),
                    exits=i.exits,
                    sigbus=i.sigbus,
                    sigbus_at_poison=i.sigbus_at_poison,
                    first_delivery_ts=i.first_delivery_ts,
                    last_delivery_ts=i.last_delivery_ts,
                )
                for i in self._incidents.values()
            ),
            poisons=dict(self._poisons),
            latency=Latency(tuple(self._latency), self._latency_sum),
            lost=dict(self._lost),
            last_ts=self._last_ts,
        )


def _bound(pending: OrderedDict[Any, Any]) -> None:
    while len(pending) > MAX_PENDING:
        pending.popitem(last=False)


def _keep(pending: OrderedDict[int, list[_T]], key: int, item: _T) -> None:
    """Add to what waits for ``key``: the newest, as many as a page may plausibly have owners."""
    items = pending.setdefault(key, [])
    items.append(item)
    if len(items) > MAX_PENDING_EACH:
        del items[0]
    _bound(pending)


def _same_page(hva: int, other: int | None) -> bool:
    return other is not None and hva >> kvm.PAGE_SHIFT == other >> kvm.PAGE_SHIFT


def _latest(known: int | None, ts: int) -> int:
    return ts if known is None else max(known, ts)
