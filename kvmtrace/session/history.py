"""What happened so far, as events, in bounded memory: for views that come later and ask.

Up to a quarter of the limit every event is kept. Beyond that, events that repeat (exits of one
kind, signals, refusals of one gfn, errors of one address) are added up: of each run the first
stays, and one that stands for the rest where the last of them was. A run ends with a pause, as
pauses mean something to the correlator: runs with pauses of a second stay apart, or of six if that
is too much, or none. So what is counted from this log is what is counted from all events; only with
none, of refusals that nothing told fewer may be known as such.

What has no room even then is dropped whole, page by page and VM by VM, settled ones first, and
counted. VMs that live do not count against the limit, and are never dropped.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field, replace
from enum import IntEnum
from typing import Any

from kvmtrace import kvm
from kvmtrace.correlate import cause_of
from kvmtrace.correlate.limits import Limits
from kvmtrace.events import (
    ClockStep,
    Event,
    Exit,
    Found,
    GmemPoison,
    GmemRefusal,
    HwError,
    KernelCounts,
    Lost,
    Mce,
    Owned,
    PageReplaced,
    Poison,
    Sigbus,
    Tick,
    Unpoison,
    VcpuState,
    VmGone,
    VmSeen,
)
from kvmtrace.linux import mce

MAX_EVENTS = 32768
"""A few hundred bytes each, and a dozen of them to a poisoned page that a VM does not cope with."""
MAX_FORGOTTEN = Limits().departed
"""As many as the correlator knows by name."""

_SECOND = 1_000_000_000
_PAUSES: tuple[float, ...] = (_SECOND, 6 * _SECOND, float("inf"))

# Of those that have no count, so many of each kind are kept beside the first.
_KEPT: dict[type[Event], int] = {VcpuState: 4, KernelCounts: 1, Tick: 1}

# MCi_STATUS: the bits that say what sort of error it is; those below may be counters and codes.
_STATUS_FLAGS = 0xFFE0_1800_0000_0000
_MISC_LSB = 0x3F


class _Worth(IntEnum):
    """What is dropped first when there is no room."""

    TRAFFIC = 0  # errors of pages that were not poisoned
    ENDED_VM = 1  # one that was not notified of poison
    UNOWNED_PAGE = 2
    SETTLED = 3  # pages whose VMs have ended, and those VMs
    LIVE_VM = 4
    OPEN = 5  # pages of VMs that live, and those VMs


@dataclass(slots=True)
class _Group:
    """What is dropped together: the events of one VM, one page, or one kind of traffic."""

    worth: _Worth
    serials: list[int] = field(default_factory=list)


class CompactLog:
    """Feed it all events; ``events()`` gives a log that leads to the same incidents and counts.

    ``forget``: drop a VM to which nothing happened when it ends; it is kept briefly, as its last
    counts may be read after that. ``where``: the place of the ``Lost`` for what has no room.
    """

    def __init__(
        self, limit: int = MAX_EVENTS, *, forget: bool = True, where: str = "history"
    ) -> None:
        self._limit = limit
        self._forget = forget
        self._where = where
        self._log: dict[int, Event] = {}  # by the number under which it came
        self._seen_at: dict[int, int] = {}  # VM: number of its VmSeen in the log
        self._live: set[int] = set()
        self._of_pid: dict[int, set[int]] = {}  # VMs in the log, or forgotten
        self._gone: set[int] = set()
        self._concerned: set[int] = set()  # VMs that an event in the log is about
        self._signalled: set[int] = set()  # processes of signals in the log that name no VM
        self._forgotten: OrderedDict[int, dict[int, Any]] = OrderedDict()
        self._serial = 0
        self._last_ts = -1  # before any
        self._add_up_at = limit // 4
        self._dropped = 0

    def add(self, event: Event) -> None:
        """One more event."""
        self._serial += 1
        if not isinstance(event, Lost):
            self._last_ts = max(self._last_ts, event.ts)
        match event:
            case VmSeen(vm=vm) if vm in self._seen_at:
                at = self._seen_at[vm]
                self._log[at] = replace(event, ts=self._log[at].ts)
                return
            case VmSeen(vm=vm):
                self._seen_at[vm] = self._serial
                self._live |= {vm} - self._gone
                self._of_pid.setdefault(event.pid, set()).add(vm)
                if event.pid in self._signalled:
                    self._concern(vm)
            case VmGone(vm=vm) if self._forget and vm not in self._concerned:
                self._forget_vm(event)
                return
            case VmGone(vm=vm):
                if vm in self._gone:
                    return
                self._gone.add(vm)
                self._live.discard(vm)
            case _:
                self._concern_all(event)
        self._log[self._serial] = event
        if self._size() > self._add_up_at:
            self._make_room()

    def events(self) -> list[Event]:
        """What happened, in the order in which it came."""
        kept = [self._log[serial] for serial in sorted(self._log)]
        told_until = max((e.ts for e in kept if not isinstance(e, Lost)), default=-1)
        if self._dropped:
            kept.append(Lost(max(0, self._last_ts), self._where, self._dropped))
        elif kept and told_until < self._last_ts:
            # VMs that left nothing came and went meanwhile: it is later than the log shows.
            kept.append(Tick(self._last_ts))
        return kept

    # -- VMs

    def _forget_vm(self, event: VmGone) -> None:
        at = self._seen_at.pop(event.vm, None)
        self._live.discard(event.vm)
        if at is not None:
            self._forgotten[event.vm] = {at: self._log.pop(at), self._serial: event}
            if len(self._forgotten) > MAX_FORGOTTEN:
                _, oldest = self._forgotten.popitem(last=False)
                self._forget_process_of(oldest[min(oldest)])

    def _forget_process_of(self, seen: Event) -> None:
        assert isinstance(seen, VmSeen)
        vms = self._of_pid.get(seen.pid, set())
        vms.discard(seen.vm)
        if not vms:
            self._of_pid.pop(seen.pid, None)

    def _concern_all(self, event: Event) -> None:
        """Something happened to the VMs that it is about; that they came and went is nothing."""
        if isinstance(event, Sigbus) and event.vm is None:
            self._signalled.add(event.pid)
            for vm in self._of_pid.get(event.pid, ()):
                self._concern(vm)
        elif not isinstance(event, (VmSeen, VmGone)):
            for vm in _vms_of(event):
                self._concern(vm)

    def _concern(self, vm: int) -> None:
        """An event is about it, even if that comes before its beginning or after its end."""
        self._concerned.add(vm)
        if vm in self._forgotten:
            came_back = self._forgotten.pop(vm)
            self._log |= came_back
            self._seen_at[vm] = min(came_back)
            self._gone.add(vm)

    def _size(self) -> int:
        return len(self._log) - len(self._live)

    # -- room

    def _make_room(self) -> None:
        for pause in _PAUSES:
            self._add_up(pause)
            if self._size() <= self._limit // 8:
                break
        if self._size() > self._limit:
            self._drop(self._size() - self._limit * 3 // 4)
        self._concerned, self._signalled = set(), set()
        for event in list(self._log.values()):
            self._concern_all(event)
        self._add_up_at = min(self._limit, self._size() + max(1, self._limit // 8))

    def _add_up(self, pause: float) -> None:
        """Put one event for each run, after its first; runs end with a pause of so many ns."""
        log: dict[int, Event] = {}
        era = 0
        runs: dict[object, tuple[int, int, list[int]]] = {}  # kind: era, last ts, serials
        for serial in sorted(self._log):
            event = self._log[serial]
            # What is counted of a gfn from here on may be of another page.
            era += isinstance(event, Unpoison)
            kind = _kind(event)
            if kind is not None:
                run_era, last_ts, serials = runs.get(kind, (era, event.ts, []))
                if run_era != era or event.ts - last_ts > pause:
                    serials = []
                if len(serials) > _KEPT.get(type(event), 1):
                    before = log.pop(serials.pop(1))
                    if type(event) not in _KEPT:
                        event = _added(before, event)
                serials.append(serial)
                runs[kind] = era, event.ts, serials
            log[serial] = event
        self._log = log

    def _drop(self, excess: int) -> None:
        """Drop ``excess`` events or a few more, what matters least first."""
        groups = sorted(self._groups(), key=lambda group: (group.worth, group.serials[-1]))
        for group in groups:
            if excess <= 0:
                return
            serials = group.serials
            if group.worth >= _Worth.LIVE_VM:
                # The last count of a kind stands for most of them, the first says how it began.
                counts = [at for at in serials if hasattr(self._log[at], "count")]
                serials = counts[1 : 1 + min(excess, max(0, len(counts) - 2))]
            for at in serials:
                self._drop_one(at)
            excess -= len(serials)
        live = set(self._seen_at.values())
        for at in [at for at in sorted(self._log) if at not in live][: max(0, excess)]:
            self._drop_one(at)

    def _drop_one(self, serial: int) -> None:
        event = self._log.pop(serial)
        match event:
            case VmSeen():
                del self._seen_at[event.vm]
                self._live.discard(event.vm)
                self._forget_process_of(event)
            case VmGone():
                self._gone.discard(event.vm)
        self._dropped += getattr(event, "count", 1)

    def _groups(self) -> list[_Group]:
        live, gone = self._live, self._gone
        owners = _owners(self._log[at] for at in sorted(self._log))
        poisoned = {e.pfn for e in self._log.values() if isinstance(e, (Poison, Found))}
        notified = {vm for e in self._log.values() if _is_of_poison(e) for vm in _vms_of(e)}
        notified |= {vm for vms in owners.values() for vm in vms}

        def worth_of(vms: set[int]) -> _Worth:
            # A follower's log holds no VmSeen of the VMs that it has already sent.
            lives = bool(vms - gone)
            if vms & notified:
                return _Worth.OPEN if lives else _Worth.SETTLED
            return _Worth.LIVE_VM if lives else _Worth.ENDED_VM

        groups: dict[object, _Group] = {}
        for serial in sorted(self._log):
            event = self._log[serial]
            if isinstance(event, VmSeen) and event.vm in live:
                continue
            pfn = getattr(event, "pfn", None)
            vms = set(_vms_of(event)) or owners.get(pfn, set())
            if vms:
                key, worth = (VmSeen.kind, min(vms - gone or vms)), worth_of(vms)
            elif pfn is not None:
                worth = _Worth.UNOWNED_PAGE if pfn in poisoned else _Worth.TRAFFIC
                key = Poison.kind, pfn
            else:
                is_rare = isinstance(event, (Lost, KernelCounts, Tick, ClockStep))
                key, worth = (event.kind, serial), _Worth.OPEN if is_rare else _Worth.TRAFFIC
            group = groups.setdefault(key, _Group(worth))
            group.worth = max(group.worth, worth)
            group.serials.append(serial)
        return list(groups.values())


_OF_POISON = (GmemPoison, Owned, GmemRefusal, PageReplaced, Sigbus, VcpuState)


def _is_of_poison(event: Event) -> bool:
    return isinstance(event, _OF_POISON) or (isinstance(event, Exit) and event.is_poison)


def _owners(events: Iterable[Event]) -> dict[int | None, set[int]]:
    """{pfn: VMs}, joined as the correlator does: guest_memfd's owners by the poisoning thread."""
    owners: dict[int | None, set[int]] = {}
    of_thread: dict[int, set[int]] = {}
    for event in events:
        match event:
            case GmemPoison():
                of_thread[event.tid] = set(_vms_of(event))
            case Poison(tid=int(tid)) if tid in of_thread:
                owners.setdefault(event.pfn, set()).update(of_thread.pop(tid))
            case Owned() | Sigbus(pfn=int()):
                owners.setdefault(event.pfn, set()).update(_vms_of(event))
    return {pfn: vms for pfn, vms in owners.items() if vms}


def _vms_of(event: Event) -> Iterator[int]:
    """The VMs that an event is about."""
    owners = (*getattr(event, "owners", ()), getattr(event, "owner", None))
    for vm in (getattr(event, "vm", None), *(owner.vm for owner in owners if owner is not None)):
        if vm is not None:
            yield vm


def _kind(event: Event) -> object:
    """What an event repeats; None where every one is kept."""
    match event:
        case Exit() if event.is_poison or event.errno == 0:
            # The correlator counts these of each gfn: deliveries, or what may be one.
            return event.kind, event.vm, event.vcpu, event.gfn, event.errno, event.reason
        case Exit():
            of = (event.vm, event.vcpu, event.errno, event.reason, event.annotated, event.gmem)
            return event.kind, *of, cause_of(event)
        case GmemRefusal():
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
        case KernelCounts() | Tick():
            return (event.kind,)
    return None


def _added(known: Event, event: Event) -> Event:
    # Only kinds with a count come here.
    return replace(event, count=known.count + event.count)  # type: ignore[attr-defined, call-arg]
