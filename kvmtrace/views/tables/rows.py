"""The rows of the VM and incident tables, in the order in which an on-call engineer reads them."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from kvmtrace.events import ClockStep
from kvmtrace.model import Incident, Snapshot, Vm
from kvmtrace.views.format import UNKNOWN

# What has to be looked at first comes first.
SEVERITY = ("looping", "kernel", "delivered", "undeliv.", "latent", "unowned", "closed")

KERNEL_ITSELF = "the kernel itself"


@dataclass(frozen=True, slots=True)
class VmRow:
    """A VM as the tables show it. ``rate``: exits per second; None without two snapshots."""

    vm: Vm
    rate: float | None
    now: int
    steps: tuple[ClockStep, ...] = ()

    @property
    def id(self) -> int:
        return self.vm.key


@dataclass(frozen=True, slots=True)
class IncidentRow:
    """An incident as the tables show it. ``vms``: to name the owners."""

    incident: Incident
    vms: Mapping[int, Vm]
    now: int
    steps: tuple[ClockStep, ...] = ()

    @property
    def id(self) -> str:
        return self.incident.id

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
    """The VMs, those in most trouble first, those that are gone last."""
    rates = rates or {}
    rows = [VmRow(vm, rates.get(vm.key), now, snapshot.steps) for vm in snapshot.vms.values()]

    def trouble(row: VmRow) -> Any:
        vm = row.vm
        exits = vm.exits_by_errno()
        counts = (vm.poisoned_pages, exits.get("EHWPOISON", 0), sum(exits.values()))
        return vm.gone, tuple(-count for count in counts), vm.label.casefold(), vm.pid

    return sorted(rows, key=trouble)


def incident_rows(snapshot: Snapshot, now: int) -> list[IncidentRow]:
    """The incidents by state, newest first within one."""
    rows = [IncidentRow(one, snapshot.vms, now, snapshot.steps) for one in snapshot.incidents]

    def urgency(row: IncidentRow) -> Any:
        i = row.incident
        # When it began, not what came last: rows must not change places at every delivery.
        return severity(i), -(i.poisoned_ts or i.first_delivery_ts or 0)

    return sorted(rows, key=urgency)


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
    """What people call the VM with this key; "-" if it is forgotten."""
    return vms[key].label if key in vms else UNKNOWN


def owners_name(incident: Incident, vms: Mapping[int, Vm], key: int) -> str:
    """The same for an owner in an incident, which remembers VMs that are gone."""
    party = incident.vm_identities.get(key)
    return party.label if party and key not in vms else owner_name(vms, key)


def state_word(incident: Incident) -> str:
    """The state as people see it: that of a page which no VM has, but the kernel, is "kernel".

    That of a page which guest_memfd refused, and no VMM was notified of, is "undeliv.".
    """
    if incident.host_at_risk and incident.state == "unowned":
        return "kernel"
    if incident.undelivered and incident.state == "latent":
        return "undeliv."
    return incident.state


def severity(incident: Incident) -> int:
    """Rank of the state; one that is not known yet comes last."""
    state = state_word(incident)
    return SEVERITY.index(state) if state in SEVERITY else len(SEVERITY)
