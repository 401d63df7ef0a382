"""SIGBUS for poisoned memory: ``sigbus``, ``sigbus_forced``, ``sigbus_bare``.

Signals are reported one by one, and by the kernel's counts where there are too many. KVM sends its
signal from within the fault handler, to the thread itself. The next fault that returns on this
thread with the "poisoned" pfn is the one that the signal was sent for. Where the handler does not
return that pfn (arm64), the vCPU is known by KVM_RUN's EINTR that follows.
"""

from __future__ import annotations

import signal
from collections.abc import Callable, Collection
from dataclasses import replace

from kvmtrace import kvm
from kvmtrace.bounded import BoundedDict
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
    """Records and the kernel's counts → ``Sigbus``, each signal once."""

    def __init__(self, vms: VmResolver) -> None:
        self.counts_pending = False
        """Records were dropped since the counts were read: the counts may have more signals."""
        self.tally: Tally[SignalKey] = Tally()
        self.muting = SignalMuting()
        self._vms = vms
        self._waiting: dict[int, tuple[SignalKey, Sigbus]] = {}  # by thread
        self._last_events: BoundedDict[SignalKey, Sigbus] = BoundedDict(MAX_SIGNAL_KEYS)

    @property
    def any_waiting(self) -> bool:
        """Whether a signal waits for the fault that it was sent from."""
        return bool(self._waiting)

    def sigbus(self, record: Record) -> list[Event]:
        """A signal was sent. Report it now, or when the fault that it was sent from is known."""
        fields = record.fields
        sender = fields["common_pid"]
        tid = fields.get("tid", sender)
        key = SignalKey(record.probe, tid, fields["code"], fields["addr"])
        pid = self._vms.pid_of(tid, fields.get("tgid"))
        # Looked up now: the VM may be gone when the wait is over.
        vm = self._vms.only_vm_of(pid)
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
        if key in self.muting:
            return []  # sent before it was muted; the counts have it
        self.muting.event(key, None if vm is None else self._vms.struct_of(vm))
        if not self.tally.event(key):
            return []
        earlier = self._waiting.pop(tid, None)
        events: list[Event] = [] if earlier is None else [earlier[1]]
        if record.probe != "sigbus" or tid != sender or event.code != kvm.BUS_MCEERR_AR:
            self._last_events.renew(key, event)
            return [*events, event]
        if key not in self._last_events:
            self._last_events.renew(key, event)
        self._waiting[tid] = (key, event)
        return events

    def bare(self, record: Record) -> Event:
        """A SIGBUS without an address or a reason."""
        tid = record.fields["common_pid"]
        pid = self._vms.pid_of(tid, record.fields.get("tgid"))
        vm = self._vms.only_vm_of(pid)
        comm = _comm(record)
        return Sigbus(record.ts, pid, tid, kvm.SI_KERNEL, None, sender=tid, vm=vm, comm=comm)

    def fault(self, record: Record) -> list[Event]:
        """A fault on poisoned memory returned: the thread's waiting signal was sent from it."""
        vcpu, gfn = record.fields["vcpu"], record.fields["gfn"]
        return self._take_waiting(record, gfn, lambda key: self.muting.fault(key, vcpu, gfn))

    def returned(self, record: Record) -> list[Event]:
        """KVM_RUN ended with a SIGBUS pending: a signal that still waits was for this vCPU."""
        vcpu = record.fields["vcpu"]
        return self._take_waiting(record, None, lambda key: self.muting.returned(key, vcpu))

    def _take_waiting(
        self, record: Record, gfn: int | None, mute: Callable[[SignalKey], None]
    ) -> list[Event]:
        """The signal that waits for this thread, which was for the vCPU of the record."""
        key, event = self._waiting.pop(record.fields["common_pid"], (None, None))
        if key is None or event is None:
            return []
        vm = self._vms.key(record, event.ts)
        event = replace(event, vm=vm, vcpu=record.fields["vid"], gfn=gfn)
        self._last_events.renew(key, event)
        mute(key)
        return [event]

    def overdue(self, now: float) -> list[Event]:
        """Signals that waited too long for their fault."""
        since = now - FTRACE_SIGNAL_WAIT_NS
        late = [tid for tid, (_, event) in self._waiting.items() if event.ts < since]
        return [self._waiting.pop(tid)[1] for tid in late]

    def unreported(self, totals: KernelTotals, now: int, vm: int | None = None) -> list[Event]:
        """Signals that the kernel counted and no event has reported; of one VM, or all."""
        events = {key: self._event_of(key, totals, now) for key in totals.signals}
        wanted = {
            key: count
            for key, count in totals.signals.items()
            if vm is None or events[key].vm == vm
        }
        return [
            replace(events[key], ts=now, count=count) for key, count in self.tally.total(wanted)
        ]

    def needs_totals(self, struct: int) -> bool:
        """Whether the counts may have signals of this VM that no event has reported."""
        return self.counts_pending or self.muting.any_muted_in(struct)

    def _event_of(self, key: SignalKey, totals: KernelTotals, now: int) -> Sigbus:
        known = self._last_events.get(key)
        if known is not None:
            return known
        details = totals.signal_details.get(key, SignalDetails())
        pid = self._vms.pid_of(key.tid, details.tgid)
        vm = self._vms.only_vm_of(pid)
        return Sigbus(now, pid, key.tid, key.code, key.addr, kvm.lsb_of(details.lsb), vm=vm)


def _comm(record: Record) -> str | None:
    return clean(record.fields.get("comm") or "") or None
