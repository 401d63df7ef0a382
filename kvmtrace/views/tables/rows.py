"""The rows of the VM and incident tables, the most urgent first."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from kvmtrace.events import ClockStep
from kvmtrace.judgement.action import Action
from kvmtrace.judgement.actions import actions
from kvmtrace.judgement.urgency import Urgency, by_urgency, urgency_of
from kvmtrace.model import Incident, Snapshot, Vm
from kvmtrace.views.format import UNKNOWN

KERNEL_ITSELF = "the kernel itself"


@dataclass(frozen=True, slots=True)
class VmRow:
    """A row of the VM table.

    ``rate``: exits per second; None without two snapshots. ``bars``: the same over the last
    samples, a bar each; "" if there were none.
    """

    vm: Vm
    rate: float | None
    now: int
    steps: tuple[ClockStep, ...] = ()
    bars: str = ""

    @property
    def id(self) -> int:
        return self.vm.key


@dataclass(frozen=True, slots=True)
class IncidentRow:
    """A row of the incident table; ``rate``, ``bars``: as those of a ``VmRow``, of notifications.

    ``snapshot``: of the host, which names the owners.
    """

    incident: Incident
    snapshot: Snapshot
    now: int
    rate: float | None = None
    bars: str = ""

    @property
    def vms(self) -> Mapping[int, Vm]:
        return self.snapshot.vms

    @property
    def steps(self) -> tuple[ClockStep, ...]:
        return self.snapshot.steps

    @property
    def action(self) -> Action:
        """The most urgent one. Not computed for rows that nobody looks at."""
        return actions(self.incident, self.snapshot)[0]

    @property
    def id(self) -> str:
        return self.incident.id

    @property
    def urgency(self) -> Urgency:
        return urgency_of(self.incident)

    @property
    def since(self) -> int | None:
        """When it began, as far as that was seen."""
        return self.incident.poisoned_ts or self.incident.first_delivery_ts

    @property
    def latency(self) -> int | None:
        """Nanoseconds from poison to first delivery."""
        if self.incident.poisoned_ts is None or self.incident.first_delivery_ts is None:
            return None
        return self.incident.first_delivery_ts - self.incident.poisoned_ts


def vm_rows(
    snapshot: Snapshot,
    now: int,
    rates: Mapping[int, float] | None = None,
    bars: Mapping[int, str] | None = None,
) -> list[VmRow]:
    """The VMs with most poisoned pages, EHWPOISON exits and exits first, those gone last."""
    rates, bars = rates or {}, bars or {}
    rows = [
        VmRow(vm, rates.get(vm.key), now, snapshot.steps, bars.get(vm.key, ""))
        for vm in snapshot.vms.values()
    ]

    def trouble(row: VmRow) -> Any:
        vm = row.vm
        exits = vm.exits_by_errno()
        counts = (vm.poisoned_pages, exits.get("EHWPOISON", 0), sum(exits.values()))
        return vm.gone, tuple(-count for count in counts), vm.label.casefold(), vm.pid

    return sorted(rows, key=trouble)


def incident_rows(
    snapshot: Snapshot,
    now: int,
    rates: Mapping[str, float] | None = None,
    bars: Mapping[str, str] | None = None,
) -> list[IncidentRow]:
    """The incidents by urgency, the newest first within one. ``rates``, ``bars``: by id."""
    rates, bars = rates or {}, bars or {}
    return [
        IncidentRow(one, snapshot, now, rates.get(one.id), bars.get(one.id, ""))
        for one in by_urgency(snapshot.incidents)
    ]


def owners_name(incident: Incident, vms: Mapping[int, Vm], key: int) -> str:
    """The label of an owner, also of a VM that only the incident remembers; "-" if forgotten."""
    vm = vms.get(key) or incident.vm_identities.get(key)
    return vm.label if vm is not None else UNKNOWN
