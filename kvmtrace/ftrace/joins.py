"""Records of our probes → events: each kind to its own, and all in order of time."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable

from kvmtrace.events import Event
from kvmtrace.ftrace import records
from kvmtrace.ftrace.faults import Faults
from kvmtrace.ftrace.fields import KVM_PFN_ERR_HWPOISON
from kvmtrace.ftrace.hist import Totals
from kvmtrace.ftrace.people import People
from kvmtrace.ftrace.poison import Poisons, Signals
from kvmtrace.ftrace.records import Record


class Joiner:
    """Feed it batches of records; see ``batch``. Pure but for what ``people`` looks up."""

    def __init__(
        self, people: People, names: tuple[dict[int, str], dict[int, str]] = ({}, {})
    ) -> None:
        self.people = people
        self.faults = Faults(people)
        self.poisons = Poisons(people, names)
        self.signals = Signals(people)

    def batch(
        self,
        batch: Iterable[Record],
        now: int,
        *,
        totals: Totals | None = None,
        read_totals: Callable[[], Totals] = Totals,
        doubtful: bool = False,
        last: bool = False,
    ) -> list[Event]:
        """Events of all records (in order of time), up to ``now``.

        ``totals``: the kernel's counts, read before the records were. ``doubtful``: some events of
        the faults' ring were dropped, so that kvm_gmem_get_pfn said nothing proves nothing, and
        that the counts of a VM have to be read (``read_totals``) before it is gone. ``last``:
        nothing more will come.
        """
        out = self.people.out = []
        self.faults.begin(doubtful)
        for record in batch:
            out += self._one(record, read_totals)
        if totals is not None:
            out += self.faults.settle(totals, now)
            self.faults.storms.reading(totals.exits)
        out += self.signals.overdue(math.inf if last else now)
        out += self.faults.end()
        out.sort(key=lambda event: event.ts)
        return out

    def _one(self, record: Record, read_totals: Callable[[], Totals]) -> list[Event]:
        match record.probe:
            case "run":
                return self.faults.run(record)
            case "gmem":
                self.faults.gmem(record)
                return self.poisons.gmem(record)
            case "faultin":
                return self._faultin(record)
            case "poison":
                return [self.poisons.poison(record)]
            case "gmem_error":
                return [self.poisons.gmem_error(record)]
            case "sigbus" | "sigbus_forced":
                return self.signals.sigbus(record)
            case "mce":
                return [self.poisons.mce(record)]
            case "slot":
                self.poisons.slot(record)
            case "vm_new":
                self.people.key(record)
            case "vm_gone":
                self._vm_gone(record, read_totals)
        return []

    def _faultin(self, record: Record) -> list[Event]:
        records.from_arm64(record.fields)
        if record.fields["ret"] < 0:
            self.faults.faultin(record)
        elif record.fields.get("pfn") == KVM_PFN_ERR_HWPOISON:
            return self.signals.fault(record)
        return []

    def _vm_gone(self, record: Record, read_totals: Callable[[], Totals]) -> None:
        struct = record.fields["kvm"]
        vcpus = self.faults.unsettled(struct)
        if vcpus:
            self.people.out += self.faults.settle(read_totals().of(vcpus), record.ts)
        self.people.gone(record)
        self.faults.forget(struct)
        self.poisons.forget(struct)
