"""What happened so far, as events, in bounded memory: for whoever comes later and asks.

Rare events are kept as they were. Those that repeat (exits of one kind, refusals of one gfn, errors
of one address) are kept once as they first came, and once for all that followed, with their counts
added; of those that have no count (signals, looks at a vCPU, machine checks), the last few.
"""

from __future__ import annotations

from collections import OrderedDict
from dataclasses import replace

from kvmtrace import kvm
from kvmtrace.events import (
    Event,
    Exit,
    HwError,
    Lost,
    Mce,
    Refused,
    Sigbus,
    VcpuState,
    VmGone,
    VmSeen,
)

MAX_EVENTS = 8192
MAX_VMS = 4096

_KEPT: dict[type[Event], int] = {Sigbus: 64, VcpuState: 4, Mce: 16}


class EventLog:
    """Feed it all events; ``events()`` gives a log that leads to the same incidents."""

    def __init__(self, limit: int = MAX_EVENTS) -> None:
        self._limit = limit
        self._vms: OrderedDict[int, VmSeen] = OrderedDict()
        self._log: OrderedDict[object, Event] = OrderedDict()
        self._serial = 0
        self._dropped = 0

    def add(self, event: Event) -> None:
        """One more event."""
        if isinstance(event, VmSeen):
            self._vms[event.vm] = event
            while len(self._vms) > MAX_VMS:
                self._vms.popitem(last=False)
            return
        if isinstance(event, VmGone) and not self._concerned(event.vm):
            self._vms.pop(event.vm, None)  # it came and went, and nothing happened to it
            return
        self._serial += 1
        kind = _kind(event)
        if kind is None:
            self._log[self._serial] = event
        elif ("first", kind) not in self._log:
            self._log["first", kind] = event
        elif type(event) in _KEPT:
            self._keep_last(kind, event, _KEPT[type(event)])
        else:
            self._log["rest", kind] = _added(self._log.get(("rest", kind)), event)
        while len(self._log) > self._limit:
            self._log.popitem(last=False)
            self._dropped += 1

    def _keep_last(self, kind: object, event: Event, number: int) -> None:
        """A ring in the log: every slot is one key, and the oldest of them gives way."""
        slots = [slot for n in range(number) if (slot := ("last", kind, n)) in self._log]
        key = ("last", kind, len(slots))
        if len(slots) == number:
            key = min(slots, key=lambda slot: self._log[slot].ts)
            self._dropped += not isinstance(event, VcpuState)
        self._log[key] = event
        self._log.move_to_end(key)

    def _concerned(self, vm: int) -> bool:
        return any(
            getattr(event, "vm", None) == vm
            or any(owner.vm == vm for owner in getattr(event, "owners", ()))
            or getattr(getattr(event, "owner", None), "vm", None) == vm
            for event in self._log.values()
        )

    def events(self) -> list[Event]:
        """VMs first, then what happened, in order of arrival."""
        kept = [*self._vms.values(), *self._log.values()]
        if self._dropped:
            kept.append(Lost(max(event.ts for event in kept), "history", self._dropped))
        return kept


def _kind(event: Event) -> object:
    """What an event repeats; None where every one is kept."""
    match event:
        case Exit(errno=kvm.EHWPOISON):
            return event.kind, event.vm, event.vcpu, event.gfn
        case Exit():
            of = (event.vm, event.vcpu, event.errno, event.reason, event.annotated, event.gmem)
            return event.kind, *of
        case Refused():
            return event.kind, event.vm, event.gfn
        case HwError():
            return event.kind, event.via, event.severity, event.pfn, event.label
        case Sigbus():
            return event.kind, event.pid, event.tid, event.code, event.hva >> kvm.PAGE_SHIFT
        case VcpuState():
            return event.kind, event.vm, event.tid
        case Mce():
            return event.kind, event.bank, event.pfn
        case Lost():
            return event.kind, event.where
    return None


def _added(known: Event | None, event: Event) -> Event:
    if known is None:
        return event
    # Only kinds with a count come here.
    return replace(event, count=known.count + event.count)  # type: ignore[attr-defined, call-arg]
