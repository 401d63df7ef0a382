"""One incident as the correlator builds it: owners, deliveries, and what its VMMs did then."""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass, field, replace
from typing import assert_never

from kvmtrace import kvm
from kvmtrace.correlate.delivery import Delivery
from kvmtrace.correlate.error_site import ErrorSite
from kvmtrace.correlate.limits import CountLost, Limits
from kvmtrace.correlate.timeline import RunningEntry
from kvmtrace.correlate.verdicts import VcpuSample
from kvmtrace.events import Owner, Poison, Sigbus, VcpuState
from kvmtrace.facts import EntryKind, TimelineEntry
from kvmtrace.model import Incident, PageClass, VmIdentity, lost_gfns
from kvmtrace.page_types import PageOutcome, is_verdict, outcome_of

GuestPlace = tuple[int, int | None]  # VM key, gfn

# 16 GiB hugetlb pages exist; a larger number is damage.
MAX_SIZE = 1 << 34

RANK_OVER, RANK_NOBODY, RANK_KERNEL, RANK_OF_A_VM = range(4)  # the lowest is forgotten first

# Entries of which there may be many: they give way to others.
_MINOR = (EntryKind.OWNER, EntryKind.VCPU_STATE, EntryKind.REFUSAL, EntryKind.PAGE_REPLACED)

_SAMPLES_KEPT = 4
_SITES_KEPT = 8
_FORMER_IDS_KEPT = 4


@dataclass(slots=True)
class FrozenIncident:
    """An immutable copy, as long as what it depends on is the same and the time is below ``until``.

    ``vms``: keys of its VMs, sorted; ``identities``: theirs. ``hardware``: the reports that were
    counted when it was made. ``holders``: VMs that have the page, of an incident that is not over.
    """

    copy: Incident
    until: int
    vms: list[int]
    identities: list[VmIdentity | None]
    undelivered: int
    hardware: int
    holders: Collection[int]


@dataclass(slots=True)
class IncidentState:
    """``closed``: its VMs are gone, or the host was rebooted, for good.

    See ``over`` for an unpoisoned page.

    ``in_many_places``: memory_failure could not get hold of the page and it was found in several
    places, so it is the kernel's. ``guest_memfd``: it is guest memory, even if the VM is unknown.
    ``vm_identities``: of VMs that are gone. ``deliveries``: by VM and vCPU. ``released``: VM and
    hva of places that no longer have the page. ``samples``: by VM and thread. ``entries``: the
    timeline by kind and what is distinct about the entry. ``frozen``: the last copy, if it has not
    changed since.
    """

    id: str
    limits: Limits
    count_lost: CountLost
    page: int = 1 << kvm.PAGE_SHIFT  # bytes
    pfn: int | None = None
    page_type: str | None = None
    result: str | None = None
    judged_ts: int = 0
    in_many_places: bool = False
    guest_memfd: bool = False
    poisoned_ts: int | None = None
    before_start: bool = False
    unpoisoned_ts: int | None = None
    rebooted_ts: int | None = None
    size: int | None = None
    closed: bool = False
    owners: dict[GuestPlace, Owner] = field(default_factory=dict)
    vm_identities: dict[int, VmIdentity] = field(default_factory=dict)
    exits: int = 0
    sigbus: int = 0
    sigbus_at_poison: int = 0
    sigbus_to_others: int = 0
    first_delivery_ts: int | None = None
    last_delivery_ts: int | None = None
    deliveries: dict[tuple[int, int | None], Delivery] = field(default_factory=dict)
    released: set[tuple[int, int]] = field(default_factory=set)
    samples: dict[tuple[int, int], list[VcpuSample]] = field(default_factory=dict)
    error_sites: list[ErrorSite] = field(default_factory=list)
    own_signals: list[Sigbus] = field(default_factory=list)
    entries: dict[tuple[object, ...], RunningEntry] = field(default_factory=dict)
    omitted: int = 0
    former_ids: list[str] = field(default_factory=list)
    frozen: FrozenIncident | None = None

    # -- whose it is

    def judge(self, event: Poison) -> None:
        """Take the kernel's verdict on the page; its last one counts."""
        again = is_verdict(event.page_type) and (
            not is_verdict(self.page_type or "") or event.ts >= self.judged_ts
        )
        if self.page_type is None or again:
            self.page_type, self.result = event.page_type, event.result
            self.judged_ts = event.ts

    @property
    def page_class(self) -> PageClass | None:
        """Whose the page is; None where the kernel's verdict is not known."""
        outcome = self._outcome
        if self.is_guest_memory or (outcome != PageOutcome.KERNEL and self.vms):
            return PageClass.VM
        match outcome:
            case None:
                return None
            case PageOutcome.KERNEL | PageOutcome.UNHELD:
                return PageClass.KERNEL
            case PageOutcome.PROCESS:
                return PageClass.PROCESS
            case PageOutcome.HANDLED:
                return PageClass.HANDLED
        assert_never(outcome)

    @property
    def _outcome(self) -> PageOutcome | None:
        return outcome_of(self.page_type, self.result)

    @property
    def is_kernels(self) -> bool:
        """Whether it is the kernel's page, which VMs only have mapped (the zero page)."""
        if self.is_guest_memory:
            return False
        outcome = self._outcome
        return outcome == PageOutcome.KERNEL or (
            outcome == PageOutcome.UNHELD and self.in_many_places
        )

    @property
    def is_guest_memory(self) -> bool:
        """Whether guest_memfd or the exit of a guest that accessed the page showed that it is."""
        return self.guest_memfd or self.exits > 0

    def has_many_places(self, *more: Owner) -> bool:
        """Whether a page that memory_failure could not get hold of is in several places.

        Then it is not guest memory: that is in one place, or shared memory, of which
        memory_failure gets hold.
        """
        if self.is_guest_memory or self._outcome != PageOutcome.UNHELD:
            return False
        owners = (*self.owners.values(), *more)
        addresses = {(owner.vm, owner.hva) for owner in owners if owner.hva is not None}
        return len(addresses) > 1 or len({owner.vm for owner in owners}) > 1

    @property
    def rank(self) -> int:
        """Rank for forgetting: one that is over goes first, then nobody's, the kernel's, a VM's."""
        if self.over:
            return RANK_OVER
        unnamed = self.guest_memfd and not self.owners
        if self.deliveries or self.first_delivery_ts is not None or unnamed or self.holders:
            return RANK_OF_A_VM
        return RANK_KERNEL if self.page_class == PageClass.KERNEL else RANK_NOBODY

    # -- where it is

    @property
    def vms(self) -> set[int]:
        """Keys of all VMs that own the page or were notified of it."""
        return {vm for vm, _ in self.owners} | {vm for vm, _ in self.deliveries}

    @property
    def over(self) -> bool:
        """Whether it is closed, or unpoisoned and not delivered since."""
        if self.closed or self.unpoisoned_ts is None:
            return self.closed
        return self.last_delivery_ts is None or self.last_delivery_ts <= self.unpoisoned_ts

    @property
    def holders(self) -> set[int]:
        """Keys of the VMs that have the page, as far as known."""
        if not self.released:
            return {vm for vm, _ in self.owners}
        return {owner.vm for owner in self.owners.values() if not self.is_released(owner)}

    def is_released(self, owner: Owner) -> bool:
        """Whether the owner was later seen to have another page there."""
        hva = owner.hva
        return hva is not None and (owner.vm, hva // self.page * self.page) in self.released

    def release(self, vm: int, hva: int) -> bool:
        """Note that a VM no longer has the page at ``hva``; False if it is not known to have."""
        if not any(
            owner.vm == vm and owner.hva is not None and owner.hva // self.page == hva // self.page
            for owner in self.owners.values()
        ):
            return False
        self.released.add((vm, hva // self.page * self.page))
        return True

    def not_before_start(self, ts: int) -> None:
        """Note a poison at ``ts``: memory_failure was still running when the page was found."""
        self.before_start, self.poisoned_ts = False, ts
        self.entries.pop((EntryKind.FOUND,), None)

    def set_min_size(self, size: int | None) -> None:
        """At least ``size`` bytes are lost."""
        if size is not None and 0 < size <= MAX_SIZE and not size & (size - 1):
            self.size = max(self.size or 0, size)

    @property
    def huge(self) -> bool:
        return self.size is not None and self.size > self.page

    def covers_pfn(self, pfn: int) -> bool:
        """Whether the page with this pfn is lost in it."""
        if self.pfn is None:
            return False
        pages = max(1, (self.size or self.page) // self.page)
        return pfn // pages == self.pfn // pages

    def owner_by_hva(self, vm: int, hva: int, lsb: int | None) -> Owner | None:
        """The owner whose lost memory holds an address of that VM's process.

        By the known size of the loss, or by a signal's ``lsb`` if that is more: KVM's own signals
        have 12 even if a huge page is lost.
        """
        by_signal = 1 << lsb if lsb is not None and (1 << lsb) <= MAX_SIZE else 0
        size = max(self.size or self.page, by_signal)
        for owner in self.owners.values():
            if owner.vm == vm and owner.hva is not None and owner.hva // size == hva // size:
                return owner
        return None

    def owner_by_gfn(self, vm: int, gfn: int) -> Owner | None:
        """The owner whose lost memory holds a gfn: a huge page is lost as a whole."""
        exact = self.owners.get((vm, gfn))
        if exact is not None or not self.huge:
            return exact
        for owner in self.owners.values():
            lost = lost_gfns(owner, self.size, self.page.bit_length() - 1)
            if owner.vm == vm and lost is not None and lost[0] <= gfn <= lost[1]:
                return owner
        return None

    # -- what happened

    def note_again(self, ts: int, count: int, key: tuple[object, ...]) -> bool:
        """Count again what is in the timeline; False if it is not. ``key``: kind and facts."""
        known = self.entries.get(key)
        if known is None:
            return False
        known.add(ts, count)
        return True

    def note(self, entry: TimelineEntry, *distinct: object) -> None:
        """Add to the timeline, or count again what has the same kind and ``distinct`` facts."""
        key = (entry.kind, *distinct)
        if self.note_again(entry.ts, entry.count, key):
            return
        if len(self.entries) < self.limits.timeline or self._drop_minor(entry.kind):
            self.entries[key] = RunningEntry(entry)
        else:
            self.omitted += 1

    def _drop_minor(self, kind: EntryKind) -> bool:
        """Make room for an entry of a kind that matters, by dropping the last minor one."""
        if kind in _MINOR:
            return False
        minor = next((known for known in reversed(self.entries) if known[0] in _MINOR), None)
        if minor is None:
            return False
        del self.entries[minor]
        self.omitted += 1
        return True

    def add_owner(self, owner: Owner) -> bool:
        """Add an owner or complete one; False if there is no room for more.

        gfn and hva arrive separately (fault, page table). If the VM has one owner entry that does
        not conflict, they are merged.
        """
        mine = [one for one in self.owners.values() if one.vm == owner.vm]
        if any(owner.gfn in (None, one.gfn) and owner.hva in (None, one.hva) for one in mine):
            return True
        agree = [one for one in mine if _agree(one.gfn, owner.gfn) and _agree(one.hva, owner.hva)]
        same = [one for one in agree if one.gfn == owner.gfn or one.hva == owner.hva]
        if not same and len(agree) == 1:
            same = agree
        place = (owner.vm, owner.gfn)
        if not same:
            if place in self.owners:
                return True  # with another address: the first one stays
            if len(self.owners) >= self.limits.owners:
                self.count_lost("owners", 1)
                return False
        known = [owner, *same]
        whole = Owner(
            owner.vm,
            next((one.gfn for one in known if one.gfn is not None), None),
            next((one.hva for one in known if one.hva is not None), None),
        )
        for one in same:
            if one.gfn != whole.gfn:
                del self.owners[one.vm, one.gfn]
        self.owners[whole.vm, whole.gfn] = whole
        return True

    def deliver(
        self,
        ts: int,
        vm: int,
        vcpu: int | None,
        *,
        exits: int = 0,
        code: str | None = None,
        signals: int = 0,
        page: int | None = None,
    ) -> bool:
        """Count notifications of a VMM; True if they are the first.

        ``signals``: those of one ``code``. ``page``: which page of a huge page, by gfn or hva.
        """
        first = self.mark_delivered(ts)
        delivery = self.deliveries.get((vm, vcpu))
        if delivery is None:
            if len(self.deliveries) >= self.limits.notified_vcpus:
                self.count_lost("told", 1)
                return first
            delivery = self.deliveries[vm, vcpu] = Delivery(first_ts=ts, last_ts=ts)
        is_huge = self.size is not None and self.size > self.page
        delivery.add(ts, page if is_huge else None, exits, code, signals)
        if not self.samples:
            return first
        # Earlier samples do not show how the VMM reacted to this.
        for key in [k for k, seen in self.samples.items() if k[0] == vm and seen[-1].vcpu == vcpu]:
            self.samples[key] = [
                sample for sample in self.samples[key] if sample.ts > delivery.last_ts
            ]
            if not self.samples[key]:
                del self.samples[key]
        return first

    def mark_delivered(self, ts: int) -> bool:
        """Note that a VMM was notified; True if for the first time."""
        before, last = self.first_delivery_ts, self.last_delivery_ts
        if before is None or ts < before:
            self.first_delivery_ts = ts
        if last is None or ts > last:
            self.last_delivery_ts = ts
        return before is None

    def add_sample(self, event: VcpuState) -> bool:
        """Add a sample of a vCPU; False if it was not notified of this page."""
        delivery = self.deliveries.get((event.vm, event.vcpu))
        if delivery is None or event.ts <= delivery.last_ts:
            return False
        seen = self.samples.get((event.vm, event.tid))
        if seen is None:
            if len(self.samples) >= self.limits.notified_vcpus:
                self.count_lost("looks", 1)
                return False
            seen = self.samples[event.vm, event.tid] = []
        seen.append(VcpuSample(event.ts, event.tid, event.vcpu, event.state, event.ran_ns))
        if len(seen) > _SAMPLES_KEPT:
            # The CPU time of all samples is summed up later.
            oldest, second = seen[0], seen[1]
            ran = [x.ran_ns for x in (oldest, second) if x.ran_ns is not None]
            seen[:2] = [replace(second, ran_ns=sum(ran) if ran else None)]
        return True

    def absorb(self, other: IncidentState) -> None:
        """Take what another incident has of the same page; its owners come by ``add_owner``.

        Of the two, one has a pfn; the kernel's verdict and the poison's time are in that one.
        """
        place = self if self.pfn is None else other
        if self.pfn is None:
            self.pfn, self.page_type, self.result = other.pfn, other.page_type, other.result
            self.judged_ts, self.in_many_places = other.judged_ts, other.in_many_places
            self.poisoned_ts, self.before_start = other.poisoned_ts, other.before_start
            self.unpoisoned_ts = other.unpoisoned_ts
        ids = [*self.former_ids, *other.former_ids, other.id]
        self.former_ids = ids[-_FORMER_IDS_KEPT:]
        self.set_min_size(other.size)
        self.guest_memfd |= other.guest_memfd
        self.vm_identities = other.vm_identities | self.vm_identities
        self.released |= other.released
        self.exits += other.exits
        self.sigbus += other.sigbus
        self.sigbus_at_poison += other.sigbus_at_poison
        self.sigbus_to_others += other.sigbus_to_others
        self.own_signals = [*self.own_signals, *other.own_signals][-4:]
        for ts in (other.first_delivery_ts, other.last_delivery_ts):
            if ts is not None:
                self.mark_delivered(ts)
        for site in other.error_sites:
            self.add_origin(site)
        if self.huge:
            gfns = {owner.vm: owner.gfn for owner in place.owners.values()}
            for (vm, _), delivery in place.deliveries.items():
                delivery.name_page(gfns.get(vm))
        self._absorb_deliveries(other)
        self.omitted += other.omitted
        for key, running in other.entries.items():
            entry = running.frozen()
            if not self.note_again(entry.ts, entry.count, key):
                self.note(entry, *key[1:])
            elif entry.last_ts is not None:
                self.note_again(entry.last_ts, 0, key)

    def _absorb_deliveries(self, other: IncidentState) -> None:
        for vcpu, delivery in other.deliveries.items():
            if vcpu in self.deliveries:
                self.deliveries[vcpu].absorb(delivery)
            elif len(self.deliveries) < self.limits.notified_vcpus:
                self.deliveries[vcpu] = delivery
            else:
                self.count_lost("told", 1)
        samples, self.samples, other.samples = self.samples | other.samples, {}, {}
        for (vm, tid), seen in samples.items():
            told = self.deliveries.get((vm, seen[-1].vcpu))
            since = [one for one in seen if told is not None and one.ts > told.last_ts]
            if since and len(self.samples) < self.limits.notified_vcpus:
                self.samples[vm, tid] = since

    def add_origin(self, site: ErrorSite) -> None:
        """Add a place that holds the page and of which hardware reported errors."""
        is_known = any(site is known for known in self.error_sites)
        if not is_known and len(self.error_sites) < _SITES_KEPT:
            self.error_sites.append(site)

    @property
    def consumed_by_access(self) -> bool:
        """Whether hardware reported that the page was accessed: then the signal is for that.

        A thread that poisons a page of its own (madvise) gets the same signal.
        """
        severities = {site.facts.get("severity") for site in self.error_sites}
        return bool(severities & {"recoverable", "fatal"})


def _agree(one: int | None, other: int | None) -> bool:
    return one is None or other is None or one == other
