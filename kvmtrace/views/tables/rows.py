"""The rows of the VM and incident tables, the most urgent first."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from kvmtrace.events import ClockStep
from kvmtrace.model import Incident, Snapshot, Vm
from kvmtrace.views.format import UNKNOWN

# The states of incidents as tables show them, the most urgent first.
SEVERITY = ("looping", "kernel", "delivered", "undeliv.", "latent", "unowned", "closed")

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
    """The incidents by ``severity``, the newest first within a state."""
    rows = [IncidentRow(one, snapshot.vms, now, snapshot.steps) for one in snapshot.incidents]

    def urgency(row: IncidentRow) -> Any:
        i = row.incident
        # By its begin, not by the last delivery, so that rows do not move at every delivery.
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
    """The label of the VM with this key; "-" if it is forgotten."""
    return vms[key].label if key in vms else UNKNOWN


def owners_name(incident: Incident, vms: Mapping[int, Vm], key: int) -> str:
    """The label of an owner: incidents remember VMs that the model has forgotten."""
    party = incident.vm_identities.get(key)
    return party.label if party and key not in vms else owner_name(vms, key)


def state_word(incident: Incident) -> str:
    """The state as tables show it: the incident's, "kernel" or "undeliv.".

    "kernel": no VM owns the page, and the kernel uses it or may. "undeliv.": guest_memfd refused
    the page to a guest, and no VMM was notified.
    """
    if incident.host_at_risk and incident.state == "unowned":
        return "kernel"
    if incident.undelivered and incident.state == "latent":
        return "undeliv."
    return incident.state


def severity(incident: Incident) -> int:
    """The rank of the state in ``SEVERITY``; an unknown state comes last."""
    state = state_word(incident)
    return SEVERITY.index(state) if state in SEVERITY else len(SEVERITY)
