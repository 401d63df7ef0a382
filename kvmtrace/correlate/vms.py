"""VMs as the correlator remembers them: identity, deliveries, and refusals not delivered."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field

from kvmtrace import kvm
from kvmtrace.bounded import BoundedDict
from kvmtrace.correlate.limits import CountLost, Limits
from kvmtrace.events import Exit, GmemRefusal, Sigbus, VmSeen
from kvmtrace.model import Vm, VmIdentity
from kvmtrace.quick import maker

# Refusals and the exits that deliver them are counted in different maps, which are read one after
# the other. Their difference is what was not delivered only if neither has changed for this long.
QUIET_NS = 5_000_000_000

_make_vm = maker(Vm)


@dataclass(slots=True)
class UndeliveredRefusals:
    """Refusals of guest_memfd (EHWPOISON) for one gfn, and the exits that delivered them."""

    refused: int = 0
    delivered: int = 0
    last_ts: int = 0
    settled: int = 0

    def add(self, ts: int, now: int, refused: int, delivered: int) -> None:
        """Count more of either, of ``ts``; what had settled before ``now`` stays settled."""
        if now - self.last_ts > QUIET_NS:
            self.settled = self.undelivered(now)
        self.refused += refused
        self.delivered += delivered
        self.last_ts = ts if ts > self.last_ts else self.last_ts

    def undelivered(self, now: int) -> int:
        """Refusals that no exit delivered, as far as the counts have settled; never decreases."""
        if now - self.last_ts <= QUIET_NS:
            return self.settled
        return max(self.settled, self.refused - self.delivered)


@dataclass(slots=True)
class TrackedVm:
    """One VM and its counts."""

    seen: VmSeen
    exits: dict[tuple[str, str | None], int] = field(default_factory=dict)
    sigbus: dict[str, int] = field(default_factory=dict)
    refusals: dict[int, UndeliveredRefusals] = field(default_factory=dict)
    last_ts: int | None = None
    gone_ts: int | None = None
    version: int = 0
    """Changes with every count, and with what is known of it."""
    kept: tuple[object, Vm] | None = None
    """The last copy, and what it depends on."""
    identity: VmIdentity | None = None
    """The last one, if nothing of it has changed."""

    @property
    def has_events(self) -> bool:
        """Whether anything happened to it."""
        return bool(self.exits or self.sigbus or self.refusals)

    def touch(self, ts: int) -> None:
        """Something happened to it at ``ts``, and was counted."""
        self.version += 1
        if self.last_ts is None or ts > self.last_ts:
            self.last_ts = ts

    def refreeze(self, now: int) -> None:
        """Copy it if it has changed, as if its pages had not."""
        if self.kept is not None:
            self.frozen(self.kept[1].poisoned_pages, self.kept[1].forgotten_pages, now)

    def frozen(self, pages: int, forgotten: int, now: int) -> Vm:
        """An immutable copy, the last one if nothing has changed.

        ``pages``: poisoned ones; ``forgotten``: those without an incident.
        """
        undelivered = (
            sum(r.undelivered(now) for r in self.refusals.values()) if self.refusals else 0
        )
        of = (self.version, self.gone_ts, pages, forgotten, undelivered)
        if self.kept is not None and self.kept[0] == of:
            return self.kept[1]
        copy = _make_vm(
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
            undelivered=undelivered,
            vmid=self.seen.vmid,
            forgotten_pages=forgotten,
            unread=self.seen.unread,
            unit=self.seen.unit,
            api_socket=self.seen.api_socket,
        )
        self.kept = of, copy
        return copy


class VmRegistry:
    """Live VMs in full; VMs that are gone in full if they had events, else by identity."""

    def __init__(self, limits: Limits, count_lost: CountLost) -> None:
        self._limits = limits
        self._count_lost = count_lost
        self._vms: dict[int, TrackedVm] = {}
        self._of_pid: dict[int, set[int]] = {}
        self._gone: BoundedDict[int, None] = BoundedDict(limits.gone_vms, self._drop_gone)
        self._departed: BoundedDict[int, VmIdentity] = BoundedDict(limits.departed)

    def get(self, key: int | None) -> TrackedVm | None:
        """Return a VM that is known in full."""
        return self._vms.get(key) if key is not None else None

    def items(self) -> Iterator[tuple[int, TrackedVm]]:
        """All VMs that are known in full, by key."""
        return iter(self._vms.items())

    def of_process(self, pid: int) -> set[int]:
        """Keys of the VMs of a process."""
        return set(self._of_pid.get(pid, ()))

    def vmm(self, pid: int, ts: int) -> VmSeen | None:
        """Identify a process that ran VMs at ``ts``; of several VMs, what they have in common."""
        found: dict[int, VmSeen | VmIdentity] = {}
        for key in sorted(self._of_pid.get(pid, ())):
            vm = self._vms[key]
            if vm.gone_ts is None or ts <= vm.gone_ts:
                found[key] = vm.seen
        for key, identity in self._departed.items():
            if identity.pid == pid and ts <= (identity.gone_ts or 0):
                found[key] = identity
        if not found:
            return None
        names, uuids, vmms, vmids = (
            {getattr(one, what) for one in found.values()}
            for what in ("name", "uuid", "vmm", "vmid")
        )
        common = (of.pop() if len(of) == 1 else None for of in (names, uuids, vmms, vmids))
        return VmSeen(ts, min(found), pid, *common)

    def add(self, event: VmSeen) -> None:
        """Add a VM, or what more is known of it."""
        known = self._vms.get(event.vm)
        if known is None:
            self._track(event.vm, TrackedVm(event))
        else:
            self._untrack(event.vm)
            known.seen = event
            known.version += 1
            known.identity = None
            self._track(event.vm, known)

    def _track(self, key: int, vm: TrackedVm) -> None:
        self._vms[key] = vm
        self._of_pid.setdefault(vm.seen.pid, set()).add(key)

    def _untrack(self, key: int) -> None:
        pid = self._vms[key].seen.pid
        mine = self._of_pid[pid]
        mine.discard(key)
        if not mine:
            del self._of_pid[pid]

    def mark_gone(self, key: int, ts: int) -> None:
        """Note the end of a VM; its counts stay."""
        vm = self._vms[key]
        vm.gone_ts, vm.identity = ts, None

    def shrink(self, key: int, *, keep: bool) -> None:
        """Keep of a VM that is gone all if it has events or ``keep``, else its identity only."""
        vm = self._vms[key]
        if not keep and not vm.has_events:
            self._forget(key)
            return
        self._gone[key] = None

    def _drop_gone(self, key: int, _: None) -> None:
        self._forget(key)
        self._count_lost("vms", 1)

    def _forget(self, key: int) -> None:
        identity = self.vm_identity(key)
        self._untrack(key)
        del self._vms[key]
        if identity is not None:
            self._departed[key] = identity

    def vm_identity(self, key: int) -> VmIdentity | None:
        """Who a VM is or was, as far as it is remembered."""
        vm = self._vms.get(key)
        if vm is None:
            return self._departed.get(key)
        if vm.identity is None:
            seen = vm.seen
            names = (seen.name, seen.uuid, seen.vmm, vm.gone_ts, seen.vmid)
            vm.identity = VmIdentity(key, seen.pid, *names, seen.unit, seen.api_socket)
        return vm.identity

    def seen(self, key: int | None) -> VmSeen | None:
        """The latest VmSeen of a VM, also a while after its end: the last counts are read then."""
        if key is None:
            return None
        vm = self._vms.get(key)
        if vm is not None:
            return vm.seen
        identity = self._departed.get(key)
        if identity is None:
            return None
        who = (identity.pid, identity.name, identity.uuid, identity.vmm, identity.vmid)
        return VmSeen(identity.gone_ts or 0, identity.key, *who)

    def is_gone(self, key: int) -> bool:
        """Whether a VM is known to be gone; False for a VM that was never seen."""
        vm = self._vms.get(key)
        if vm is not None:
            return vm.gone_ts is not None
        identity = self._departed.get(key)
        return identity is not None and identity.gone_ts is not None

    # -- what happened to them

    def _counted(self, key: int, count: int) -> TrackedVm | None:
        """The VM that an event is of; None, and the event counted as lost, if it is not known.

        The last counts are read after the end of a VM, which may have had no events until then.
        """
        vm = self._vms.get(key)
        if vm is not None:
            return vm
        seen = self.seen(key)
        if seen is None:
            self._count_lost("unknown_vms", count)
            return None
        vm = TrackedVm(seen, gone_ts=self._departed.pop(key).gone_ts)
        self._track(key, vm)
        self._gone[key] = None
        return vm

    def count_exit(
        self, event: Exit, now: int, cause: str | None, gfn: int | None
    ) -> VmSeen | None:
        """Count exits, and return their VM. ``gfn``: by which the page in question is known."""
        vm = self._vms.get(event.vm) or self._counted(event.vm, event.count)
        if vm is None:
            return None
        key = (kvm.outcome_name(event.errno, event.reason), cause)
        exits = vm.exits
        if key not in exits and len(exits) >= self._limits.kinds:
            key = ("other", cause)
        exits[key] = exits.get(key, 0) + event.count
        vm.touch(event.ts)
        # A KVM_RUN that returns 0 with a memory fault notifies its VMM as well.
        if (cause == "hwpoison" or event.errno == 0) and gfn is not None:
            refusals = vm.refusals.get(gfn) or self._refusals(vm, gfn)
            if refusals is not None:
                refusals.add(event.ts, now, 0, event.count)
        return vm.seen

    def count_sigbus(self, event: Sigbus) -> None:
        vm = None if event.vm is None else self._counted(event.vm, event.count)
        if vm is not None:
            code = kvm.sigbus_code_name(event.code)
            if code not in vm.sigbus and len(vm.sigbus) >= self._limits.kinds:
                code = "other"
            vm.sigbus[code] = vm.sigbus.get(code, 0) + event.count
            vm.touch(event.ts)

    def count_refusal(self, event: GmemRefusal, now: int, gfn: int) -> None:
        """Count refusals. ``gfn``: by which the page that they are about is known."""
        vm = self._counted(event.vm, event.count)
        refusals = self._refusals(vm, gfn) if vm is not None else None
        if refusals is not None:
            refusals.add(event.ts, now, event.count, 0)

    def _refusals(self, vm: TrackedVm, gfn: int) -> UndeliveredRefusals | None:
        known = vm.refusals.get(gfn)
        if known is None:
            if len(vm.refusals) >= self._limits.kinds:
                self._count_lost("refusals", 1)
                return None
            known = vm.refusals[gfn] = UndeliveredRefusals()
        return known

    def undelivered(self, places: Mapping[tuple[int, int | None], object], now: int) -> int:
        """Refusals that were never delivered, of these places (VM, gfn)."""
        total = 0
        for key, gfn in places:
            vm = self._vms.get(key)
            refusals = vm.refusals.get(gfn) if vm is not None and gfn is not None else None
            total += refusals.undelivered(now) if refusals else 0
        return total
