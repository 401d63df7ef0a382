"""The VMs that the correlator knows: identity, deliveries, and refusals that were not delivered."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field

from kvmtrace import kvm
from kvmtrace.bounded import BoundedDict
from kvmtrace.correlate.limits import Limits
from kvmtrace.events import Exit, GmemRefusal, Sigbus, VmSeen
from kvmtrace.model import Vm, VmIdentity

Lose = Callable[[str, int], None]

# Refusals and the exits that deliver them are counted in different places and read one after the
# other: only when neither has moved for so long is the difference what was never delivered.
QUIET_NS = 5_000_000_000


@dataclass(slots=True)
class UndeliveredRefusals:
    """guest_memfd's answers EHWPOISON for one gfn, and the exits that delivered them."""

    refused: int = 0
    told: int = 0
    last_ts: int = 0
    settled: int = 0

    def add(self, ts: int, *, refused: int = 0, told: int = 0) -> None:
        """What had settled by then stays settled."""
        self.settled = self.undelivered(ts)
        self.refused += refused
        self.told += told
        self.last_ts = max(self.last_ts, ts)

    def undelivered(self, now: int) -> int:
        """UndeliveredRefusals that no exit delivered, as far as settled; never less than it was."""
        if now - self.last_ts <= QUIET_NS:
            return self.settled
        return max(self.settled, self.refused - self.told)


@dataclass(slots=True)
class VmState:
    """One VM."""

    seen: VmSeen
    exits: dict[tuple[str, str | None], int] = field(default_factory=dict)
    sigbus: dict[str, int] = field(default_factory=dict)
    refusals: dict[int, UndeliveredRefusals] = field(default_factory=dict)
    last_ts: int | None = None
    gone_ts: int | None = None

    @property
    def eventful(self) -> bool:
        return bool(self.exits or self.sigbus or self.refusals)

    def touch(self, ts: int) -> None:
        self.last_ts = ts if self.last_ts is None else max(self.last_ts, ts)

    def frozen(self, pages: int, forgotten: int, now: int) -> Vm:
        """As views see it. ``forgotten``: of its ``pages``, those of forgotten incidents."""
        return Vm(
            key=self.seen.vm,
            pid=self.seen.pid,
            name=self.seen.name,
            uuid=self.seen.uuid,
            vmm=self.seen.vmm,
            exits=dict(self.exits),
            sigbus=dict(self.sigbus),
            poisoned_pages=pages,
            last_ts=self.last_ts,
            gone=self.gone_ts is not None,
            undelivered=sum(r.undelivered(now) for r in self.refusals.values()),
            vmid=self.seen.vmid,
            forgotten_pages=forgotten,
            unread=self.seen.unread,
        )


class VmRegistry:
    """Live VMs, and of those that are gone the eventful ones in full and the others by name."""

    def __init__(self, limits: Limits, lose: Lose) -> None:
        self._limits = limits
        self._lose = lose
        self._vms: dict[int, VmState] = {}
        self._gone: BoundedDict[int, None] = BoundedDict(limits.gone_vms, self._drop_gone)
        self._departed: BoundedDict[int, VmIdentity] = BoundedDict(limits.departed)

    def get(self, key: int | None) -> VmState | None:
        """A VM that is known in full."""
        return self._vms.get(key) if key is not None else None

    def items(self) -> Iterator[tuple[int, VmState]]:
        """All that are known in full."""
        return iter(self._vms.items())

    def of_process(self, pid: int) -> set[int]:
        """The VMs of a process."""
        return {key for key, vm in self._vms.items() if vm.seen.pid == pid}

    def vmm(self, pid: int, ts: int) -> VmSeen | None:
        """Who a process is that ran VMs at ``ts``; of several, what they have in common."""
        found: dict[int, VmSeen | VmIdentity] = {
            key: vm.seen
            for key, vm in self._vms.items()
            if vm.seen.pid == pid and (vm.gone_ts is None or ts <= vm.gone_ts)
        }
        for key, party in self._departed.items():
            if party.pid == pid and ts <= (party.gone_ts or 0):
                found[key] = party
        if not found:
            return None
        names, uuids, vmms, vmids = (
            {getattr(one, what) for one in found.values()}
            for what in ("name", "uuid", "vmm", "vmid")
        )
        common = (of.pop() if len(of) == 1 else None for of in (names, uuids, vmms, vmids))
        return VmSeen(ts, min(found), pid, *common)

    def seen(self, event: VmSeen) -> None:
        """A VM, or more about it."""
        known = self._vms.get(event.vm)
        if known is None:
            self._vms[event.vm] = VmState(event)
        else:
            known.seen = event

    def gone(self, key: int, ts: int) -> None:
        """It is gone; its counts stay."""
        self._vms[key].gone_ts = ts

    def settle(self, key: int, *, keep: bool) -> None:
        """What to remember of a VM that is gone: all if it is eventful or in an incident."""
        vm = self._vms[key]
        if not keep and not vm.eventful:
            self._forget(key)
            return
        self._gone[key] = None

    def _drop_gone(self, key: int, _: None) -> None:
        self._forget(key)
        self._lose("vms", 1)

    def _forget(self, key: int) -> None:
        party = self.party(key)
        del self._vms[key]
        if party is not None:
            self._departed[key] = party

    def party(self, key: int) -> VmIdentity | None:
        """Who that is or was, as far as it is remembered."""
        vm = self._vms.get(key)
        if vm is None:
            return self._departed.get(key)
        seen = vm.seen
        return VmIdentity(key, seen.pid, seen.name, seen.uuid, seen.vmm, vm.gone_ts, seen.vmid)

    def identity(self, key: int | None) -> VmSeen | None:
        """As its source reported it, also a while after its end: the last counts are read then."""
        vm = self.get(key)
        if vm is not None:
            return vm.seen
        party = self._departed.get(key) if key is not None else None
        if party is None:
            return None
        who = (party.pid, party.name, party.uuid, party.vmm, party.vmid)
        return VmSeen(party.gone_ts or 0, party.key, *who)

    def is_gone(self, key: int) -> bool:
        """Known to be gone; False for a VM that was never seen."""
        party = self.party(key)
        return party is not None and party.gone_ts is not None

    # -- what happened to them

    def _concerned(self, key: int, count: int) -> VmState | None:
        """The VM that an event is of; None, and counted as lost, if it is not known.

        The last counts are read after the end of a VM, which may have been quiet until then.
        """
        vm = self._vms.get(key)
        seen = self.identity(key)
        if vm is None and seen is not None:
            vm = self._vms[key] = VmState(seen, gone_ts=self._departed.pop(key).gone_ts)
            self._gone[key] = None
        elif vm is None:
            self._lose("unknown_vms", count)
        return vm

    def exit(self, event: Exit, cause: str | None, gfn: int | None) -> None:
        """Count an exit. ``gfn``: by which the page that it is about is known."""
        vm = self._concerned(event.vm, event.count)
        if vm is None:
            return
        key = (kvm.outcome_name(event.errno, event.reason), cause)
        if key not in vm.exits and len(vm.exits) >= self._limits.kinds:
            key = ("other", cause)
        vm.exits[key] = vm.exits.get(key, 0) + event.count
        vm.touch(event.ts)
        # KVM_RUN = 0 with a memory fault notifies its VMM as well, whatever for.
        if (cause == "hwpoison" or event.errno == 0) and gfn is not None:
            refusals = self._refusals(vm, gfn)
            if refusals is not None:
                refusals.add(event.ts, told=event.count)

    def sigbus(self, event: Sigbus) -> None:
        """Count a signal."""
        vm = None if event.vm is None else self._concerned(event.vm, event.count)
        if vm is not None:
            code = kvm.sigbus_code_name(event.code)
            if code not in vm.sigbus and len(vm.sigbus) >= self._limits.kinds:
                code = "other"
            vm.sigbus[code] = vm.sigbus.get(code, 0) + event.count
            vm.touch(event.ts)

    def refused(self, event: GmemRefusal, gfn: int) -> None:
        """Count refusals. ``gfn``: by which the page that they are about is known."""
        vm = self._concerned(event.vm, event.count)
        refusals = self._refusals(vm, gfn) if vm is not None else None
        if refusals is not None:
            refusals.add(event.ts, refused=event.count)

    def _refusals(self, vm: VmState, gfn: int) -> UndeliveredRefusals | None:
        known = vm.refusals.get(gfn)
        if known is None:
            if len(vm.refusals) >= self._limits.kinds:
                self._lose("refusals", 1)
                return None
            known = vm.refusals[gfn] = UndeliveredRefusals()
        return known

    def undelivered(self, places: Mapping[tuple[int, int | None], object], now: int) -> int:
        """UndeliveredRefusals never delivered at these places (VM, gfn)."""
        total = 0
        for key, gfn in places:
            vm = self._vms.get(key)
            refusals = vm.refusals.get(gfn) if vm is not None and gfn is not None else None
            total += refusals.undelivered(now) if refusals else 0
        return total
