"""SIGBUS for poisoned memory: one by one as they come, and by the kernel's counts in a storm.

A signal that KVM sends is sent from within the fault handler to the thread itself: the fault that
returns next on this thread with the "poisoned" pfn is the one it was sent for. Where the handler
does not return that pfn (arm64), KVM_RUN's EINTR that follows at least names the vCPU.
"""

from __future__ import annotations

import signal
from collections import OrderedDict
from collections.abc import Collection
from dataclasses import replace

from kvmtrace import kvm
from kvmtrace.events import Event, Sigbus
from kvmtrace.sanitize import clean
from kvmtrace.sources.ftrace.fields import COMM, ProbeRequest, helper, needed, optional, values
from kvmtrace.sources.ftrace.muting import SignalMuting
from kvmtrace.sources.ftrace.records import Record
from kvmtrace.sources.ftrace.totals import KernelTotals, SignalDetails, SignalKey
from kvmtrace.sources.ftrace.vms import VmResolver
from kvmtrace.sources.limits import FTRACE_SIGNAL_WAIT_NS, HIST_ENTRIES, MAX_SIGNAL_KEYS
from kvmtrace.sources.tally import Tally

_CODES = f"code == {kvm.BUS_MCEERR_AR} || code == {kvm.BUS_MCEERR_AO}"


def _triggers(fields: Collection[str]) -> tuple[str, ...]:
    tid = "tid" if "tid" in fields else "common_pid"
    which = values(fields, "lsb", "tgid")
    return (f"hist:keys={tid},code,addr.hex:{which}:size={HIST_ENTRIES} if {_CODES}",)


_SENT = (
    needed("code", "code", "$arg1:s32"),
    needed("addr", "addr:x64", "$arg2:x64"),
    optional("lsb", "lsb", "$arg3:s16"),
)
_TO_CURRENT = (helper("tgid", "$current->tgid"), COMM)

PROBES = {
    "sigbus": ProbeRequest(
        "signals",
        (
            *_SENT,
            needed("tid", "t->pid", "+{task_struct.pid}($arg4):s32"),
            needed("tgid", "t->tgid", "+{task_struct.tgid}($arg4):s32"),
            helper("comm", "t->comm:string"),
        ),
        filters=(("code", _CODES),),
        triggers=_triggers,
    ),
    "sigbus_forced": ProbeRequest(
        "signals", (*_SENT, *_TO_CURRENT), filters=(("code", _CODES),), triggers=_triggers
    ),
    "sigbus_bare": ProbeRequest(
        "poison",
        (needed("sig", "sig", "$arg1:s32"), *_TO_CURRENT),
        filters=(("sig", f"sig == {int(signal.SIGBUS)}"),),
    ),
}


class Signals:
    """``sigbus`` and ``sigbus_forced`` records, and the kernel's counts → ``Sigbus``."""

    def __init__(self, people: VmResolver) -> None:
        self.behind = False
        """Events were dropped since the counts were settled: the counts may have more."""
        self.tally: Tally[SignalKey] = Tally()
        self.storms = SignalMuting()
        self._people = people
        self._waiting: OrderedDict[int, tuple[SignalKey, Sigbus]] = OrderedDict()  # by thread
        self._known: OrderedDict[SignalKey, Sigbus] = OrderedDict()

    def __bool__(self) -> bool:
        return bool(self._waiting)

    def sigbus(self, record: Record) -> list[Event]:
        """A signal is sent; reported now, or when the fault that it was sent from is known."""
        fields = record.fields
        sender = fields["common_pid"]
        tid = fields.get("tid", sender)
        key = SignalKey(record.probe, tid, fields["code"], fields["addr"])
        pid = self._people.process_of(tid, fields.get("tgid"))
        # Asked now: it may be gone when the waiting is over.
        vm = self._people.only_vm_of(pid)
        event = Sigbus(
            record.ts,
            pid,
            tid,
            key.code,
            key.addr,
            kvm.lsb_of(fields.get("lsb")),
            sender=sender,
            vm=vm,
            comm=_comm(record),
        )
        if key in self.storms:
            return []  # from before it was muted; counted all the same
        self.storms.event(key, None if vm is None else self._people.struct_of(vm))
        if not self.tally.event(key):
            return []
        earlier = self._waiting.pop(tid, None)
        told: list[Event] = [] if earlier is None else [earlier[1]]
        if record.probe != "sigbus" or tid != sender or event.code != kvm.BUS_MCEERR_AR:
            self._learn(key, event)
            return [*told, event]
        if key not in self._known:
            self._learn(key, event)
        self._waiting[tid] = (key, event)
        return told

    def bare(self, record: Record) -> Event:
        """A SIGBUS without an address or a reason."""
        tid = record.fields["common_pid"]
        pid = self._people.process_of(tid, record.fields.get("tgid"))
        vm = self._people.only_vm_of(pid)
        comm = _comm(record)
        return Sigbus(record.ts, pid, tid, kvm.SI_KERNEL, None, sender=tid, vm=vm, comm=comm)

    def fault(self, record: Record) -> list[Event]:
        """A fault on poisoned memory returned: its thread's signal was for this."""
        key, event = self._waiting.pop(record.fields["common_pid"], (None, None))
        if key is None or event is None:
            return []
        fields = record.fields
        vm = self._people.key(record, event.ts)
        event = replace(event, vm=vm, vcpu=fields["vid"], gfn=fields["gfn"])
        self._learn(key, event)
        self.storms.fault(key, fields["vcpu"], fields["gfn"])
        return [event]

    def returned(self, record: Record) -> list[Event]:
        """KVM_RUN ended with a SIGBUS pending: if no fault named one, it is for that vCPU."""
        key, event = self._waiting.pop(record.fields["common_pid"], (None, None))
        if key is None or event is None:
            return []
        vm = self._people.key(record, event.ts)
        event = replace(event, vm=vm, vcpu=record.fields["vid"])
        self._learn(key, event)
        self.storms.returned(key, record.fields["vcpu"])
        return [event]

    def overdue(self, now: float) -> list[Event]:
        """Signals whose fault did not come."""
        since = now - FTRACE_SIGNAL_WAIT_NS
        late = [tid for tid, (_, event) in self._waiting.items() if event.ts < since]
        return [self._waiting.pop(tid)[1] for tid in late]

    def settle(self, totals: KernelTotals, now: int, vm: int | None = None) -> list[Event]:
        """Signals that the kernel counted and no event reported; of one VM, or all."""
        of = {key: self._of(key, totals, now) for key in totals.signals}
        wanted = {
            key: count for key, count in totals.signals.items() if vm is None or of[key].vm == vm
        }
        return [replace(of[key], ts=now, count=count) for key, count in self.tally.total(wanted)]

    def unsettled(self, struct: int) -> bool:
        """Whether the counts may have more of a VM than the events."""
        return self.behind or self.storms.in_vm(struct)

    def _of(self, key: SignalKey, totals: KernelTotals, now: int) -> Sigbus:
        known = self._known.get(key)
        if known is not None:
            return known
        facts = totals.facts.get(key, SignalDetails())
        pid = self._people.process_of(key.tid, facts.tgid)
        vm = self._people.only_vm_of(pid)
        return Sigbus(now, pid, key.tid, key.code, key.addr, kvm.lsb_of(facts.lsb), vm=vm)

    def _learn(self, key: SignalKey, event: Sigbus) -> None:
        self._known[key] = event
        self._known.move_to_end(key)
        while len(self._known) > MAX_SIGNAL_KEYS:
            self._known.popitem(last=False)


def _comm(record: Record) -> str | None:
    return clean(record.fields.get("comm") or "") or None
