"""Records of our probes → events: each kind to its own, and all in order of time."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable

from kvmtrace import kvm
from kvmtrace.events import Event, Lost
from kvmtrace.linux import smbios
from kvmtrace.sources.ftrace import hardware, records
from kvmtrace.sources.ftrace.exits import KVM_PFN_ERR_HWPOISON, FtraceExits
from kvmtrace.sources.ftrace.muting import exclusions
from kvmtrace.sources.ftrace.poison import Poisons
from kvmtrace.sources.ftrace.records import Record
from kvmtrace.sources.ftrace.refusals import GmemRefusals
from kvmtrace.sources.ftrace.signals import Signals
from kvmtrace.sources.ftrace.totals import KernelTotals, rest_of
from kvmtrace.sources.ftrace.vms import VmResolver
from kvmtrace.sources.tally import Tally


class FtraceTranslator:
    """Feed it batches of records; see ``batch``. Pure but for what ``people`` looks up."""

    def __init__(
        self, people: VmResolver, names: tuple[dict[int, str], dict[int, str]] = ({}, {})
    ) -> None:
        self.people = people
        self.faults = FtraceExits(people)
        self.refusals = GmemRefusals(people)
        self.poisons = Poisons(people, names)
        self.signals = Signals(people)
        self._firmware = smbios.read()

    def batch(
        self,
        batch: Iterable[Record],
        now: int,
        *,
        totals: KernelTotals | None = None,
        read_totals: Callable[[], KernelTotals] = KernelTotals,
        doubtful: bool = False,
        deaf: bool = False,
        last: bool = False,
    ) -> list[Event]:
        """Events of all records (in order of time), up to ``now``.

        ``totals``: the kernel's counts, read before the records were. ``doubtful``: some events of
        the faults' ring were dropped, so that kvm_gmem_get_pfn said nothing proves nothing, and
        that the counts of a VM have to be read (``read_totals``) before it is gone. ``deaf``:
        likewise for the signals' ring. ``last``: nothing more will come.
        """
        out = self.people.out = []
        self.faults.begin(doubtful)
        self.signals.behind |= deaf
        damaged = 0
        for record in batch:
            try:
                out += self._one(record, read_totals)
            except KeyError:  # this kernel's event lacks a field that is needed
                damaged += 1
        if damaged:
            out.append(Lost(now, "ftrace_damaged", damaged))
        if totals is not None:
            out += self._settle(totals, now)
            # What was dropped after the counts were read is in the next ones.
            self.faults.behind = doubtful
            self.signals.behind = deaf
        out += self.signals.overdue(math.inf if last else now)
        out += self.faults.end()
        out += self.refusals.take()
        out.sort(key=lambda event: event.ts)
        return out

    def begin(
        self, *, watches_gmem: bool, counts_exits: bool = True, counts_signals: bool = True
    ) -> None:
        """The probes are new: so are the kernel's counts, where it counts."""
        self.faults.watches_gmem = watches_gmem
        self.faults.storms.counted = counts_exits
        self.signals.storms.counted = counts_signals
        self.faults.storms.refused = self.signals.storms.refused = False
        self.faults.tally = Tally(rest_of)
        self.refusals.tally, self.signals.tally = Tally(), Tally()

    @property
    def behind(self) -> bool:
        """The counts have, or will have, more than the events."""
        muted = bool(self.faults.storms) or bool(self.signals.storms)
        return muted or self.faults.behind or self.signals.behind

    def muted(self) -> dict[str, str] | None:
        """{event: what to add to its filter}; None if that has not changed."""
        storms = (self.faults.storms, self.signals.storms)
        if not any(storm.changed for storm in storms):
            return None
        for storm in storms:
            storm.changed = False
        return exclusions(*(storm.conditions() for storm in storms))

    def mute_again(self) -> None:
        """What ``muted`` gave could not be written: it gives it once more."""
        for storm in (self.faults.storms, self.signals.storms):
            storm.changed = True

    def mute_nothing(self) -> None:
        """The kernel did not take what ``muted`` gave."""
        for storm in (self.faults.storms, self.signals.storms):
            storm.refuse()

    def _settle(self, totals: KernelTotals, now: int) -> list[Event]:
        events = self.faults.settle(totals, now) + self.signals.settle(totals, now)
        self.refusals.settle(totals, now)
        self.faults.storms.reading(totals.exits)
        self.signals.storms.reading(totals.signals)
        for where, lost in (
            ("exit_counts", self.faults.tally.lost(totals.dropped)),
            ("refused_counts", self.refusals.tally.lost(totals.refused_dropped)),
            ("signal_counts", self.signals.tally.lost(totals.signals_dropped)),
        ):
            if lost:
                events.append(Lost(now, where, lost))
        if totals.full or totals.dropped:
            self.faults.tally.fold(totals.exits)
        if totals.refused_dropped:
            self.refusals.tally.fold(totals.refused)
        if totals.signals_dropped:
            self.signals.tally.fold(totals.signals)
        return events

    def _one(self, record: Record, read_totals: Callable[[], KernelTotals]) -> list[Event]:
        match record.probe:
            case "run":
                if record.fields["ret"] == -kvm.EINTR:
                    return self.signals.returned(record)
                return self.faults.run(record)
            case "run_under_way":
                return self.faults.run_under_way(record)
            case "arm_sea":
                return [self.faults.arm_sea(record)]
            case "vncr":
                return self.faults.vncr(record)
            case "gmem":
                self.faults.gmem(record)
                self.refusals.gmem(record)
                return self.poisons.gmem(record)
            case "faultin":
                return self._faultin(record)
            case "poison":
                return [self.poisons.poison(record)]
            case "gmem_error":
                return [self.poisons.gmem_error(record)]
            case "sigbus" | "sigbus_forced":
                return self.signals.sigbus(record)
            case "sigbus_bare":
                return [self.signals.bare(record)]
            case "mce":
                return [hardware.machine_check(record)]
            case "soft_offline" | "unpoison":
                return self.poisons.page(record)
            case probe if probe in hardware.PROBES:
                return [hardware.error(record, self._firmware)]
            case "slot":
                self.poisons.slot(record)
            case "vm_new":
                if self.people.lives(record.fields["kvm"]):
                    self._vm_gone(record, read_totals)  # it does not any more: its end was missed
                self.people.began(record)
                self.faults.vm(record)
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

    def _vm_gone(self, record: Record, read_totals: Callable[[], KernelTotals]) -> None:
        struct = record.fields["kvm"]
        if self.faults.unsettled(struct) or self.signals.unsettled(struct):
            totals = read_totals()
            self.people.out += self.faults.settle_vm(struct, totals, record.ts)
            self.refusals.settle(totals, record.ts, struct)
            vm = self.people.known(struct)
            if vm is not None:
                self.people.out += self.signals.settle(totals, record.ts, vm)
        self.people.out += self.refusals.take()
        self.people.gone(record)
        self.faults.forget(struct)
        self.signals.storms.gone(struct)
        self.poisons.forget(struct)
