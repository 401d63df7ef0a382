"""Which VM is exported under which ``vm`` label, so that a series always means one VM.

A label is chosen when a VM is first exported and kept for as long as the model remembers the VM:

- its name, where no other VM has that name and no series already goes by it;
- else ``NAME-PID``, and ``vm-PID`` where it has no name (one process with several VMs: ``-2`` …).

A VM that dies and is started again under its name is therefore ``NAME-PID`` if anything was counted
for the dead one, also when the model has forgotten that one: two VMs never share a series, and no
counter goes down. Labels of forgotten VMs are remembered for this, the last ``MAX_RETIRED``.
A VM whose name becomes known later changes its label only if nothing was counted for it.

At most ``max_vms`` VMs have series of their own; the others are added up in ``vm="other"``.
"""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass

from kvmtrace.model import Vm

OTHER = "other"

_ARM64 = (("ARM_SEA", "hwpoison"), ("MEMORY_FAULT", "hwpoison"))

# Exported as 0 for every VM: a counter born at 1 has no increase. (errno, cause)
ZERO_EXITS = (
    ("EHWPOISON", "hwpoison"),
    ("EFAULT", "conversion"),
    ("EFAULT", "userfault"),
    ("EFAULT", "backing"),
    ("EFAULT", "unannotated"),
    ("EFAULT", "unknown"),
    *(_ARM64 if os.uname().machine == "aarch64" else ()),
)
ZERO_SIGBUS = ("AR", "AO", "KERNEL")

# Some megabytes. A label may be given again after so many others that something was counted for.
MAX_RETIRED = 1 << 16

# Longer than any name that libvirt or an orchestrator gives, shorter than a scrape can be hurt by.
MAX_LABEL = 128


def clean(value: str | None) -> str:
    """A label value that can be neither long nor break the scrape; None becomes empty (absent).

    Names are cleaned where they enter; a lone surrogate that slipped through would still make
    the whole exposition impossible to encode.
    """
    return "".join(char for char in value or "" if char.isprintable())[:MAX_LABEL]


def label_value(name: str) -> str:
    """An errno's or signal code's name; a number without a name is no label: ``"other"``."""
    return "other" if name.lstrip("-").isdigit() else clean(name)


@dataclass(frozen=True, slots=True)
class VmSeries:
    """What is exported under one label. ``vm`` is None for the sum of the folded VMs.

    ``exits``: {(errno, cause): exits}, ``sigbus``: {code: signals}; both with their zeros.
    """

    label: str
    vm: Vm | None
    exits: Mapping[tuple[str, str], int]
    sigbus: Mapping[str, int]
    poisoned_pages: int
    undelivered: int = 0


@dataclass(frozen=True, slots=True)
class _AssignedLabel:
    label: str
    named: bool


class VmLabels:
    """Gives labels and remembers them; feed it every snapshot's VMs, one thread at a time."""

    def __init__(self, max_vms: int) -> None:
        self._max_vms = max_vms
        self._assigned: dict[int, _AssignedLabel] = {}
        self._counted: set[int] = set()  # those of the given that a counter above 0 was exported of
        self._retired: dict[str, None] = {}
        self._folded: dict[int, Vm] = {}
        # What VMs counted that were folded and are forgotten: "other" must not go down either.
        self._folded_exits: Counter[tuple[str, str]] = Counter()
        self._folded_sigbus: Counter[str] = Counter()
        self._folded_undelivered = 0
        self._ever_folded = False

    def series(self, vms: Mapping[int, Vm]) -> tuple[list[VmSeries], int]:
        """Series in the order of VM keys, "other" last; and how many VMs are folded into it."""
        self._forget(vms)
        self._assign(vms)
        self._folded = {key: vm for key, vm in vms.items() if key not in self._assigned}
        self._ever_folded |= bool(self._folded)
        self._counted |= {key for key in self._assigned if _counted(vms[key])}
        series = [
            VmSeries(
                self._assigned[key].label,
                vm,
                _exits(vm),
                _sigbus(vm),
                vm.poisoned_pages,
                vm.undelivered,
            )
            for key, vm in sorted(vms.items())
            if key in self._assigned
        ]
        if self._ever_folded:
            series.append(self._other())
        return series, len(self._folded)

    def _forget(self, vms: Mapping[int, Vm]) -> None:
        for key in sorted(self._assigned.keys() - vms.keys()):
            label = self._assigned.pop(key).label
            if key in self._counted:
                self._counted.discard(key)
                self._retired[label] = None
        while len(self._retired) > MAX_RETIRED:
            del self._retired[next(iter(self._retired))]
        for key in self._folded.keys() - vms.keys():
            self._folded_exits.update(_exits(self._folded[key]))
            self._folded_sigbus.update(_sigbus(self._folded[key]))
            self._folded_undelivered += self._folded[key].undelivered

    def _assign(self, vms: Mapping[int, Vm]) -> None:
        names = Counter(clean(vm.name) for vm in vms.values())
        # The living first: the dead can only take a place that is left.
        for key, vm in sorted(vms.items(), key=lambda item: (item[1].gone, item[0])):
            assigned = self._assigned.get(key)
            if assigned is not None:
                if assigned.named or not vm.name or _counted(vm):
                    continue
                del self._assigned[key]
            elif len(self._assigned) >= self._max_vms or (key in self._folded and _counted(vm)):
                # Once counts of it are in "other" it stays there: they cannot be taken out again.
                continue
            self._assigned[key] = _AssignedLabel(self._free_label(vm, names), bool(vm.name))

    def _free_label(self, vm: Vm, names: Counter[str]) -> str:
        taken = {assigned.label for assigned in self._assigned.values()} | {OTHER}
        name = clean(vm.name)
        if name and names[name] == 1 and name not in taken and name not in self._retired:
            return name
        stem = label = f"{name or 'vm'}-{clean(vm.vmid) or vm.pid}"
        number = 1
        while label in taken or label in self._retired:
            number += 1
            label = f"{stem}-{number}"
        return label

    def _other(self) -> VmSeries:
        exits = Counter(dict.fromkeys(ZERO_EXITS, 0))
        sigbus = Counter(dict.fromkeys(ZERO_SIGBUS, 0))
        exits.update(self._folded_exits)
        sigbus.update(self._folded_sigbus)
        for vm in self._folded.values():
            exits.update(_exits(vm))
            sigbus.update(_sigbus(vm))
        pages = sum(vm.poisoned_pages for vm in self._folded.values())
        undelivered = self._folded_undelivered + sum(vm.undelivered for vm in self._folded.values())
        return VmSeries(OTHER, None, exits, sigbus, pages, undelivered)


def _counted(vm: Vm) -> bool:
    return bool(any(vm.exits.values()) or any(vm.sigbus.values()) or vm.undelivered)


def _exits(vm: Vm) -> Counter[tuple[str, str]]:
    exits = Counter(dict.fromkeys(ZERO_EXITS, 0))
    for (errno, cause), count in vm.exits.items():
        exits[label_value(errno), clean(cause) or "unknown"] += count
    return exits


def _sigbus(vm: Vm) -> Counter[str]:
    sigbus = Counter(dict.fromkeys(ZERO_SIGBUS, 0))
    for code, count in vm.sigbus.items():
        sigbus[label_value(code)] += count
    return sigbus
