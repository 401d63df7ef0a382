"""The correlator: events in, model out. Pure and bounded: no clock but the events', no I/O.

The joins, and why each is exact:

- poison with guest_memfd: memory_failure calls kvm_gmem_error_folio and then traces its result in
  the same thread (mm/memory-failure.c), so a ``GmemPoison`` waits for the next ``Poison`` of its
  thread;
- poison with the SIGBUS that memory_failure itself sends: likewise, by the sending thread;
- poison with HVA-backed memory: the VMM's page table names the pfn (``Owned``, ``Sigbus.pfn``);
- poison with exits and refusals: by the owner's VM and gfn;
- poison with later signals: by pfn, VM and gfn, or an address within the loss of a VM that owns it;
- poison with hardware errors: by address, as exactly as the report is (``provenance``).

How each was made is kept in the incident's timeline.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace

from kvmtrace import kvm, page_types
from kvmtrace.bounded import BoundedDict
from kvmtrace.correlate.causes import cause_of
from kvmtrace.correlate.hardware_errors import ErrorSite, HardwareErrors
from kvmtrace.correlate.incident import IncidentState
from kvmtrace.correlate.incident_store import IncidentStore
from kvmtrace.correlate.limits import Limits
from kvmtrace.correlate.pending import PendingEvents
from kvmtrace.correlate.totals import Totals
from kvmtrace.correlate.vms import VmRegistry
from kvmtrace.events import (
    ClockStep,
    Event,
    Exit,
    Found,
    GmemPoison,
    GmemRefusal,
    HwError,
    KernelCounts,
    Lost,
    Mce,
    Owned,
    Owner,
    PageReplaced,
    Poison,
    Sigbus,
    SoftOffline,
    Unpoison,
    VcpuState,
    VmGone,
    VmSeen,
    wall_time,
)
from kvmtrace.model import (
    CorrelatedEvent,
    EntryKind,
    Incident,
    Join,
    JoinedBy,
    PageClass,
    Snapshot,
    SoftOfflinedPage,
    TimelineEntry,
    VmIdentity,
)
from kvmtrace.page_types import PageOutcome


class Correlator:
    """Feed it events in the order the source gave them; take ``snapshot()`` at any time.

    Memory is bounded by ``limits`` and the number of live VMs; what has to be forgotten is counted
    in ``lost`` ("incidents", "vms", "owners", …). ``page_shift``: log2 of the bytes in a page of
    the host that the events are from.
    """

    def __init__(
        self,
        limits: Limits = Limits(),  # noqa: B008 (frozen)
        page_shift: int = kvm.PAGE_SHIFT,
    ) -> None:
        self._limits = limits
        self._page_shift, self._page = page_shift, 1 << page_shift
        self._account = Totals(limits)
        self._vms = VmRegistry(limits, self._account.lose)
        self._incidents = IncidentStore(limits, self._account.lose, self._page)
        self._hardware = HardwareErrors(limits.places, page_shift)
        self._halves = PendingEvents(limits, self._account.lose)
        self._soft: BoundedDict[int, SoftOfflinedPage] = BoundedDict(  # by pfn
            limits.soft_offlines, lambda *_: self._account.lose("soft_offlines", 1)
        )
        self._steps: list[ClockStep] = []
        self._last_ts: int | None = None

    def feed(self, event: Event) -> CorrelatedEvent:
        """Take one event; returns it with its joins. Never raises for any order of events."""
        told = self._take(event)
        self._incidents.trim(self._settled)
        if self._steps:
            told = replace(told, wall_ts=wall_time(event.ts, self._steps))
        return told

    def _take(self, event: Event) -> CorrelatedEvent:
        # A loss has no time of the kernel's: where it is noticed says when.
        if not isinstance(event, Lost) and (self._last_ts is None or event.ts > self._last_ts):
            self._last_ts = event.ts
        match event:
            case Exit():
                return self._exit(event)
            case Sigbus():
                return self._sigbus(event)
            case Mce() | HwError():
                return self._hardware_error(event)
            case GmemRefusal():
                return self._refused(event)
            case VmSeen():
                self._vms.seen(event)
                return CorrelatedEvent(event, vm=event)
            case VmGone():
                return self._vm_gone(event)
            case Poison():
                return self._poison(event)
            case GmemPoison():
                self._halves.add(event)
            case Owned():
                return self._late_owner(event)
            case Found():
                return self._found(event)
            case SoftOffline():
                return self._soft_offline(event)
            case Unpoison():
                return self._unpoison(event)
            case VcpuState():
                return self._vcpu(event)
            case PageReplaced():
                return self._released(event)
            case KernelCounts():
                self._account.kernel(event)
            case ClockStep():
                self._steps.append(event)
                if len(self._steps) > self._limits.clock_steps:
                    del self._steps[0]
                    self._account.lose("clock_steps", 1)
            case Lost():
                self._account.lose(event.where, event.count)
        return CorrelatedEvent(event)

    def identity(self, vm: int | None) -> VmSeen | None:
        """Who a VM is or was, or None."""
        return self._vms.identity(vm)

    # -- VMs

    def _vm_gone(self, event: VmGone) -> CorrelatedEvent:
        vm = self._vms.get(event.vm)
        if vm is None:
            return CorrelatedEvent(event, vm=self.identity(event.vm))
        if vm.gone_ts is not None:
            return CorrelatedEvent(event, vm=vm.seen)
        self._vms.gone(event.vm, event.ts)
        self._incidents.forgotten.leave(event.vm)
        mentions = self._incidents.of(event.vm)
        for incident in mentions:
            party = self._vms.party(event.vm)
            if party is not None:
                incident.parties[event.vm] = party
            if not incident.closed:
                entry = TimelineEntry(event.ts, EntryKind.VM_GONE, event, vm=event.vm)
                incident.note(entry, event.vm)
                self._close_if_deserted(incident)
        self._vms.settle(event.vm, keep=bool(mentions))
        return CorrelatedEvent(event, vm=vm.seen)

    def _close_if_deserted(self, incident: IncidentState) -> None:
        owners = {owner.vm for owner in incident.owners.values()}
        known = [self._vms.party(vm) or incident.parties.get(vm) for vm in owners]
        if owners and all(party and party.gone_ts is not None for party in known):
            self._incidents.close(incident)

    def _vcpu(self, event: VcpuState) -> CorrelatedEvent:
        ids = []
        for incident in self._incidents.of(event.vm):
            if not incident.closed and incident.look(event):
                ids.append(incident.id)
                join = Join(JoinedBy.NOTIFIED_THREAD)
                entry = TimelineEntry(event.ts, EntryKind.VCPU_STATE, event, join, event.vm)
                incident.note(entry, event.vm, event.tid, event.state)
        return CorrelatedEvent(event, vm=self.identity(event.vm), incident=ids[-1] if ids else None)

    def _released(self, event: PageReplaced) -> CorrelatedEvent:
        incident = self._incidents.at_pfn(event.pfn)
        self._incidents.forgotten.mended(event.pfn, event.vm)
        if incident is not None and incident.release(event.vm, event.hva):
            join = Join(JoinedBy.PAGE_TABLE_CHANGED)
            entry = TimelineEntry(event.ts, EntryKind.PAGE_REPLACED, event, join, event.vm)
            incident.note(entry, event.vm, event.hva)
        return CorrelatedEvent(
            event, self.identity(event.vm), incident=incident.id if incident else None
        )

    # -- faults

    def _exit(self, event: Exit) -> CorrelatedEvent:
        cause = cause_of(event)
        gfn = self._incidents.known_by(event.vm, event.gfn)
        self._vms.exit(event, cause, gfn)
        incident = None
        if cause == "hwpoison":
            incident = self._incident_at(event.vm, event.gfn)
            if incident is not None:
                incident.exits += event.count
                incident.guest_memfd |= event.errno == kvm.EHWPOISON  # others get a SIGBUS
                join = _by_place(event.gfn, gfn)
                entry = TimelineEntry(event.ts, EntryKind.EXIT, event, join, event.vm, event.count)
                incident.note(entry, event.vm, event.vcpu)
                self._deliver(
                    incident, event.ts, event.vm, event.vcpu, exits=event.count, page=event.gfn
                )
        return CorrelatedEvent(
            event,
            vm=self.identity(event.vm),
            cause=cause,
            incident=incident.id if incident else None,
        )

    def _refused(self, event: GmemRefusal) -> CorrelatedEvent:
        gfn = self._incidents.known_by(event.vm, event.gfn)
        self._vms.refused(event, event.gfn if gfn is None else gfn)
        incident = self._incident_at(event.vm, event.gfn)
        if incident is not None:
            incident.guest_memfd = True
            join = _by_place(event.gfn, gfn)
            entry = TimelineEntry(event.ts, EntryKind.REFUSAL, event, join, event.vm, event.count)
            incident.note(entry, event.vm, gfn)
        return CorrelatedEvent(
            event, vm=self.identity(event.vm), incident=incident.id if incident else None
        )

    def _incident_at(self, vm: int, gfn: int | None) -> IncidentState | None:
        """The incident of a place that KVM itself calls poisoned, whether we saw that or not."""
        incident = self._incidents.at_place(vm, gfn)
        if incident is None and self._vms.is_gone(vm):
            # The last counts may be read after the VM's end; they open nothing any more.
            known = self._incidents.of(vm)
            return next((i for i in reversed(known) if (vm, gfn) in i.owners), None)
        if incident is None:
            incident = self._incidents.open(f"vm{vm}" if gfn is None else f"g{gfn:x}")
            self._own(incident, Owner(vm, gfn))
        return incident

    # -- poison

    def _poison(self, event: Poison) -> CorrelatedEvent:
        self._account.poison(event)
        owned = self._halves.owned(event.pfn, event.ts)
        gmem = self._halves.gmem(event)
        owners = [one.owner for one in owned] + list(gmem.owners if gmem else ())
        if (
            gmem is None
            and page_types.outcome_of(event.page_type, event.result) == PageOutcome.KERNEL
        ):
            owners = []  # VMs that have the zero page mapped
        incident = self._incidents.at_pfn(event.pfn)
        if incident is None:
            incident = self._adoptable(owners) or self._incidents.open(f"{event.pfn:x}")
            self._incidents.name_page(incident, event.pfn)
            incident.poisoned_ts = event.ts
            self._join_hardware(incident)
        elif incident.before_start and page_types.is_newly_lost(event.page_type):
            incident.poisoned_after_all(event.ts)
        incident.guest_memfd |= gmem is not None
        incident.judge(event)
        if incident.owners and (incident.disowned or incident.is_elsewhere()):
            self._incidents.disown(incident)
        if not page_types.is_huge(event.page_type):
            incident.grow(self._page)  # a huge page's size comes with its owners and signals
        entry = TimelineEntry(event.ts, EntryKind.POISON, event)
        incident.note(entry, event.page_type, event.result)
        for one in owned:
            self._owned_by(incident, one)
        if gmem is not None:
            for owner in gmem.owners:
                self._own(incident, owner, event.ts, gmem, Join(JoinedBy.GMEM_THREAD))
        for signal in self._halves.signals(event):
            join = Join(JoinedBy.POISONING_THREAD)
            self._take_signal(incident, signal, join, by_poison=True)
        # A guest may touch the page while memory_failure is still at work on it.
        for signal in self._halves.signals_of(event.pfn):
            self._take_signal(incident, signal, Join(JoinedBy.PAGE_TABLE), by_poison=False)
        return CorrelatedEvent(event, incident=incident.id, owners=self._named_owners(incident))

    def _adoptable(self, owners: list[Owner]) -> IncidentState | None:
        """An incident opened by an exit that overtook its poison."""
        for owner in owners:
            incident = self._incidents.at_place(owner.vm, owner.gfn)
            if incident is not None and incident.pfn is None:
                return incident
        return None

    def _found(self, event: Found) -> CorrelatedEvent:
        incident = self._incidents.at_pfn(event.pfn)
        if incident is None and event.pfn not in self._soft:
            owned = self._halves.owned(event.pfn, event.ts)
            incident = self._adoptable([one.owner for one in owned])
            incident = incident or self._incidents.open(f"{event.pfn:x}")
            self._incidents.name_page(incident, event.pfn)
            incident.before_start = True
            join = Join(JoinedBy.PAGE_FLAGS)
            incident.note(TimelineEntry(event.ts, EntryKind.FOUND, event, join))
            self._join_hardware(incident)
            for one in owned:
                self._owned_by(incident, one)
            for signal in self._halves.signals_of(event.pfn):
                self._take_signal(incident, signal, Join(JoinedBy.PAGE_TABLE), by_poison=False)
        return CorrelatedEvent(event, incident=incident.id if incident else None)

    def _late_owner(self, event: Owned) -> CorrelatedEvent:
        incident = self._incidents.at_pfn(event.pfn)
        vm = self.identity(event.owner.vm)
        if incident is None:
            self._halves.add(event)
            return CorrelatedEvent(event, vm=vm)
        known = set(incident.owners.values())
        self._owned_by(incident, event)
        new = tuple((one, vm) for one in incident.owners.values() if one not in known)
        return CorrelatedEvent(event, vm=vm, incident=incident.id, owners=new)

    def _owned_by(self, incident: IncidentState, event: Owned) -> None:
        self._incidents.grow(incident, event.size)
        incident.guest_memfd |= event.via in ("guest_memfd", "fault")
        self._own(incident, event.owner, event.ts, event, Join(JoinedBy.LOOKUP))

    def _own(
        self,
        incident: IncidentState,
        owner: Owner,
        ts: int | None = None,
        event: Event | None = None,
        join: Join | None = None,
    ) -> None:
        gone = self._vms.is_gone(owner.vm)
        self._incidents.own(incident, owner, live=not gone)
        if incident.disowned:
            if ts is not None:
                incident.note(TimelineEntry(ts, EntryKind.MAPPED, event, join))
            return
        if ts is not None:
            entry = TimelineEntry(ts, EntryKind.OWNER, event, join, owner.vm, owner=owner)
            incident.note(entry, owner.vm, owner.gfn)
        party = self._vms.party(owner.vm) if gone else None
        if party is not None:
            incident.parties[owner.vm] = party
            if not incident.closed:
                self._close_if_deserted(incident)

    def _unpoison(self, event: Unpoison) -> CorrelatedEvent:
        incident = self._incidents.at_pfn(event.pfn)
        self._incidents.forgotten.mended(event.pfn)
        self._halves.unpoisoned(event.pfn)
        if incident is not None:
            incident.unpoisoned_ts = event.ts
            entry = TimelineEntry(event.ts, EntryKind.UNPOISON, event, Join(JoinedBy.PFN))
            incident.note(entry)
            self._incidents.unpoison(incident)
        self._soft.pop(event.pfn, None)
        return CorrelatedEvent(event, incident=incident.id if incident else None)

    def _soft_offline(self, event: SoftOffline) -> CorrelatedEvent:
        self._soft.renew(event.pfn, SoftOfflinedPage(event.pfn, event.ts, event.errno))
        incident = self._incidents.at_pfn(event.pfn)
        if incident is not None:
            entry = TimelineEntry(event.ts, EntryKind.SOFT_OFFLINE, event, Join(JoinedBy.PFN))
            incident.note(entry)
        return CorrelatedEvent(event, incident=incident.id if incident else None)

    # -- signals

    def _sigbus(self, event: Sigbus) -> CorrelatedEvent:
        self._vms.sigbus(event)
        incident, join = self._incident_of_signal(event)
        vm = event.vm
        if incident is not None:
            vm = self._take_signal(incident, event, join, by_poison=False)
        else:
            self._halves.add(event)
        who = self.identity(vm) if vm is not None else self._vms.vmm(event.pid, event.ts)
        return CorrelatedEvent(event, vm=who, incident=incident.id if incident else None)

    def _incident_of_signal(self, event: Sigbus) -> tuple[IncidentState | None, Join]:
        join = Join(JoinedBy.GFN)
        if event.pfn is not None:
            incident = self._incidents.at_pfn(event.pfn)
            if incident is not None:
                by_sender = event.hva is None
                return incident, Join(
                    JoinedBy.EARLIER_POISONING_THREAD if by_sender else JoinedBy.PAGE_TABLE
                )
        if event.vm is None or event.hva is None:
            return None, join
        if event.gfn is not None:
            incident = self._incidents.at_place(event.vm, event.gfn)
            if incident is not None:
                return incident, join
        for incident in self._incidents.of(event.vm):
            if not incident.closed:
                owner = incident.place_of_address(event.vm, event.hva, event.lsb)
                if owner is not None:
                    return incident, Join(JoinedBy.NEAR_HVA, owner.hva)
        return None, join

    def _take_signal(
        self, incident: IncidentState, event: Sigbus, join: Join, *, by_poison: bool
    ) -> int | None:
        """Returns the VM that was notified, if it is known."""
        if event.vm is None and (vm := self._holder(incident, event)) is not None:
            event = replace(event, vm=vm, gfn=None)  # of whose memory it is the gfn was not said
            self._vms.sigbus(event)
        if by_poison or event.vcpu is None:
            # memory_failure's own has the loss right; KVM's says 12 for a huge page too.
            self._incidents.grow(incident, 1 << event.lsb if event.lsb is not None else None)
        if event.vm is not None and self._incidents.at_place(event.vm, event.gfn) is None:
            self._own_by_signal(incident, event, event.vm, join)
        code = kvm.sigbus_code_name(event.code)
        is_vmm = event.vm is not None or self._vms.vmm(event.pid, event.ts) is not None
        own = by_poison and event.vcpu is None and event.tid == event.sender
        own = own and not incident.failed_in_use
        kind = EntryKind.OWN_SIGNAL if own else EntryKind.SIGNAL
        entry = TimelineEntry(event.ts, kind, event, join, event.vm, event.count, vmm=is_vmm)
        if own:
            incident.sigbus_at_poison += event.count
            incident.own_signals = [*incident.own_signals[-3:], event]
            incident.note(entry, event.tid)
            return event.vm
        incident.note(entry, event.vm, event.tid, code)
        if not is_vmm:
            incident.sigbus_to_others += event.count
            return None
        incident.sigbus += event.count
        if event.vm is not None:
            signals = {code: event.count}
            # No gfn is below 0.
            page = None if event.hva is None else -1 - event.hva // self._page
            self._deliver(incident, event.ts, event.vm, event.vcpu, signals=signals, page=page)
        else:
            incident.heard(event.ts)  # a VMM was notified; for which of its VMs is not known
        return event.vm

    def _holder(self, incident: IncidentState, event: Sigbus) -> int | None:
        """Which VM of a process with several a signal is about: the one that has that page."""
        mine = self._vms.of_process(event.pid)
        vms = {
            owner.vm
            for owner in incident.owners.values()
            if owner.vm in mine
            and (
                owner.hva is None
                or event.hva is None
                or owner.hva // self._page == event.hva // self._page
                or incident.huge
            )
        }
        return vms.pop() if len(vms) == 1 else None

    def _own_by_signal(self, incident: IncidentState, event: Sigbus, vm: int, join: Join) -> None:
        hva = event.hva
        if hva is None:
            return
        at = incident.place_of_address(vm, hva, None)
        if at is not None and at.hva is not None:
            if at.hva // self._page != hva // self._page:
                return  # another page of the same loss: the owner is known by the one that failed
            hva = at.hva
        has_vm = any(owner.vm == vm for owner in incident.owners.values())
        if event.gfn is not None or not has_vm:
            self._own(incident, Owner(vm, event.gfn, hva), event.ts, event, join)

    def _deliver(
        self,
        incident: IncidentState,
        ts: int,
        vm: int,
        vcpu: int | None,
        *,
        exits: int = 0,
        signals: Mapping[str, int] | None = None,
        page: int | None = None,
    ) -> None:
        was_over = incident.over
        # Whatever was seen of its memory: it still has the page.
        incident.released = {place for place in incident.released if place[0] != vm}
        first = incident.deliver(ts, vm, vcpu, exits=exits, signals=signals, page=page)
        self._incidents.told(incident, vm)
        if first and incident.poisoned_ts is not None and ts >= incident.poisoned_ts:
            self._account.delivered(ts - incident.poisoned_ts)
        if was_over and not incident.over:
            incident.note(TimelineEntry(ts, EntryKind.NOTIFIED_AGAIN, vm=vm), vm)

    # -- hardware

    def _hardware_error(self, event: Mce | HwError) -> CorrelatedEvent:
        errors = self._hardware.report(event)
        affected: list[IncidentState] = []
        if errors is not None and errors.pfn is not None:
            if errors.order:
                affected = self._incidents.within(errors.covers)
            elif (exact := self._incidents.at_pfn(errors.pfn)) is not None:
                affected = [exact]
            for incident in affected:
                self._came_from(incident, errors)
        return CorrelatedEvent(event, incident=affected[0].id if len(affected) == 1 else None)

    def _join_hardware(self, incident: IncidentState) -> None:
        """What was reported of this page before it was poisoned."""
        for errors in self._hardware.at(incident.pfn or 0):
            self._came_from(incident, errors)

    def _came_from(self, incident: IncidentState, errors: ErrorSite) -> None:
        incident.came_from(errors)
        if incident.failed_in_use:
            # Reported after its poison: the thread did not poison the page, it consumed it.
            signals, incident.own_signals = incident.own_signals, []
            for signal in signals:
                incident.sigbus_at_poison -= signal.count
                incident.moments.pop((EntryKind.OWN_SIGNAL, signal.tid), None)
                join = Join(JoinedBy.CONSUMING_THREAD)
                self._take_signal(incident, signal, join, by_poison=True)

    # -- out

    def _named_owners(self, incident: IncidentState) -> tuple[tuple[Owner, VmSeen | None], ...]:
        return tuple((owner, self.identity(owner.vm)) for owner in incident.owners.values())

    def snapshot(self) -> Snapshot:
        """The model as of the last event; immutable, safe to hand to another thread."""
        now = self._last_ts or 0
        forgotten = self._incidents.forgotten.counts()
        pages = forgotten.copy()
        for incident in self._incidents:
            if not incident.over:
                pages.update(key for key in incident.holders if not self._vms.is_gone(key))
                pages[None] += incident.page_class == PageClass.KERNEL
        return Snapshot(
            vms={key: vm.frozen(pages[key], forgotten[key], now) for key, vm in self._vms.items()},
            incidents=tuple(self._frozen(incident, now) for incident in self._incidents),
            poisons=dict(self._account.poisons),
            latency=self._account.latency(),
            lost=dict(self._account.lost),
            last_ts=self._last_ts,
            soft_offlines=tuple(
                replace(page, origin=self._hardware.origin(self._hardware.at(page.pfn)))
                for page in self._soft.values()
            ),
            dimms=self._hardware.dimms(),
            reported=self._hardware.reported(),
            kernel=self._account.kernel_account(),
            page_shift=self._page_shift,
            kernel_pages=pages[None],
            steps=tuple(self._steps),
        )

    def _parties(self, incident: IncidentState) -> dict[int, VmIdentity]:
        known = {key: self._vms.party(key) or incident.parties.get(key) for key in incident.vms}
        return {key: party for key, party in sorted(known.items()) if party is not None}

    def _settled(self, incident: IncidentState) -> bool:
        return incident.settled(self._last_ts or 0, self._parties(incident))

    def _frozen(self, incident: IncidentState, now: int) -> Incident:
        return incident.frozen(
            now,
            self._parties(incident),
            self._hardware.origin(incident.places),
            self._vms.undelivered(incident.owners, now),
        )


def _by_place(gfn: int | None, known_by: int | None) -> Join:
    if gfn is None:
        return Join(JoinedBy.VM)
    return Join(JoinedBy.GFN) if gfn == known_by else Join(JoinedBy.NEAR_GFN, known_by)
