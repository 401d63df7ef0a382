"""The ``vm`` label of each VM, so that a series always means one VM.

A label is chosen when a VM is first exported, and kept as long as the model remembers the VM:

- its name, if no other VM has that name and no series has that label yet;
- else ``NAME-PID``, or ``vm-PID`` without a name (several VMs of one process: ``-2`` …).

If a VM is started again under its name, it is ``NAME-PID`` if anything was counted for the first
one, even if the model has forgotten that one. So two VMs never share a series, and no counter goes
down. For this the last ``MAX_RETIRED`` labels of forgotten VMs are remembered. A VM whose name
becomes known later changes its label only if nothing was counted for it.

At most ``max_vms`` VMs have series of their own; the others are summed in ``vm="other"``.
"""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass
from types import MappingProxyType

from kvmtrace.bounded import BoundedDict
from kvmtrace.model import Vm

OTHER = "other"

_ARM64 = (("ARM_SEA", "hwpoison"), ("MEMORY_FAULT", "hwpoison"))

# (errno, cause) exported as 0 for every VM: increase() does not see a counter that starts at 1.
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

# Some megabytes. A label may be reused after so many others with counts were retired.
MAX_RETIRED = 1 << 16

# Longer than names of libvirt or orchestrators, and short enough for a scrape.
MAX_LABEL = 128


def clean(value: str | None) -> str:
    """A label value that is short and can be encoded; None becomes empty (absent).

    Names are cleaned where they enter, but a single lone surrogate would break the whole scrape.
    """
    value = value or ""
    if not value.isprintable():
        value = "".join(char for char in value if char.isprintable())
    return value[:MAX_LABEL]


def label_value(name: str) -> str:
    """The label of an errno or signal code: its name, or "other" for a number without a name."""
    return "other" if name.lstrip("-").isdigit() else clean(name)


@dataclass(frozen=True, slots=True)
class VmSeries:
    """The series of one label. ``vm`` is None for the sum of the folded VMs.

    ``exits``: {(errno, cause): exits}, ``sigbus``: {code: signals}; both include the zeros.
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
    """Assigns labels and remembers them. Call ``series`` for every snapshot, in one thread."""

    def __init__(self, max_vms: int) -> None:
        self._max_vms = max_vms
        self._assigned: dict[int, _AssignedLabel] = {}
        self._taken = {OTHER}  # by these
        self._counted: set[int] = set()  # assigned ones with an exported counter above 0
        self._series: dict[int, VmSeries] = {}  # of the last snapshot
        self._retired: BoundedDict[str, None] = BoundedDict(MAX_RETIRED)
        self._folded: dict[int, Vm] = {}
        # Counts of folded VMs that were forgotten: "other" must not go down either.
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
        before, self._series = self._series, {}
        for key in sorted(self._assigned):
            vm, label = vms[key], self._assigned[key].label
            one = before.get(key)
            if one is None or one.vm is not vm or one.label != label:
                one = VmSeries(
                    label, vm, _exits(vm), _sigbus(vm), vm.poisoned_pages, vm.undelivered
                )
                if _counted(vm):
                    self._counted.add(key)
            self._series[key] = one
        series = list(self._series.values())
        if self._ever_folded:
            series.append(self._other())
        return series, len(self._folded)

    def _forget(self, vms: Mapping[int, Vm]) -> None:
        for key in sorted(self._assigned.keys() - vms.keys()):
            label = self._assigned.pop(key).label
            self._taken.discard(label)
            if key in self._counted:
                self._counted.discard(key)
                self._retired[label] = None
        for key in self._folded.keys() - vms.keys():
            self._folded_exits.update(_exits(self._folded[key]))
            self._folded_sigbus.update(_sigbus(self._folded[key]))
            self._folded_undelivered += self._folded[key].undelivered

    def _assign(self, vms: Mapping[int, Vm]) -> None:
        has_room = len(self._assigned) < self._max_vms
        waiting = [
            (vm.gone, key)
            for key, vm in vms.items()
            if (key not in self._assigned and has_room)
            or (key in self._assigned and not self._assigned[key].named and vm.name)
        ]
        if not waiting:
            return
        names = Counter(clean(vm.name) for vm in vms.values())
        # Live VMs first: those that are gone get the places that are left.
        for _, key in sorted(waiting):
            vm, assigned = vms[key], self._assigned.get(key)
            if assigned is not None:
                if _counted(vm):
                    continue
                del self._assigned[key]
                self._taken.discard(assigned.label)
            elif len(self._assigned) >= self._max_vms or (key in self._folded and _counted(vm)):
                # Its counts are in "other" already and cannot be taken out again.
                continue
            label = self._free_label(vm, names)
            self._assigned[key] = _AssignedLabel(label, bool(vm.name))
            self._taken.add(label)

    def _free_label(self, vm: Vm, names: Counter[str]) -> str:
        taken, name = self._taken, clean(vm.name)
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
            if vm.exits:
                exits.update(_exits(vm))
            if vm.sigbus:
                sigbus.update(_sigbus(vm))
        pages = sum(vm.poisoned_pages for vm in self._folded.values())
        undelivered = self._folded_undelivered + sum(vm.undelivered for vm in self._folded.values())
        return VmSeries(OTHER, None, exits, sigbus, pages, undelivered)


def _counted(vm: Vm) -> bool:
    return bool(any(vm.exits.values()) or any(vm.sigbus.values()) or vm.undelivered)


# Of most VMs nothing is ever counted: they share these.
_NO_EXITS: Mapping[tuple[str, str], int] = MappingProxyType(dict.fromkeys(ZERO_EXITS, 0))
_NO_SIGBUS: Mapping[str, int] = MappingProxyType(dict.fromkeys(ZERO_SIGBUS, 0))


def _exits(vm: Vm) -> Mapping[tuple[str, str], int]:
    if not vm.exits:
        return _NO_EXITS
    exits = Counter(dict.fromkeys(ZERO_EXITS, 0))
    for (errno, cause), count in vm.exits.items():
        exits[label_value(errno), clean(cause) or "unknown"] += count
    return exits


def _sigbus(vm: Vm) -> Mapping[str, int]:
    if not vm.sigbus:
        return _NO_SIGBUS
    sigbus = Counter(dict.fromkeys(ZERO_SIGBUS, 0))
    for code, count in vm.sigbus.items():
        sigbus[label_value(code)] += count
    return sigbus
