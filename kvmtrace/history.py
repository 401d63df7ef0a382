"""What happened so far, as events, in bounded memory: for whoever comes later and asks.

Rare events are kept as they were. Those that repeat (exits of one kind, signals, refusals of one
gfn, errors of one address) are kept once as they first came, and once for all that followed, with
their counts added, so that what is counted from this log is what is counted from all events. Of
those that have no count (looks at a vCPU, the kernel's own counts) the last few are kept.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Iterator
from dataclasses import replace

from kvmtrace import kvm, mce
from kvmtrace.correlate import cause_of
from kvmtrace.events import (
    Event,
    Exit,
    HwError,
    KernelCounts,
    Lost,
    Mce,
    Refused,
    Sigbus,
    StillQuiet,
    Unpoison,
    VcpuState,
    VmGone,
    VmSeen,
)

# A few hundred bytes each, and a dozen of them to a poisoned page that a VM does not cope with.
MAX_EVENTS = 32768
MAX_VMS = 4096
MAX_FORGOTTEN = 256

_KEPT: dict[type[Event], int] = {VcpuState: 4, KernelCounts: 1, StillQuiet: 1}

# MCi_STATUS: the bits that say what sort of error it is; those below may be counters and codes.
_STATUS_FLAGS = 0xFFE0_1800_0000_0000
_MISC_LSB = 0x3F


class EventLog:
    """Feed it all events; ``events()`` gives a log that leads to the same incidents and counts.

    ``forget``: a VM to which nothing happened is dropped with its end, as whoever reads the log
    has never heard of it; it is remembered for a while, for what is told late. ``where``: what has
    no room is told as lost there.
    """

    def __init__(
        self, limit: int = MAX_EVENTS, *, forget: bool = True, where: str = "history"
    ) -> None:
        self._limit = limit
        self._forget = forget
        self._where = where
        self._vms: OrderedDict[int, VmSeen] = OrderedDict()
        # With the number under which an event came: the order that whoever lived through it saw.
        self._gone: OrderedDict[int, tuple[int, VmGone]] = OrderedDict()
        self._forgotten: OrderedDict[int, tuple[VmSeen, int, VmGone]] = OrderedDict()
        self._concerned: OrderedDict[int, None] = OrderedDict()
        self._log: OrderedDict[object, tuple[int, Event]] = OrderedDict()
        self._serial = 0
        self._era = 0
        self._dropped = 0

    def add(self, event: Event) -> None:
        """One more event."""
        self._serial += 1
        match event:
            case VmSeen():
                self._vms[event.vm] = event
                self._bound_vms()
                return
            case VmGone():
                if self._forget and event.vm not in self._concerned:
                    self._forget_vm(event)
                else:
                    self._gone.setdefault(event.vm, (self._serial, event))
                    self._bound_vms()
                return
            case Unpoison():
                # What is told of a gfn from here on may be of another page.
                self._era += 1
        for vm in _vms_of(event):
            self._concern(vm)
        kind = _kind(event)
        if kind is None:
            self._log[self._serial] = self._serial, event
        elif ("first", self._era, kind) not in self._log:
            self._log["first", self._era, kind] = self._serial, event
        elif type(event) in _KEPT:
            self._keep_last(kind, event, _KEPT[type(event)])
        else:
            key = ("rest", self._era, kind)
            known = self._log.get(key)
            self._log[key] = self._serial, _added(known[1] if known else None, event)
        while len(self._log) > self._limit:
            _, (_, dropped) = self._log.popitem(last=False)
            self._dropped += getattr(dropped, "count", 1)

    def _keep_last(self, kind: object, event: Event, number: int) -> None:
        """A ring in the log: every slot is one key, and the oldest of them gives way."""
        slots = [slot for n in range(number) if (slot := ("last", kind, n)) in self._log]
        key = ("last", kind, len(slots))
        if len(slots) == number:
            key = min(slots, key=lambda slot: self._log[slot][0])
        self._log[key] = self._serial, event
        self._log.move_to_end(key)

    def _forget_vm(self, event: VmGone) -> None:
        seen = self._vms.pop(event.vm, None)
        if seen is not None:
            self._forgotten[event.vm] = seen, self._serial, event
            if len(self._forgotten) > MAX_FORGOTTEN:
                self._forgotten.popitem(last=False)

    def _concern(self, vm: int) -> None:
        """Something happened to it, even if that is told after its end."""
        if vm in self._forgotten:
            seen, serial, gone = self._forgotten.pop(vm)
            self._vms[vm], self._gone[vm] = seen, (serial, gone)
            self._bound_vms()
        self._concerned[vm] = None
        if len(self._concerned) > 2 * MAX_VMS:
            self._concerned.popitem(last=False)

    def _bound_vms(self) -> None:
        # The end of a VM is kept as long as its name: without it the VM would live for ever.
        while len(self._vms) > MAX_VMS:
            oldest = next((vm for vm in self._gone if vm in self._vms), next(iter(self._vms)))
            self._drop_vm(oldest)
            self._gone.pop(oldest, None)
            self._dropped += 1
        while len(self._gone) > MAX_VMS:
            oldest, _ = self._gone.popitem(last=False)
            self._dropped += 1 + self._drop_vm(oldest)

    def _drop_vm(self, vm: int) -> bool:
        self._concerned.pop(vm, None)
        return self._vms.pop(vm, None) is not None

    def events(self) -> list[Event]:
        """VMs first, then what happened, as it came: sums stand where the last of them did."""
        happened = sorted([*self._log.values(), *self._gone.values()], key=lambda came: came[0])
        kept: list[Event] = [*self._vms.values(), *(event for _, event in happened)]
        if self._dropped:
            last = max((event.ts for event in kept), default=0)
            kept.append(Lost(last, self._where, self._dropped))
        return kept


def _vms_of(event: Event) -> Iterator[int]:
    """The VMs that an event is about."""
    owners = (*getattr(event, "owners", ()), getattr(event, "owner", None))
    for vm in (getattr(event, "vm", None), *(owner.vm for owner in owners if owner is not None)):
        if vm is not None:
            yield vm


def _kind(event: Event) -> object:
    """What an event repeats; None where every one is kept."""
    match event:
        case Exit() if event.tells_of_poison:
            return event.kind, event.vm, event.vcpu, event.gfn, event.errno, event.reason
        case Exit():
            of = (event.vm, event.vcpu, event.errno, event.reason, event.annotated, event.gmem)
            return event.kind, *of, cause_of(event)
        case Refused():
            return event.kind, event.vm, event.gfn
        case HwError():
            return event.kind, event.via, event.severity, event.pfn, event.label
        case Sigbus():
            # All that a signal may be joined by; of an address, the page.
            who = (event.pid, event.tid, event.sender, event.vm, event.vcpu)
            at = None if event.hva is None else event.hva >> kvm.PAGE_SHIFT
            page = (at, event.lsb, event.gfn, event.pfn)
            return event.kind, event.code, *who, *page
        case VcpuState():
            return event.kind, event.vm, event.tid
        case Mce():
            sort = (event.status & _STATUS_FLAGS, (event.misc or 0) & _MISC_LSB)
            at_memory = mce.at_memory(event.status, event.vendor, event.bank, event.ipid)
            # What a CPU ran into another one may have run into as well: that is no other error.
            cpu = None if at_memory else event.cpu
            return event.kind, event.socket, cpu, event.bank, event.pfn, *sort
        case Lost():
            return event.kind, event.where
        case KernelCounts() | StillQuiet():
            return (event.kind,)
    return None


def _added(known: Event | None, event: Event) -> Event:
    if known is None:
        return event
    # Only kinds with a count come here.
    return replace(event, count=known.count + event.count)  # type: ignore[attr-defined, call-arg]
