"""A session's events so far, in bounded memory, for commands that connect later.

Up to a quarter of the limit every event is kept. Beyond that, events that repeat (exits of one
kind, signals, refusals of one gfn, errors of one address) are added up: of each run the first
stays, and one that stands for the rest, in the place of the last. A run ends with a pause, because
pauses matter to the correlator: first runs with pauses of a second stay apart, then only of six
seconds, then none. Counts from this log are therefore the same as from all events. Only in the last
step may fewer refusals be recognized as undelivered.

If that is not enough, all events of a page or a VM are dropped together, settled ones first, and
counted as lost. Live VMs do not count against the limit, and are never dropped.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field, replace
from enum import IntEnum
from typing import Any

from kvmtrace import kvm
from kvmtrace.bounded import BoundedDict
from kvmtrace.correlate import cause_of
from kvmtrace.correlate.limits import Limits
from kvmtrace.events import (
    ClockStep,
    Event,
    Exit,
    Found,
    GmemRefusal,
    HwError,
    KernelCounts,
    Lost,
    MachineCheck,
    Owned,
    PageReplaced,
    Poison,
    Reboot,
    Sigbus,
    Tick,
    Unpoison,
    VcpuState,
    VmGone,
    VmSeen,
)
from kvmtrace.linux import mce

MAX_EVENTS = 32768
"""A few hundred bytes each; a page that a VM does not recover from has a dozen."""
MAX_FORGOTTEN = Limits().departed
"""As many departed VMs as the correlator keeps."""

_SECOND = 1_000_000_000
_PAUSES: tuple[float, ...] = (_SECOND, 6 * _SECOND, float("inf"))

# Kinds without a count: so many of each are kept beside the first.
_KEPT: dict[type[Event], int] = {VcpuState: 4, KernelCounts: 1, Tick: 1}

# MCi_STATUS: the bits that classify the error; lower ones may be counters and codes.
_STATUS_FLAGS = 0xFFE0_1800_0000_0000
_MISC_LSB = 0x3F


class _Worth(IntEnum):
    """The order in which events are dropped."""

    TRAFFIC = 0  # errors of pages that were not poisoned
    ENDED_VM = 1  # one that was not notified of poison
    UNOWNED_PAGE = 2
    SETTLED = 3  # pages whose VMs have ended, and those VMs
    LIVE_VM = 4
    OPEN = 5  # pages of live VMs, and those VMs


@dataclass(slots=True)
class _Group:
    """Events that are dropped together: of one VM, one page, or one kind of traffic."""

    worth: _Worth
    serials: list[int] = field(default_factory=list)


class CompactLog:
    """A log of all events that are added, which leads to the same incidents and counts.

    ``forget``: drop a VM without other events when it ends. The last ones are kept, because their
    last counts may be read later. ``where``: the place of the ``Lost`` for events that are dropped.
    """

    def __init__(
        self, limit: int = MAX_EVENTS, *, forget: bool = True, where: str = "history"
    ) -> None:
        self._limit = limit
        self._forget = forget
        self._where = where
        self._log: dict[int, Event] = {}  # by serial number
        self._seen_at: dict[int, list[int]] = {}  # VM: serials of its VmSeen in the log
        self._live: set[int] = set()
        self._of_pid: dict[int, set[int]] = {}  # VMs in the log, or forgotten
        self._gone: set[int] = set()
        self._vms_with_events: set[int] = set()  # VMs that events in the log concern
        self._signalled: set[int] = set()  # processes of signals without a VM in the log
        self._forgotten: BoundedDict[int, dict[int, Any]] = BoundedDict(
            MAX_FORGOTTEN, lambda vm, events: self._forget_process_of(events[min(events)])
        )
        self._serial = 0
        self._last_ts = -1  # before any
        self._add_up_at = limit // 4
        self._dropped = 0

    def add(self, event: Event) -> None:
        self._serial += 1
        if not isinstance(event, Lost):
            self._last_ts = max(self._last_ts, event.ts)
        match event:
            case VmSeen(vm=vm) if self._process_of(vm) == event.pid:
                at = self._seen_at[vm][-1]
                self._log[at] = replace(event, ts=self._log[at].ts)
                return
            case VmSeen(vm=vm):
                # Signals to the process that it had before belong to the VM; both are in the log.
                self._seen_at.setdefault(vm, []).append(self._serial)
                self._live |= {vm} - self._gone
                self._of_pid.setdefault(event.pid, set()).add(vm)
                if event.pid in self._signalled:
                    self._keep_vm(vm)
            case VmGone(vm=vm) if self._forget and not self._is_eventful(vm):
                self._forget_vm(event)
                return
            case VmGone(vm=vm):
                if vm in self._gone:
                    return
                self._gone.add(vm)
                self._live.discard(vm)
            case _:
                self._keep_vms_of(event)
        self._log[self._serial] = event
        if self._size() > self._add_up_at:
            self._make_room()

    def events(self) -> list[Event]:
        """Return the log, in the order in which events were added."""
        log = dict(self._log)
        for came_and_went in self._forgotten.values():
            log |= came_and_went
        kept = [log[serial] for serial in sorted(log)]
        last_kept = max((e.ts for e in kept if not isinstance(e, Lost)), default=-1)
        if self._dropped:
            kept.append(Lost(max(0, self._last_ts), self._where, self._dropped))
        elif kept and last_kept < self._last_ts:
            # VMs that were forgotten came and went since: time has passed that the log lacks.
            kept.append(Tick(self._last_ts))
        return kept

    @property
    def dropped(self) -> int:
        """How many of the events that were added are not in it."""
        return self._dropped

    # -- VMs

    def _process_of(self, vm: int) -> int | None:
        seen = self._log[self._seen_at[vm][-1]] if vm in self._seen_at else None
        return seen.pid if isinstance(seen, VmSeen) else None

    def _is_eventful(self, vm: int) -> bool:
        """Whether events concern the VM, or it has had several processes."""
        return vm in self._vms_with_events or len(self._seen_at.get(vm, ())) > 1

    def _forget_vm(self, event: VmGone) -> None:
        seen_at = self._seen_at.pop(event.vm, None)
        self._live.discard(event.vm)
        if seen_at is not None:
            (at,) = seen_at
            self._forgotten[event.vm] = {at: self._log.pop(at), self._serial: event}

    def _forget_process_of(self, seen: Event) -> None:
        assert isinstance(seen, VmSeen)
        others = (self._log[at] for at in self._seen_at.get(seen.vm, ()))
        if any(isinstance(one, VmSeen) and one.pid == seen.pid for one in others):
            return
        vms = self._of_pid.get(seen.pid, set())
        vms.discard(seen.vm)
        if not vms:
            self._of_pid.pop(seen.pid, None)

    def _keep_vms_of(self, event: Event) -> None:
        """Note the VMs that an event concerns.

        VmSeen and VmGone alone are no reason to keep one.
        """
        if isinstance(event, Sigbus) and event.vm is None:
            self._signalled.add(event.pid)
            for vm in self._of_pid.get(event.pid, ()):
                self._keep_vm(vm)
        elif not isinstance(event, (VmSeen, VmGone)):
            for vm in _vms_of(event):
                self._keep_vm(vm)

    def _keep_vm(self, vm: int) -> None:
        """Keep a VM that an event concerns, also if that event comes outside of the VM's life."""
        self._vms_with_events.add(vm)
        if vm in self._forgotten:
            came_back = self._forgotten.pop(vm)
            self._log |= came_back
            self._seen_at[vm] = [min(came_back)]
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
        self._vms_with_events, self._signalled = set(), set()
        for event in list(self._log.values()):
            self._keep_vms_of(event)
        self._add_up_at = min(self._limit, self._size() + max(1, self._limit // 8))

    def _add_up(self, pause: float) -> None:
        """Replace all but the first event of each run by one; a run ends with ``pause`` ns."""
        log: dict[int, Event] = {}
        generation = 0
        runs: dict[object, tuple[int, int, list[int]]] = {}  # by kind: generation, last ts, serials
        for serial in sorted(self._log):
            event = self._log[serial]
            # From here on, counts of a gfn may be of another page.
            generation += isinstance(event, (Unpoison, Reboot))
            kind = _kind(event)
            if kind is not None:
                began, last_ts, serials = runs.get(kind, (generation, event.ts, []))
                if began != generation or event.ts - last_ts > pause:
                    serials = []
                if len(serials) > _KEPT.get(type(event), 1):
                    before = log.pop(serials.pop(1))
                    if type(event) not in _KEPT:
                        event = _sum_of(before, event)
                serials.append(serial)
                runs[kind] = generation, event.ts, serials
            log[serial] = event
        self._log = log

    def _drop(self, excess: int) -> None:
        """Drop ``excess`` events or a few more, the least important ones first."""
        groups = sorted(self._groups(), key=lambda group: (group.worth, group.serials[-1]))
        for group in groups:
            if excess <= 0:
                return
            serials = group.serials
            if group.worth >= _Worth.LIVE_VM:
                # The last event of a kind stands for most of them, and the first is its beginning.
                counts = [at for at in serials if hasattr(self._log[at], "count")]
                serials = counts[1 : 1 + min(excess, max(0, len(counts) - 2))]
            for at in serials:
                self._drop_one(at)
            excess -= len(serials)
        live = {seen_at[-1] for seen_at in self._seen_at.values()}
        for at in [at for at in sorted(self._log) if at not in live][: max(0, excess)]:
            self._drop_one(at)

    def _drop_one(self, serial: int) -> None:
        event = self._log.pop(serial)
        match event:
            case VmSeen():
                self._seen_at[event.vm].remove(serial)
                if not self._seen_at[event.vm]:
                    del self._seen_at[event.vm]
                    self._live.discard(event.vm)
                self._forget_process_of(event)
            case VmGone():
                self._gone.discard(event.vm)
        self._dropped += getattr(event, "count", 1)

    def _groups(self) -> list[_Group]:
        live, gone, seen_at = self._live, self._gone, self._seen_at
        owners = _owners(self._log[at] for at in sorted(self._log))
        poisoned = {e.pfn for e in self._log.values() if isinstance(e, (Poison, Found))}
        notified = {vm for e in self._log.values() if _is_of_poison(e) for vm in _vms_of(e)}
        notified |= {vm for vms in owners.values() for vm in vms}

        def worth_of(vms: set[int]) -> _Worth:
            # A subscriber's log has no VmSeen of VMs that were sent before.
            lives = bool(vms - gone)
            if vms & notified:
                return _Worth.OPEN if lives else _Worth.SETTLED
            return _Worth.LIVE_VM if lives else _Worth.ENDED_VM

        groups: dict[object, _Group] = {}
        for serial in sorted(self._log):
            event = self._log[serial]
            if isinstance(event, VmSeen) and event.vm in live and serial == seen_at[event.vm][-1]:
                continue
            pfn = getattr(event, "pfn", None)
            vms = set(_vms_of(event)) or owners.get(pfn, set())
            if vms:
                key, worth = (VmSeen.kind, min(vms - gone or vms)), worth_of(vms)
            elif pfn is not None:
                worth = _Worth.UNOWNED_PAGE if pfn in poisoned else _Worth.TRAFFIC
                key = Poison.kind, pfn
            else:
                is_rare = isinstance(event, (Lost, KernelCounts, Tick, ClockStep, Reboot))
                key, worth = (event.kind, serial), _Worth.OPEN if is_rare else _Worth.TRAFFIC
            group = groups.setdefault(key, _Group(worth))
            group.worth = max(group.worth, worth)
            group.serials.append(serial)
        return list(groups.values())


_OF_POISON = (Poison, Owned, GmemRefusal, PageReplaced, Sigbus, VcpuState)


def _is_of_poison(event: Event) -> bool:
    return isinstance(event, _OF_POISON) or (isinstance(event, Exit) and event.is_poison)


def _owners(events: Iterable[Event]) -> dict[int | None, set[int]]:
    """Return {pfn: VMs that own it}."""
    owners: dict[int | None, set[int]] = {}
    for event in events:
        match event:
            case Poison() | Owned() | Sigbus(pfn=int()):
                owners.setdefault(event.pfn, set()).update(_vms_of(event))
    return {pfn: vms for pfn, vms in owners.items() if vms}


def _vms_of(event: Event) -> Iterator[int]:
    """Yield the VMs that an event concerns."""
    match event:
        case Poison():
            yield from (owner.vm for owner in (event.gmem.owners if event.gmem else ()))
        case Owned():
            yield event.owner.vm
        case _ if (vm := getattr(event, "vm", None)) is not None:
            yield vm


def _kind(event: Event) -> object:
    """Return a key that repetitions of an event have too; None for events that are all kept."""
    match event:
        case Exit() if event.is_poison or event.errno == 0:
            # The correlator counts these of each gfn: deliveries, or what may be one.
            return event.kind, event.vm, event.vcpu, event.gfn, event.errno, event.reason
        case Exit():
            of = (event.vm, event.vcpu, event.errno, event.reason, event.annotated, event.gmem)
            return event.kind, *of, cause_of(event)
        case GmemRefusal():
            return event.kind, event.vm, event.gfn
        case HwError(check=None):
            return event.kind, event.via, event.severity, event.pfn, event.label
        case HwError(check=MachineCheck() as check):
            sort = (check.status & _STATUS_FLAGS, (check.misc or 0) & _MISC_LSB)
            at_memory = mce.at_memory(check.status, check.vendor, check.bank, check.ipid)
            # Any CPU may read a memory controller's record. Otherwise two CPUs may have consumed
            # the same error, so their records stay apart.
            cpu = None if at_memory else check.cpu
            return event.kind, check.socket, cpu, check.bank, event.pfn, *sort
        case Sigbus():
            # Everything that a signal may be joined by; of an address, the page.
            who = (event.pid, event.tid, event.sender, event.vm, event.vcpu)
            at = None if event.hva is None else event.hva >> kvm.PAGE_SHIFT
            page = (at, event.lsb, event.gfn, event.pfn)
            return event.kind, event.code, *who, *page
        case VcpuState():
            return event.kind, event.vm, event.tid
        case Lost():
            return event.kind, event.where
        case KernelCounts() | Tick():
            return (event.kind,)
    return None


def _sum_of(known: Event, event: Event) -> Event:
    # Only kinds with a count are added.
    return replace(event, count=known.count + event.count)  # type: ignore[attr-defined, call-arg]
