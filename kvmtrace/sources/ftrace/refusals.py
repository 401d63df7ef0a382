"""guest_memfd's failures (``gmem``), and its refusals of poisoned pages (EHWPOISON)."""

from __future__ import annotations

from collections.abc import Collection

from kvmtrace import kvm
from kvmtrace.events import Event, GmemRefusal
from kvmtrace.sources.ftrace.fields import (
    RET,
    TGID,
    ProbeRequest,
    helper,
    needed,
    slot_fields,
    values,
)
from kvmtrace.sources.ftrace.records import Record
from kvmtrace.sources.ftrace.totals import KernelTotals, RefusalKey
from kvmtrace.sources.ftrace.vms import VmResolver
from kvmtrace.sources.limits import HIST_ENTRIES
from kvmtrace.sources.tally import Tally


def _triggers(fields: Collection[str]) -> tuple[str, ...]:
    size = f"size={HIST_ENTRIES}"
    return (
        f"hist:keys=kvm.hex,gfn.hex:{values(fields, 'tgid')}:{size} if ret == -133",
        f"hist:keys=kvm.hex,ret:vals=hitcount:{size} if ret == -14",
    )


PROBES = {
    "gmem": ProbeRequest(
        "faults",
        (
            needed("kvm", "kvm:x64"),
            needed("gfn", "gfn:x64"),
            helper("tgid", TGID),
            *slot_fields("slot"),
            RET,
        ),
        filters=(("ret", "ret < 0"),),
        triggers=_triggers,
    ),
}


class GmemRefusals:
    """Records and the kernel's counts → ``GmemRefusal``, each refusal once."""

    def __init__(self, vms: VmResolver) -> None:
        self.tally: Tally[RefusalKey] = Tally()
        self._vms = vms
        self._batch: dict[tuple[int, int], tuple[int, int]] = {}  # (VM, gfn) → (how many, when)

    def gmem(self, record: Record) -> None:
        """kvm_gmem_get_pfn failed; if for poison, this is a refusal."""
        fields = record.fields
        key = RefusalKey(fields["kvm"], fields["gfn"])
        if fields["ret"] == -kvm.EHWPOISON and self.tally.event(key):
            self._add(self._vms.key(record), key.gfn, 1, record.ts)

    def add_unreported(self, totals: KernelTotals, now: int, struct: int | None = None) -> None:
        """Add refusals that the kernel counted and no event has reported; of one VM, or all."""
        wanted = {k: n for k, n in totals.refusals.items() if struct in (None, k.kvm)}
        for key, count in self.tally.total(wanted):
            vm = self._vms.key_of(key.kvm, totals.refusal_pids.get(key.kvm), now)
            self._add(vm, key.gfn, count, now)

    def take(self) -> list[Event]:
        """Take what was added: one event for each page."""
        batch, self._batch = self._batch, {}
        return [GmemRefusal(ts, vm, gfn, count) for (vm, gfn), (count, ts) in batch.items()]

    def _add(self, vm: int, gfn: int, count: int, ts: int) -> None:
        before, _ = self._batch.get((vm, gfn), (0, ts))
        self._batch[vm, gfn] = (before + count, ts)
