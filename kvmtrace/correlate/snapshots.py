"""Snapshots of the correlator's state. Copies of what has not changed are used again."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace

from kvmtrace.correlate.freezing import freeze, is_settled
from kvmtrace.correlate.hardware_errors import HardwareErrors
from kvmtrace.correlate.incident import FrozenIncident, IncidentState
from kvmtrace.correlate.incident_store import IncidentStore
from kvmtrace.correlate.totals import Totals
from kvmtrace.correlate.vms import VmRegistry
from kvmtrace.events import ClockStep
from kvmtrace.model import Snapshot, SoftOfflinedPage, VmIdentity

# How many are copied by one call of ``copying``.
_INCIDENTS_AT_ONCE, _VMS_AT_ONCE = 128, 1024


@dataclass(frozen=True, slots=True)
class SnapshotMaker:
    """Makes snapshots of the correlator's state, and changes none of it.

    ``last_ts``: returns when the last event was; None before the first one.
    """

    vms: VmRegistry
    incidents: IncidentStore
    hardware: HardwareErrors
    totals: Totals
    page_shift: int
    last_ts: Callable[[], int | None]

    def _now(self) -> int:
        return self.last_ts() or 0

    def take(
        self, soft_offlines: Iterable[SoftOfflinedPage], steps: Iterable[ClockStep]
    ) -> Snapshot:
        """Copy all that is known."""
        now = self._now()
        frozen = [self._frozen(incident, now) for incident in self.incidents]
        forgotten = self.incidents.forgotten.counts()
        pages = forgotten.copy()
        for one in frozen:
            for key in one.holders:
                pages[key] += not self.vms.is_gone(key)
            pages[None] += one.copy.host_at_risk
        return Snapshot(
            vms={key: vm.frozen(pages[key], forgotten[key], now) for key, vm in self.vms.items()},
            incidents=tuple([one.copy for one in frozen]),
            poisons=dict(self.totals.poisons),
            latency=self.totals.latency(),
            lost=dict(self.totals.lost),
            last_ts=self.last_ts(),
            soft_offlines=tuple(
                replace(page, origin=self.hardware.origin(self.hardware.sites_of(page.pfn)))
                for page in soft_offlines
            ),
            dimms=self.hardware.dimms(),
            reported=self.hardware.reported(),
            kernel=self.totals.kernel_account(),
            page_shift=self.page_shift,
            kernel_pages=pages[None],
            steps=tuple(steps),
        )

    def copying(self) -> list[Callable[[], None]]:
        """Return what may be called before ``take``, so that it has less to do.

        Each call copies some incidents or VMs if they have changed, which takes a millisecond or
        two. Events may be fed in between.
        """
        ids, keys = self.incidents.ids(), [key for key, _ in self.vms.items()]
        parts = [
            functools.partial(self._copy_incidents, ids[first : first + _INCIDENTS_AT_ONCE])
            for first in range(0, len(ids) - _INCIDENTS_AT_ONCE, _INCIDENTS_AT_ONCE)
        ]
        parts += [
            functools.partial(self._copy_vms, keys[first : first + _VMS_AT_ONCE])
            for first in range(0, len(keys) - _VMS_AT_ONCE, _VMS_AT_ONCE)
        ]
        return list(parts)

    def _copy_incidents(self, ids: Sequence[str]) -> None:
        now = self._now()
        for incident in filter(None, map(self.incidents.get, ids)):
            self._frozen(incident, now)

    def _copy_vms(self, keys: Sequence[int]) -> None:
        now = self._now()
        for vm in filter(None, map(self.vms.get, keys)):
            vm.refreeze(now)

    def _frozen(self, incident: IncidentState, now: int) -> FrozenIncident:
        """Return an immutable copy, the last one if it is still right."""
        undelivered = self.vms.undelivered(incident.owners, now)
        hardware = self.hardware.reports if incident.error_sites else 0
        known = incident.frozen
        if (
            known is not None
            and now <= known.until
            and hardware == known.hardware
            and undelivered == known.undelivered
            and self._identities(incident, known.vms) == known.identities
        ):
            return known
        vms = sorted(incident.vms)
        identities = self._identities(incident, vms)
        who = {key: one for key, one in zip(vms, identities, strict=True) if one is not None}
        origin = self.hardware.origin(incident.error_sites)
        copy, until = freeze(incident, now, who, origin, undelivered)
        holders = () if incident.over else incident.holders
        incident.frozen = FrozenIncident(
            copy, until, vms, identities, undelivered, hardware, holders
        )
        return incident.frozen

    def _identities(self, incident: IncidentState, vms: Iterable[int]) -> list[VmIdentity | None]:
        get = self.vms.vm_identity
        return [get(key) or incident.vm_identities.get(key) for key in vms]

    def is_settled(self, incident: IncidentState) -> bool:
        """Whether every VM that owns the page was notified of it and handled it."""
        if not incident.samples:
            # Only the end of its VMs settles it, and nearly all live.
            for vm, _ in incident.deliveries:
                if not self.vms.is_gone(vm) and vm not in incident.vm_identities:
                    return False
        vms = sorted(incident.vms)
        identities = zip(vms, self._identities(incident, vms), strict=True)
        who = {key: one for key, one in identities if one is not None}
        return is_settled(incident, self._now(), who)
