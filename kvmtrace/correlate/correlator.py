"""The correlator: events in, model out. Pure and bounded: no clock but the events', no I/O.

The joins, and why each is exact:

- poison with the SIGBUS that memory_failure itself sends: it traces its result in the same thread
  afterwards (mm/memory-failure.c), so the signal waits for the next ``Poison`` of its sender;
- poison with guest_memfd: likewise, by the source (``Poison.gmem``);
- poison with HVA-backed memory: the VMM's page table has the pfn (``Owned``, ``Sigbus.pfn``);
- poison with exits and refusals: by the owner's VM and gfn;
- poison with later signals: by pfn, by VM and gfn, or by an address in the memory that a VM lost;
- poison with hardware errors: by address, as exactly as it was reported (``hardware_errors``).

The incident's timeline keeps which join was made (``facts.Join``).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from typing import Any, TypeVar

from kvmtrace import kvm, page_types
from kvmtrace.bounded import BoundedDict
from kvmtrace.correlate.causes import cause_of
from kvmtrace.correlate.hardware_errors import HardwareErrors
from kvmtrace.correlate.incident import IncidentState
from kvmtrace.correlate.incident_store import IncidentStore
from kvmtrace.correlate.joins import IncidentJoins
from kvmtrace.correlate.limits import Limits
from kvmtrace.correlate.pending import PendingEvents
from kvmtrace.correlate.snapshots import SnapshotMaker
from kvmtrace.correlate.totals import Totals
from kvmtrace.correlate.vms import VmRegistry
from kvmtrace.events import (
    ClockStep,
    Event,
    Exit,
    Found,
    GmemRefusal,
    HwError,
    KernelCounts,
    Lost,
    Owned,
    Owner,
    PageReplaced,
    Poison,
    Reboot,
    Sigbus,
    SoftOffline,
    Tick,
    Unpoison,
    VcpuState,
    VmGone,
    VmSeen,
    wall_time,
)
from kvmtrace.facts import EntryKind, Join, JoinedBy, TimelineEntry
from kvmtrace.model import CorrelatedEvent, Snapshot, SoftOfflinedPage
from kvmtrace.page_types import PageOutcome
from kvmtrace.quick import maker

_AnOwner = TypeVar("_AnOwner", bound=Owned | Owner)

_correlated = maker(CorrelatedEvent)

_BY_GFN = Join(JoinedBy.GFN)
_BY_PAGE_TABLE = Join(JoinedBy.PAGE_TABLE)
_BY_THREAD = Join(JoinedBy.NOTIFIED_THREAD)


class Correlator:
    """Feed it events in the order the source gave them; take ``snapshot()`` at any time.

    Memory is bounded by ``limits`` and the number of live VMs; what has to be forgotten is counted
    in ``lost`` ("incidents", "vms", "owners", …). ``page_shift``: log2 of the page size, in bytes,
    of the host that the events are from.
    """

    def __init__(
        self,
        limits: Limits = Limits(),  # noqa: B008 (frozen)
        page_shift: int = kvm.PAGE_SHIFT,
    ) -> None:
        self._limits = limits
        self._page = 1 << page_shift
        self._totals = Totals(limits)
        self._vms = VmRegistry(limits, self._totals.count_lost)
        self._incidents = IncidentStore(limits, self._totals.count_lost, self._page)
        self._hardware = HardwareErrors(limits.places, page_shift)
        known = self._vms, self._incidents, self._hardware, self._totals
        self._joins = IncidentJoins(*known, self._page)
        self._pending = PendingEvents(limits, self._totals.count_lost)
        self._snapshots = SnapshotMaker(*known, page_shift, lambda: self._last_ts)
        self._soft_offlines: BoundedDict[int, SoftOfflinedPage] = BoundedDict(  # by pfn
            limits.soft_offlines, lambda *_: self._totals.count_lost("soft_offlines", 1)
        )
        self._steps: list[ClockStep] = []
        self._last_ts: int | None = None

    def feed(self, event: Event) -> CorrelatedEvent:
        """Take one event and return it with its joins. Never raises for any order of events."""
        ts, last = event.ts, self._last_ts
        # A Lost has the time at which the loss was noticed, not one of the kernel's.
        if (last is None or ts > last) and type(event) is not Lost:
            self._last_ts = ts
        correlated: CorrelatedEvent = _HANDLERS[type(event)](self, event)
        if self._incidents.is_overfull:
            self._incidents.trim(self._snapshots.is_settled)
        if self._steps:
            correlated = replace(correlated, wall_ts=wall_time(ts, self._steps))
        return correlated

    def _reboot(self, event: Reboot) -> CorrelatedEvent:
        """What was reported of pages is history; what hardware reported is of the same DIMMs."""
        for incident in self._incidents:
            if incident.closed:
                continue
            incident.frozen = None
            if not incident.over:
                incident.rebooted_ts = event.ts
                incident.note(TimelineEntry(event.ts, EntryKind.REBOOT, event))
            self._incidents.close(incident)
        self._incidents.forgotten.clear()
        self._pending = PendingEvents(self._limits, self._totals.count_lost)
        self._soft_offlines.clear()
        return _correlated(event)

    def identity(self, vm: int | None) -> VmSeen | None:
        """Who a VM is or was; None if unknown."""
        return self._vms.seen(vm)

    def _quiet(self, event: Event) -> CorrelatedEvent:
        return _correlated(event)

    def _kernel_counts(self, event: KernelCounts) -> CorrelatedEvent:
        self._totals.add_kernel_counts(event)
        return _correlated(event)

    def _clock_step(self, event: ClockStep) -> CorrelatedEvent:
        self._steps.append(event)
        if len(self._steps) > self._limits.clock_steps:
            del self._steps[0]
            self._totals.count_lost("clock_steps", 1)
        return _correlated(event)

    def _lost(self, event: Lost) -> CorrelatedEvent:
        self._totals.count_lost(event.where, event.count)
        return _correlated(event)

    # -- VMs

    def _vm_seen(self, event: VmSeen) -> CorrelatedEvent:
        self._vms.add(event)
        return _correlated(event, vm=event)

    def _vm_gone(self, event: VmGone) -> CorrelatedEvent:
        vm = self._vms.get(event.vm)
        if vm is None:
            return _correlated(event, vm=self.identity(event.vm))
        if vm.gone_ts is not None:
            return _correlated(event, vm=vm.seen)
        self._vms.mark_gone(event.vm, event.ts)
        self._incidents.forgotten.discard_vm(event.vm)
        mentions = self._incidents.of_vm(event.vm)
        for incident in mentions:
            identity = self._vms.vm_identity(event.vm)
            if identity is not None:
                incident.vm_identities[event.vm] = identity
            if not incident.closed:
                entry = TimelineEntry(event.ts, EntryKind.VM_GONE, event, vm=event.vm)
                incident.note(entry, event.vm)
                self._joins.close_if_all_vms_gone(incident)
        self._vms.shrink(event.vm, keep=bool(mentions))
        return _correlated(event, vm=vm.seen)

    def _vcpu_state(self, event: VcpuState) -> CorrelatedEvent:
        ids = []
        for incident in self._incidents.of_vm(event.vm):
            if not incident.closed and incident.add_sample(event):
                ids.append(incident.id)
                distinct = event.vm, event.tid, event.state
                if not incident.note_again(event.ts, 1, (EntryKind.VCPU_STATE, *distinct)):
                    entry = TimelineEntry(
                        event.ts, EntryKind.VCPU_STATE, event, _BY_THREAD, event.vm
                    )
                    incident.note(entry, *distinct)
        return _correlated(event, vm=self.identity(event.vm), incident=ids[-1] if ids else None)

    def _page_replaced(self, event: PageReplaced) -> CorrelatedEvent:
        incident = self._incidents.find_by_pfn(event.pfn)
        self._incidents.forgotten.discard_pfn(event.pfn, event.vm)
        if incident is not None and self._incidents.release(incident, event.vm, event.hva):
            join = Join(JoinedBy.PAGE_TABLE_CHANGED)
            entry = TimelineEntry(event.ts, EntryKind.PAGE_REPLACED, event, join, event.vm)
            incident.note(entry, event.vm, event.hva)
        return _correlated(
            event, self.identity(event.vm), incident=incident.id if incident else None
        )

    # -- faults

    def _exit(self, event: Exit) -> CorrelatedEvent:
        cause = "hwpoison" if event.errno == kvm.EHWPOISON else cause_of(event)
        of, gfn = event.vm, event.gfn
        incident, known = self._incidents.find_place(of, gfn)
        vm = self._vms.count_exit(event, self._last_ts or event.ts, cause, known)
        if cause != "hwpoison":
            return _correlated(event, vm, cause)
        if incident is None:
            incident = self._incident_or_new(of, gfn)
            if incident is None:
                return _correlated(event, vm, cause)
        ts, vcpu, count = event.ts, event.vcpu, event.count
        incident.exits += count
        if event.errno == kvm.EHWPOISON:
            incident.guest_memfd = True  # others get a SIGBUS
        if not incident.note_again(ts, count, (EntryKind.EXIT, of, vcpu)):
            join = _by_place(gfn, known)
            entry = TimelineEntry(ts, EntryKind.EXIT, event, join, of, count)
            incident.note(entry, of, vcpu)
        self._joins.deliver(incident, ts, of, vcpu, exits=count, page=gfn)
        return _correlated(event, vm, cause, incident.id)

    def _refusal(self, event: GmemRefusal) -> CorrelatedEvent:
        _, gfn = self._incidents.find_place(event.vm, event.gfn)
        self._vms.count_refusal(event, self._last_ts or event.ts, event.gfn if gfn is None else gfn)
        incident = self._incident_or_new(event.vm, event.gfn)
        if incident is not None:
            incident.guest_memfd = True
            join = _by_place(event.gfn, gfn)
            entry = TimelineEntry(event.ts, EntryKind.REFUSAL, event, join, event.vm, event.count)
            incident.note(entry, event.vm, gfn)
        return _correlated(
            event, vm=self.identity(event.vm), incident=incident.id if incident else None
        )

    def _incident_or_new(self, vm: int, gfn: int | None) -> IncidentState | None:
        """Find the incident of a place that KVM reports as poisoned, or open one."""
        incident = self._incidents.find_by_gfn(vm, gfn)
        if incident is None and self._vms.is_gone(vm):
            # The last counts may be read after the VM's end: they do not open an incident.
            known = self._incidents.of_vm(vm)
            return next((i for i in reversed(known) if (vm, gfn) in i.owners), None)
        if incident is None:
            incident = self._incidents.open(f"vm{vm}" if gfn is None else f"g{gfn:x}")
            self._joins.add_owner(incident, Owner(vm, gfn))
        return incident

    # -- poison

    def _poison(self, event: Poison) -> CorrelatedEvent:
        self._totals.add_poison(event)
        owned = self._pending.take_owned(event.pfn, event.ts)
        gmem = event.gmem
        owners = [one.owner for one in owned] + list(gmem.owners if gmem else ())
        outcome = page_types.outcome_of(event.page_type, event.result)
        if gmem is None and outcome == PageOutcome.KERNEL:
            owners = []  # VMs that have the zero page mapped
        incident = self._incidents.find_by_pfn(event.pfn)
        if incident is None:
            incident = self._incident_of_page(event.pfn, owners)
            incident.poisoned_ts = event.ts
            # Exits may have been read before it.
            self._totals.add_latency(event.ts, incident.first_delivery_ts)
        elif incident.before_start and page_types.is_newly_lost(event.page_type):
            incident.not_before_start(event.ts)
        incident.guest_memfd |= gmem is not None
        rank = incident.rank
        incident.judge(event)
        if incident.rank < rank:
            self._incidents.rank_anew()
        if incident.owners and (incident.is_kernels or incident.has_many_places()):
            self._incidents.give_to_kernel(incident)
        if not page_types.is_huge(event.page_type):
            # A huge page's size comes with its owners and signals.
            incident.set_min_size(self._page)
        entry = TimelineEntry(event.ts, EntryKind.POISON, event)
        incident.note(entry, event.page_type, event.result)
        reported: list[Owned | Owner] = [*owned, *(gmem.owners if gmem else ())]
        for one in self._live_first(reported):
            if isinstance(one, Owned):
                incident = self._joins.add_found_owner(incident, one)
            else:
                incident = self._joins.only_incident(incident, one)
                self._joins.add_owner(incident, one, event, Join(JoinedBy.GMEM_THREAD))
        for signal in self._pending.take_signals(event):
            join = Join(JoinedBy.POISONING_THREAD)
            self._joins.add_signal(incident, signal, join, by_poison=True)
        # A guest may access the page while memory_failure is still running.
        for signal in self._pending.take_signals_of(event.pfn):
            self._joins.add_signal(incident, signal, _BY_PAGE_TABLE, by_poison=False)
        owners_seen = tuple((one, self.identity(one.vm)) for one in incident.owners.values())
        return _correlated(event, incident=incident.id, owners=owners_seen)

    def _incident_of_page(self, pfn: int, owners: list[Owner]) -> IncidentState:
        """The incident that an exit opened, if it was read before the poison; else a new one."""
        found = (self._incidents.find_by_gfn(owner.vm, owner.gfn) for owner in owners)
        incident = next((one for one in found if one is not None and one.pfn is None), None)
        incident = incident or self._incidents.open(f"{pfn:x}")
        self._incidents.set_pfn(incident, pfn)
        self._joins.add_hardware_reports(incident)
        return incident

    def _live_first(self, owners: Sequence[_AnOwner]) -> list[_AnOwner]:
        """An incident ends with the last VM that it has: those that are gone are added last."""

        def is_gone(one: Owned | Owner) -> bool:
            return self._vms.is_gone(one.owner.vm if isinstance(one, Owned) else one.vm)

        return sorted(owners, key=is_gone)

    def _found(self, event: Found) -> CorrelatedEvent:
        incident = self._incidents.find_by_pfn(event.pfn)
        if incident is None and event.pfn not in self._soft_offlines:
            owned = self._pending.take_owned(event.pfn, event.ts)
            incident = self._incident_of_page(event.pfn, [one.owner for one in owned])
            incident.before_start = True
            join = Join(JoinedBy.PAGE_FLAGS)
            incident.note(TimelineEntry(event.ts, EntryKind.FOUND, event, join))
            for one in self._live_first(owned):
                incident = self._joins.add_found_owner(incident, one)
            for signal in self._pending.take_signals_of(event.pfn):
                self._joins.add_signal(incident, signal, _BY_PAGE_TABLE, by_poison=False)
        return _correlated(event, incident=incident.id if incident else None)

    def _owned(self, event: Owned) -> CorrelatedEvent:
        incident = self._incidents.find_by_pfn(event.pfn)
        vm = self.identity(event.owner.vm)
        if incident is None:
            self._pending.add(event)
            return _correlated(event, vm=vm)
        known = set(incident.owners.values())
        incident = self._joins.add_found_owner(incident, event)
        new = tuple((one, vm) for one in incident.owners.values() if one not in known)
        return _correlated(event, vm=vm, incident=incident.id, owners=new)

    def _unpoison(self, event: Unpoison) -> CorrelatedEvent:
        incident = self._incidents.find_by_pfn(event.pfn)
        self._incidents.forgotten.discard_pfn(event.pfn)
        self._pending.drop(event.pfn)
        if incident is not None:
            incident.unpoisoned_ts = event.ts
            entry = TimelineEntry(event.ts, EntryKind.UNPOISON, event, Join(JoinedBy.PFN))
            incident.note(entry)
            self._incidents.unpoison(incident)
        self._soft_offlines.pop(event.pfn, None)
        return _correlated(event, incident=incident.id if incident else None)

    def _soft_offline(self, event: SoftOffline) -> CorrelatedEvent:
        self._soft_offlines.renew(event.pfn, SoftOfflinedPage(event.pfn, event.ts, event.errno))
        incident = self._incidents.find_by_pfn(event.pfn)
        if incident is not None:
            entry = TimelineEntry(event.ts, EntryKind.SOFT_OFFLINE, event, Join(JoinedBy.PFN))
            incident.note(entry)
        return _correlated(event, incident=incident.id if incident else None)

    # -- signals

    def _sigbus(self, event: Sigbus) -> CorrelatedEvent:
        self._vms.count_sigbus(event)
        incident, join = self._incident_of_signal(event)
        vm = event.vm
        if incident is not None:
            vm = self._joins.add_signal(incident, event, join, by_poison=False)
        else:
            self._pending.add(event)
        who = self.identity(vm) if vm is not None else self._vms.vmm(event.pid, event.ts)
        return _correlated(event, vm=who, incident=incident.id if incident else None)

    def _incident_of_signal(self, event: Sigbus) -> tuple[IncidentState | None, Join]:
        join = _BY_GFN
        if event.pfn is not None:
            incident = self._incidents.find_by_pfn(event.pfn)
            if incident is not None:
                if event.hva is None:
                    return incident, Join(JoinedBy.EARLIER_POISONING_THREAD)
                if event.vm is not None:
                    place = Owner(event.vm, event.gfn, event.hva)
                    incident = self._joins.only_incident(incident, place)
                return incident, _BY_PAGE_TABLE
        if event.vm is None or event.hva is None:
            return None, join
        if event.gfn is not None:
            incident = self._incidents.find_by_gfn(event.vm, event.gfn)
            if incident is not None:
                return incident, join
        for incident in self._incidents.mentions_of(event.vm):
            if not incident.closed:
                owner = incident.owner_by_hva(event.vm, event.hva, event.lsb)
                if owner is not None:
                    incident.frozen = None
                    return incident, Join(JoinedBy.NEAR_HVA, owner.hva)
        return None, join

    # -- hardware

    def _hardware_error(self, event: HwError) -> CorrelatedEvent:
        site = self._hardware.report(event)
        affected: list[IncidentState] = []
        if site is not None:
            if site.order:
                affected = self._incidents.find_by_pfn_range(site.covers)
            elif (exact := self._incidents.find_by_pfn(site.pfn)) is not None:
                affected = [exact]
            for incident in affected:
                self._joins.add_origin(incident, site)
        return _correlated(event, incident=affected[0].id if len(affected) == 1 else None)

    # -- out

    def snapshot(self) -> Snapshot:
        """The model as of the last event; immutable, safe to hand to another thread."""
        return self._snapshots.take(self._soft_offlines.values(), self._steps)

    def copying(self) -> list[Callable[[], None]]:
        """See ``SnapshotMaker.copying``."""
        return self._snapshots.copying()


# {class: what takes events of it}
_HANDLERS: Mapping[type[Event], Callable[[Correlator, Any], CorrelatedEvent]] = {
    VmSeen: Correlator._vm_seen,
    VmGone: Correlator._vm_gone,
    Exit: Correlator._exit,
    Poison: Correlator._poison,
    Owned: Correlator._owned,
    Sigbus: Correlator._sigbus,
    GmemRefusal: Correlator._refusal,
    HwError: Correlator._hardware_error,
    SoftOffline: Correlator._soft_offline,
    Unpoison: Correlator._unpoison,
    Found: Correlator._found,
    KernelCounts: Correlator._kernel_counts,
    VcpuState: Correlator._vcpu_state,
    PageReplaced: Correlator._page_replaced,
    Tick: Correlator._quiet,
    ClockStep: Correlator._clock_step,
    Reboot: Correlator._reboot,
    Lost: Correlator._lost,
}


def _by_place(gfn: int | None, known_gfn: int | None) -> Join:
    if gfn is None:
        return Join(JoinedBy.VM)
    return _BY_GFN if gfn == known_gfn else Join(JoinedBy.NEAR_GFN, known_gfn)
