"""The rows of the VM and incident tables, the most urgent first."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from kvmtrace.events import ClockStep
from kvmtrace.judgement.urgency import Urgency, by_urgency, urgency_of
from kvmtrace.model import Incident, Snapshot, Vm
from kvmtrace.views.format import UNKNOWN

KERNEL_ITSELF = "the kernel itself"


@dataclass(frozen=True, slots=True)
class VmRow:
    """A row of the VM table. ``rate``: exits per second; None without two snapshots."""

    vm: Vm
    rate: float | None
    now: int
    steps: tuple[ClockStep, ...] = ()

    @property
    def id(self) -> int:
        return self.vm.key


@dataclass(frozen=True, slots=True)
class IncidentRow:
    """A row of the incident table. ``vms``: by key, to name the owners."""

    incident: Incident
    vms: Mapping[int, Vm]
    now: int
    steps: tuple[ClockStep, ...] = ()

    @property
    def id(self) -> str:
        return self.incident.id

    @property
    def urgency(self) -> Urgency:
        """How urgent it is."""
        return urgency_of(self.incident)

    @property
    def last_ts(self) -> int | None:
        return self.incident.last_delivery_ts or self.incident.poisoned_ts

    @property
    def latency(self) -> int | None:
        """Nanoseconds from poison to first delivery."""
        if self.incident.poisoned_ts is None or self.incident.first_delivery_ts is None:
            return None
        return self.incident.first_delivery_ts - self.incident.poisoned_ts


def vm_rows(snapshot: Snapshot, now: int, rates: Mapping[int, float] | None = None) -> list[VmRow]:
    """The VMs with most poisoned pages, EHWPOISON exits and exits first, those gone last."""
    rates = rates or {}
    rows = [VmRow(vm, rates.get(vm.key), now, snapshot.steps) for vm in snapshot.vms.values()]

    def trouble(row: VmRow) -> Any:
        vm = row.vm
        exits = vm.exits_by_errno()
        counts = (vm.poisoned_pages, exits.get("EHWPOISON", 0), sum(exits.values()))
        return vm.gone, tuple(-count for count in counts), vm.label.casefold(), vm.pid

    return sorted(rows, key=trouble)


def incident_rows(snapshot: Snapshot, now: int) -> list[IncidentRow]:
    """The incidents by urgency."""
    found = by_urgency(snapshot.incidents)
    return [IncidentRow(one, snapshot.vms, now, snapshot.steps) for one in found]


def rates(old: Snapshot, new: Snapshot, nanoseconds: int) -> dict[int, float]:
    """{VM key: exits per second} between two snapshots; VMs that are not in both are absent."""
    if nanoseconds <= 0:
        return {}
    return {
        key: max(0, sum(vm.exits.values()) - sum(old.vms[key].exits.values())) * 1e9 / nanoseconds
        for key, vm in new.vms.items()
        if key in old.vms
    }


def owner_name(vms: Mapping[int, Vm], key: int) -> str:
    """The label of the VM with this key; "-" if it is forgotten."""
    return vms[key].label if key in vms else UNKNOWN


def owners_name(incident: Incident, vms: Mapping[int, Vm], key: int) -> str:
    """The label of an owner: incidents remember VMs that the model has forgotten."""
    party = incident.vm_identities.get(key)
    return party.label if party and key not in vms else owner_name(vms, key)
