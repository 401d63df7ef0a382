"""What is joined to an incident, and what that changes: owners, signals, hardware errors."""

from __future__ import annotations

from dataclasses import dataclass, replace

from kvmtrace import kvm
from kvmtrace.correlate.error_site import ErrorSite
from kvmtrace.correlate.hardware_errors import HardwareErrors
from kvmtrace.correlate.incident import IncidentState
from kvmtrace.correlate.incident_store import IncidentStore
from kvmtrace.correlate.totals import Totals
from kvmtrace.correlate.vms import VmRegistry
from kvmtrace.events import Event, Owned, Owner, Sigbus
from kvmtrace.facts import EntryKind, Join, JoinedBy, TimelineEntry
from kvmtrace.model import lost_gfns


@dataclass(frozen=True, slots=True)
class IncidentJoins:
    """Adds to incidents that were found already. ``page``: size of a page, in bytes."""

    vms: VmRegistry
    incidents: IncidentStore
    hardware: HardwareErrors
    totals: Totals
    page: int

    # -- owners

    def only_incident(self, incident: IncidentState, owner: Owner) -> IncidentState:
        """The incident of a page and an owner of it.

        The owner's exits may have opened others of that place, before its page was known: of a huge
        page, one for each gfn.
        """
        lost = lost_gfns(owner, incident.size, self.page.bit_length() - 1)
        if lost is None:
            return incident
        found = [self.incidents.find_by_gfn(owner.vm, owner.gfn)]
        if incident.huge:
            found += [
                one
                for one in self.incidents.mentions_of(owner.vm)
                if any(
                    of == owner.vm and gfn is not None and lost[0] <= gfn <= lost[1]
                    for of, gfn in one.owners
                )
            ]
        for place in found:
            if place is None or place is incident or place.closed or place.pfn is not None:
                continue
            if incident.first_delivery_ts is None:
                self.totals.add_latency(incident.poisoned_ts, place.first_delivery_ts)
            incident = self.incidents.merge(incident, place)
        return incident

    def add_found_owner(self, incident: IncidentState, event: Owned) -> IncidentState:
        """Add an owner that was looked up; returns the incident that the page has then."""
        self.incidents.set_min_size(incident, event.size)
        incident = self.only_incident(incident, event.owner)
        incident.guest_memfd |= event.via in ("guest_memfd", "fault")
        self.add_owner(incident, event.owner, event, Join(JoinedBy.LOOKUP))
        return incident

    def add_owner(
        self,
        incident: IncidentState,
        owner: Owner,
        event: Event | None = None,
        join: Join | None = None,
    ) -> None:
        """Add an owner. ``event``: what showed it, for the timeline."""
        gone = self.vms.is_gone(owner.vm)
        self.incidents.add_owner(incident, owner, live=not gone)
        if incident.is_kernels:
            if event is not None:
                incident.note(TimelineEntry(event.ts, EntryKind.MAPPED, event, join))
            return
        if event is not None:
            entry = TimelineEntry(event.ts, EntryKind.OWNER, event, join, owner.vm, owner=owner)
            incident.note(entry, owner.vm, owner.gfn)
        identity = self.vms.vm_identity(owner.vm) if gone else None
        if identity is not None:
            incident.vm_identities[owner.vm] = identity
            if not incident.closed:
                self.close_if_all_vms_gone(incident)

    def close_if_all_vms_gone(self, incident: IncidentState) -> None:
        """Close an incident that has owners, none of which is still there."""
        owners = {owner.vm for owner in incident.owners.values()}
        known = [self.vms.vm_identity(vm) or incident.vm_identities.get(vm) for vm in owners]
        if owners and all(identity and identity.gone_ts is not None for identity in known):
            self.incidents.close(incident)

    # -- notifications

    def add_signal(
        self, incident: IncidentState, event: Sigbus, join: Join, *, by_poison: bool
    ) -> int | None:
        """Count a signal in its incident; returns the VM that was notified, None if unknown."""
        if event.vm is None and (vm := self._vm_owning_page(incident, event)) is not None:
            event = replace(event, vm=vm, gfn=None)  # the gfn may be another VM's
            self.vms.count_sigbus(event)
        if by_poison or event.vcpu is None:
            # memory_failure's own signals have the right size; KVM's have 12 for a huge page, too.
            size = 1 << event.lsb if event.lsb is not None else None
            self.incidents.set_min_size(incident, size)
        if event.vm is not None and self.incidents.find_by_gfn(event.vm, event.gfn) is None:
            self._add_owner_by_signal(incident, event, event.vm, join)
        code = kvm.sigbus_code_name(event.code)
        is_vmm = event.vm is not None or self.vms.vmm(event.pid, event.ts) is not None
        own = by_poison and event.vcpu is None and event.tid == event.sender
        own = own and not incident.consumed_by_access
        kind = EntryKind.OWN_SIGNAL if own else EntryKind.SIGNAL

        if own:
            incident.sigbus_at_poison += event.count
            incident.own_signals = [*incident.own_signals[-3:], event]
        distinct = (event.tid,) if own else (event.vm, event.tid, code)
        if not incident.note_again(event.ts, event.count, (kind, *distinct)):
            entry = TimelineEntry(event.ts, kind, event, join, event.vm, event.count, vmm=is_vmm)
            incident.note(entry, *distinct)
        if own:
            return event.vm
        if not is_vmm:
            incident.sigbus_to_others += event.count
            return None
        incident.sigbus += event.count
        if event.vm is not None:
            # Negative, so that it is no gfn.
            page = None if event.hva is None else -1 - event.hva // self.page
            self.deliver(
                *(incident, event.ts, event.vm, event.vcpu),
                code=code,
                signals=event.count,
                page=page,
            )
        else:
            incident.mark_delivered(event.ts)  # for which of the VMM's VMs is not known
        return event.vm

    def _vm_owning_page(self, incident: IncidentState, event: Sigbus) -> int | None:
        """Of a process with several VMs, the one that has the page that a signal is about."""
        mine = self.vms.of_process(event.pid)
        vms = {
            owner.vm
            for owner in incident.owners.values()
            if owner.vm in mine
            and (
                owner.hva is None
                or event.hva is None
                or owner.hva // self.page == event.hva // self.page
                or incident.huge
            )
        }
        return vms.pop() if len(vms) == 1 else None

    def _add_owner_by_signal(
        self, incident: IncidentState, event: Sigbus, vm: int, join: Join
    ) -> None:
        hva = event.hva
        if hva is None:
            return
        at = incident.owner_by_hva(vm, hva, None)
        if at is not None and at.hva is not None:
            if at.hva // self.page != hva // self.page:
                return  # another page of the same huge page: the owner keeps the first
            hva = at.hva
        has_vm = at is not None or any(owner.vm == vm for owner in incident.owners.values())
        if event.gfn is not None or not has_vm:
            self.add_owner(incident, Owner(vm, event.gfn, hva), event, join)

    def deliver(
        self,
        incident: IncidentState,
        ts: int,
        vm: int,
        vcpu: int | None,
        *,
        exits: int = 0,
        code: str | None = None,
        signals: int = 0,
        page: int | None = None,
    ) -> None:
        """Count that a vCPU was notified. ``page``: a number for which page of a huge one."""
        was_over = incident.unpoisoned_ts is not None and incident.over
        # A VM that is notified still has the page.
        if incident.released:
            incident.released = {place for place in incident.released if place[0] != vm}
        first = incident.deliver(ts, vm, vcpu, exits=exits, code=code, signals=signals, page=page)
        self.incidents.add_notified_vm(incident, vm)
        if first:
            self.totals.add_latency(incident.poisoned_ts, ts)
        if was_over and not incident.over:
            incident.note(TimelineEntry(ts, EntryKind.NOTIFIED_AGAIN, vm=vm), vm)

    # -- hardware

    def add_hardware_reports(self, incident: IncidentState) -> None:
        """Join what was reported of this page before it was poisoned."""
        for site in self.hardware.sites_of(incident.pfn or 0):
            self.add_origin(incident, site)

    def add_origin(self, incident: IncidentState, site: ErrorSite) -> None:
        """Add a place that holds the page and of which hardware reported errors."""
        incident.add_origin(site)
        if incident.consumed_by_access:
            # Reported after the poison: the thread accessed the page and did not poison it.
            signals, incident.own_signals = incident.own_signals, []
            for signal in signals:
                incident.sigbus_at_poison -= signal.count
                incident.entries.pop((EntryKind.OWN_SIGNAL, signal.tid), None)
                join = Join(JoinedBy.CONSUMING_THREAD)
                self.add_signal(incident, signal, join, by_poison=True)
