"""Records of our probes → events: each record to its topic, and all events in order of time."""

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
from kvmtrace.sources.ftrace.totals import KernelTotals, unkeyed_key_of
from kvmtrace.sources.ftrace.vms import VmResolver
from kvmtrace.sources.tally import Tally


class FtraceTranslator:
    """Translates records in batches. Reads SMBIOS once; ``vms`` reads /proc; else pure.

    ``names``: of memory_failure_event's ``type`` and ``result``.
    """

    def __init__(
        self, vms: VmResolver, names: tuple[dict[int, str], dict[int, str]] = ({}, {})
    ) -> None:
        self.vms = vms
        self.exits = FtraceExits(vms)
        self.refusals = GmemRefusals(vms)
        self.poisons = Poisons(vms, names)
        self.signals = Signals(vms)
        self._firmware = smbios.read()

    def batch(
        self,
        batch: Iterable[Record],
        now: int,
        *,
        totals: KernelTotals | None = None,
        read_totals: Callable[[], KernelTotals] = KernelTotals,
        faults_dropped: bool = False,
        signals_dropped: bool = False,
        last: bool = False,
    ) -> list[Event]:
        """Events of all records (in order of time), up to ``now``.

        ``totals``: the kernel's counts, read before the records were. ``faults_dropped``: records
        of the faults' ring were dropped. A missing ``gmem`` record then means nothing, and the
        counts of a VM have to be read (``read_totals``) before it is destroyed.
        ``signals_dropped``: the same for the signals' ring. ``last``: nothing more will come.
        """
        out = self.vms.events = []
        self.exits.begin(faults_dropped)
        self.signals.counts_pending |= signals_dropped
        damaged = 0
        for record in batch:
            try:
                out += self._one(record, read_totals)
            except KeyError:  # this kernel's event lacks a field that is needed
                damaged += 1
        if damaged:
            out.append(Lost(now, "ftrace_damaged", damaged))
        if totals is not None:
            out += self._unreported(totals, now)
            # Records dropped after the counts were read are in the next counts.
            self.exits.counts_pending = faults_dropped
            self.signals.counts_pending = signals_dropped
        out += self.signals.overdue(math.inf if last else now)
        out += self.exits.end()
        out += self.refusals.take()
        out.sort(key=lambda event: event.ts)
        return out

    def begin(
        self, *, watches_gmem: bool, counts_exits: bool = True, counts_signals: bool = True
    ) -> None:
        """Start anew: the probes were attached again, and the kernel's counts begin at 0."""
        self.exits.watches_gmem = watches_gmem
        self.exits.muting.counted = counts_exits
        self.signals.muting.counted = counts_signals
        self.exits.muting.refused = self.signals.muting.refused = False
        self.exits.tally = Tally(unkeyed_key_of)
        self.refusals.tally, self.signals.tally = Tally(), Tally()

    @property
    def counts_pending(self) -> bool:
        """Whether the kernel's counts have, or will have, more than the events."""
        muted = bool(self.exits.muting) or bool(self.signals.muting)
        return muted or self.exits.counts_pending or self.signals.counts_pending

    def filter_exclusions(self) -> dict[str, str] | None:
        """{event: what to add to its filter}; None if that has not changed."""
        both = (self.exits.muting, self.signals.muting)
        if not any(muting.changed for muting in both):
            return None
        for muting in both:
            muting.changed = False
        return exclusions(*(muting.conditions() for muting in both))

    def exclusions_not_written(self) -> None:
        """Writing ``filter_exclusions`` failed: return them again the next time."""
        for muting in (self.exits.muting, self.signals.muting):
            muting.changed = True

    def exclusions_refused(self) -> None:
        """The kernel refused the filters: mute nothing until ``begin``."""
        for muting in (self.exits.muting, self.signals.muting):
            muting.refuse()

    def _unreported(self, totals: KernelTotals, now: int) -> list[Event]:
        events = self.exits.unreported(totals, now) + self.signals.unreported(totals, now)
        self.refusals.add_unreported(totals, now)
        self.exits.muting.update_totals(totals.exits)
        self.signals.muting.update_totals(totals.signals)
        for where, lost in (
            ("exit_counts", self.exits.tally.newly_lost(totals.exits_without_entry)),
            ("refused_counts", self.refusals.tally.newly_lost(totals.refusals_without_entry)),
            ("signal_counts", self.signals.tally.newly_lost(totals.signals_without_entry)),
        ):
            if lost:
                events.append(Lost(now, where, lost))
        if totals.full or totals.exits_without_entry:
            self.exits.tally.forget_unkeyed(totals.exits)
        if totals.refusals_without_entry:
            self.refusals.tally.forget_unkeyed(totals.refusals)
        if totals.signals_without_entry:
            self.signals.tally.forget_unkeyed(totals.signals)
        return events

    def _one(self, record: Record, read_totals: Callable[[], KernelTotals]) -> list[Event]:
        match record.probe:
            case "run":
                if record.fields["ret"] == -kvm.EINTR:
                    return self.signals.returned(record)
                return self.exits.run(record)
            case "run_under_way":
                return self.exits.run_under_way(record)
            case "arm_sea":
                return [self.exits.arm_sea(record)]
            case "vncr":
                return self.exits.vncr(record)
            case "gmem":
                self.exits.gmem(record)
                self.refusals.gmem(record)
                return self.poisons.gmem(record)
            case "faultin":
                return self._faultin(record)
            case "poison":
                return [self.poisons.poison(record)]
            case "gmem_error":
                self.poisons.gmem_error(record)
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
                if self.vms.is_alive(record.fields["kvm"]):
                    # Another VM had the address, and its end was missed.
                    self._vm_gone(record, read_totals)
                self.vms.vm_created(record)
                self.exits.note_private_memory(record)
            case "vm_gone":
                self._vm_gone(record, read_totals)
        return []

    def _faultin(self, record: Record) -> list[Event]:
        records.add_arm64_fields(record.fields)
        if record.fields["ret"] < 0:
            self.exits.faultin(record)
        elif record.fields.get("pfn") == KVM_PFN_ERR_HWPOISON:
            return self.signals.fault(record)
        return []

    def _vm_gone(self, record: Record, read_totals: Callable[[], KernelTotals]) -> None:
        struct = record.fields["kvm"]
        if self.exits.needs_totals(struct) or self.signals.needs_totals(struct):
            totals = read_totals()
            self.vms.events += self.exits.unreported_of_vm(struct, totals, record.ts)
            self.refusals.add_unreported(totals, record.ts, struct)
            vm = self.vms.known_key(struct)
            if vm is not None:
                self.vms.events += self.signals.unreported(totals, record.ts, vm)
        self.vms.events += self.refusals.take()
        self.vms.vm_destroyed(record)
        self.exits.forget(struct)
        self.signals.muting.forget_vm(struct)
        self.poisons.forget(struct)
