"""One incident as the correlator builds it up: owners, deliveries, and what its VMMs did then."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from typing import assert_never

from kvmtrace import kvm
from kvmtrace.bounded import BoundedDict
from kvmtrace.correlate.hardware_errors import ErrorSite
from kvmtrace.correlate.limits import Limits
from kvmtrace.correlate.verdicts import Evidence, VcpuSample, judge, loops_now
from kvmtrace.events import Owner, Poison, Sigbus, VcpuState
from kvmtrace.model import (
    EntryKind,
    Incident,
    IncidentStatus,
    Notification,
    Origin,
    PageClass,
    TimelineEntry,
    Verdict,
    VerdictWord,
    VmIdentity,
    lost_gfns,
)
from kvmtrace.page_types import PageOutcome, is_verdict, outcome_of

GuestPlace = tuple[int, int | None]  # VM key, gfn

# 16 GiB hugetlb pages exist; a number beyond is damage.
MAX_SIZE = 1 << 34

RANK_OVER, RANK_NOBODY, RANK_KERNEL, RANK_OF_A_VM = range(4)

# Entries that may be many, and give way to others.
_MINOR = (
    EntryKind.OWNER,
    EntryKind.VCPU_STATE,
    EntryKind.REFUSAL,
    EntryKind.PAGE_REPLACED,
)

_SETTLED = (VerdictWord.HANDLED, VerdictWord.EXITED)

_LOOKS_KEPT = 4
_PLACES_KEPT = 8
_CODES_KEPT = 8
_PAGES_KEPT = 64


@dataclass(slots=True)
class _Delivery:
    exits: int = 0
    sigbus: dict[str, int] = field(default_factory=dict)
    first_ts: int = 0
    last_ts: int = 0
    pages: BoundedDict[int | None, int] = field(  # notifications by page of a huge page
        default_factory=lambda: BoundedDict(_PAGES_KEPT)
    )


@dataclass(slots=True)
class IncidentState:
    """``closed``: its VMs are gone, for good. An unpoisoned page may be delivered again: ``over``.

    ``shared_out``: found in several places, as only a page of the kernel's is that memory_failure
    could not get hold of. ``guest_memfd``: it is guest memory, of whichever VM.
    """

    id: str
    limits: Limits
    lose: Callable[[str, int], None]
    page: int = 1 << kvm.PAGE_SHIFT  # bytes
    pfn: int | None = None
    page_type: str | None = None
    result: str | None = None
    judged_ts: int = 0
    shared_out: bool = False
    guest_memfd: bool = False
    poisoned_ts: int | None = None
    before_start: bool = False
    unpoisoned_ts: int | None = None
    size: int | None = None
    closed: bool = False
    owners: dict[GuestPlace, Owner] = field(default_factory=dict)
    parties: dict[int, VmIdentity] = field(default_factory=dict)
    exits: int = 0
    sigbus: int = 0
    sigbus_at_poison: int = 0
    sigbus_to_others: int = 0
    first_delivery_ts: int | None = None
    last_delivery_ts: int | None = None
    told: dict[tuple[int, int | None], _Delivery] = field(default_factory=dict)
    released: set[tuple[int, int]] = field(default_factory=set)  # VM, hva
    looks: dict[tuple[int, int], list[VcpuSample]] = field(default_factory=dict)  # by VM and thread
    places: list[ErrorSite] = field(default_factory=list)
    own_signals: list[Sigbus] = field(default_factory=list)
    moments: dict[tuple[object, ...], TimelineEntry] = field(default_factory=dict)
    omitted: int = 0

    # -- whose it is

    def judge(self, event: Poison) -> None:
        """Take the kernel's verdict: its last one counts."""
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
    def disowned(self) -> bool:
        """The kernel's own page: VMs that have it mapped do not own it (the zero page)."""
        if self.is_guest_memory:
            return False
        outcome = self._outcome
        return outcome == PageOutcome.KERNEL or (outcome == PageOutcome.UNHELD and self.shared_out)

    @property
    def is_guest_memory(self) -> bool:
        """KVM itself said so: by guest_memfd, or by the exit of a guest that touched the page."""
        return self.guest_memfd or self.exits > 0

    def is_elsewhere(self, *more: Owner) -> bool:
        """Whether a page that memory_failure could not get hold of is in several places.

        Guest memory is in one place, or is shared memory, which memory_failure gets hold of.
        """
        if self.is_guest_memory or self._outcome != PageOutcome.UNHELD:
            return False
        owners = (*self.owners.values(), *more)
        addresses = {(owner.vm, owner.hva) for owner in owners if owner.hva is not None}
        return len(addresses) > 1 or len({owner.vm for owner in owners}) > 1

    @property
    def rank(self) -> int:
        """What has to be forgotten first has the lowest: over, nobody's, the kernel's, a VM's."""
        if self.over:
            return RANK_OVER
        unnamed = self.guest_memfd and not self.owners
        if self.holders or unnamed or self.told or self.first_delivery_ts is not None:
            return RANK_OF_A_VM
        return RANK_KERNEL if self.page_class == PageClass.KERNEL else RANK_NOBODY

    # -- where it is

    @property
    def vms(self) -> set[int]:
        """Keys of all VMs that own the page or were notified of it."""
        return {vm for vm, _ in self.owners} | {vm for vm, _ in self.told}

    @property
    def over(self) -> bool:
        """Closed, or unpoisoned and not delivered since."""
        if self.closed or self.unpoisoned_ts is None:
            return self.closed
        return self.last_delivery_ts is None or self.last_delivery_ts <= self.unpoisoned_ts

    @property
    def holders(self) -> set[int]:
        """Keys of the VMs that have the page, or had when last seen."""
        if not self.released:
            return {vm for vm, _ in self.owners}
        return {owner.vm for owner in self.owners.values() if not self.is_released(owner)}

    def is_released(self, owner: Owner) -> bool:
        """Whether that owner's memory was seen without the page since."""
        hva = owner.hva
        return hva is not None and (owner.vm, hva // self.page * self.page) in self.released

    def release(self, vm: int, hva: int) -> bool:
        """The page is not there any more; False if it is not known to have been."""
        if not any(
            owner.vm == vm and owner.hva is not None and owner.hva // self.page == hva // self.page
            for owner in self.owners.values()
        ):
            return False
        self.released.add((vm, hva // self.page * self.page))
        return True

    def poisoned_after_all(self, ts: int) -> None:
        """It was found marked while memory_failure, which reports last, was still at work on it."""
        self.before_start, self.poisoned_ts = False, ts
        self.moments.pop((EntryKind.FOUND,), None)

    def grow(self, size: int | None) -> None:
        """So many bytes are lost at least."""
        if size is not None and 0 < size <= MAX_SIZE and not size & (size - 1):
            self.size = max(self.size or 0, size)

    @property
    def huge(self) -> bool:
        return self.size is not None and self.size > self.page

    def covers_pfn(self, pfn: int) -> bool:
        """Whether the page with this number is lost in it."""
        if self.pfn is None:
            return False
        pages = max(1, (self.size or self.page) // self.page)
        return pfn // pages == self.pfn // pages

    def place_of_address(self, vm: int, hva: int, lsb: int | None) -> Owner | None:
        """The owner whose loss an address of that VM's process lies in.

        By the loss' own size, or by what the signal says if that is more: KVM's own signals say 12
        also where a huge page is lost.
        """
        said = 1 << lsb if lsb is not None and (1 << lsb) <= MAX_SIZE else 0
        size = max(self.size or self.page, said)
        for owner in self.owners.values():
            if owner.vm == vm and owner.hva is not None and owner.hva // size == hva // size:
                return owner
        return None

    def place_of_gfn(self, vm: int, gfn: int) -> Owner | None:
        """The owner at a gfn, or whose loss it lies in: a huge page is lost as a whole."""
        exact = self.owners.get((vm, gfn))
        if exact is not None or not self.huge:
            return exact
        for owner in self.owners.values():
            lost = lost_gfns(owner, self.size, self.page.bit_length() - 1)
            if owner.vm == vm and lost is not None and lost[0] <= gfn <= lost[1]:
                return owner
        return None

    # -- what happened

    def note(self, entry: TimelineEntry, *distinct: object) -> None:
        """Add to the timeline; one of the same kind and ``distinct`` facts counts once more."""
        key = (entry.kind, *distinct)
        known = self.moments.get(key)
        if known is not None:
            self.moments[key] = replace(
                known,
                ts=min(known.ts, entry.ts),
                last_ts=max(known.last_ts or known.ts, entry.ts),
                count=known.count + entry.count,
            )
        elif len(self.moments) < self.limits.moments or self._drop_minor(entry.kind):
            self.moments[key] = entry
        else:
            self.omitted += 1

    def _drop_minor(self, kind: EntryKind) -> bool:
        """Make room for what matters, by the last of those entries that may be many."""
        if kind in _MINOR:
            return False
        minor = next((known for known in reversed(self.moments) if known[0] in _MINOR), None)
        if minor is None:
            return False
        del self.moments[minor]
        self.omitted += 1
        return True

    def own(self, owner: Owner) -> bool:
        """Take an owner; False if there is no room for more.

        A place is learnt by halves, its gfn by a fault and its address by a page table: what does
        not contradict what is known of the VM's only place is the rest of that.
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
                self.lose("owners", 1)
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
        signals: Mapping[str, int] | None = None,
        page: int | None = None,
    ) -> bool:
        """A VMM was notified; True if for the first time. ``page``: of a huge one (gfn or hva)."""
        first = self.heard(ts)
        told = self.told.get((vm, vcpu))
        if told is None:
            if len(self.told) >= self.limits.told:
                self.lose("told", 1)
                return first
            told = self.told[vm, vcpu] = _Delivery(first_ts=ts, last_ts=ts)
        told.first_ts, told.last_ts = min(told.first_ts, ts), max(told.last_ts, ts)
        told.exits += exits
        page = page if self.huge else None
        count = exits + sum((signals or {}).values())
        told.pages.renew(page, told.pages.get(page, 0) + count)
        for code, count in (signals or {}).items():
            if code not in told.sigbus and len(told.sigbus) >= _CODES_KEPT:
                code = "other"  # noqa: PLW2901 (there are two; the rest is damage)
            told.sigbus[code] = told.sigbus.get(code, 0) + count
        # What was seen before is no answer to this.
        for key in [k for k, seen in self.looks.items() if k[0] == vm and seen[-1].vcpu == vcpu]:
            self.looks[key] = [look for look in self.looks[key] if look.ts > told.last_ts]
            if not self.looks[key]:
                del self.looks[key]
        return first

    def heard(self, ts: int) -> bool:
        """A VMM was notified; True if for the first time."""
        first = self.first_delivery_ts is None
        self.first_delivery_ts = ts if first else min(self.first_delivery_ts or ts, ts)
        self.last_delivery_ts = max(self.last_delivery_ts or ts, ts)
        return first

    def look(self, event: VcpuState) -> bool:
        """How a vCPU was found; True if it is one that was notified."""
        told = self.told.get((event.vm, event.vcpu))
        if told is None or event.ts <= told.last_ts:
            return False
        seen = self.looks.get((event.vm, event.tid))
        if seen is None:
            if len(self.looks) >= self.limits.told:
                self.lose("looks", 1)
                return False
            seen = self.looks[event.vm, event.tid] = []
        seen.append(VcpuSample(event.ts, event.tid, event.vcpu, event.state, event.ran_ns))
        if len(seen) > _LOOKS_KEPT:
            # The time it ran is the sum over all of them.
            oldest, second = seen[0], seen[1]
            ran = [x.ran_ns for x in (oldest, second) if x.ran_ns is not None]
            seen[:2] = [replace(second, ran_ns=sum(ran) if ran else None)]
        return True

    def came_from(self, errors: ErrorSite) -> bool:
        """A place that hardware reported holds the page; True if that is new."""
        if any(errors is known for known in self.places) or len(self.places) >= _PLACES_KEPT:
            return False
        self.places.append(errors)
        return True

    @property
    def failed_in_use(self) -> bool:
        """Hardware reported an error in use: the thread that was notified had used the page.

        A thread that poisons a page of its own (madvise) gets the very same signal.
        """
        return any(e.facts.get("severity") in ("recoverable", "fatal") for e in self.places)

    # -- out

    def tellings(self, vm: int | None = None) -> tuple[Notification, ...]:
        """How often each vCPU was notified; of one VM or of all."""
        return tuple(
            Notification(
                of,
                vcpu,
                told.exits,
                dict(told.sigbus),
                told.first_ts,
                told.last_ts,
                max(told.pages.values(), default=None),
            )
            for (of, vcpu), told in self.told.items()
            if vm in (None, of)
        )

    def state(self, now: int, parties: Mapping[int, VmIdentity]) -> IncidentStatus:
        """How far it is. A loop that has ended is ``delivered``; its verdict remembers it."""
        if self.over:
            return IncidentStatus.CLOSED
        gone = {key for key, party in parties.items() if party.gone_ts is not None}
        if any(loops_now(one, now) for one in self.tellings() if one.vm not in gone):
            return IncidentStatus.LOOPING
        if self.first_delivery_ts is not None:
            return IncidentStatus.DELIVERED
        return IncidentStatus.LATENT if self.holders else IncidentStatus.UNOWNED

    def settled(self, now: int, parties: dict[int, VmIdentity]) -> bool:
        """Every VM that owns the page was notified of it and handled it."""
        words = {verdict.vm: verdict.word for verdict in self.verdicts(now, parties)}
        return all(words.get(vm) in _SETTLED for vm in self.holders | words.keys())

    def verdicts(self, now: int, parties: dict[int, VmIdentity]) -> tuple[Verdict, ...]:
        """One for each VM that was notified."""
        found = []
        for vm in dict.fromkeys(vm for vm, _ in self.told):
            party = parties.get(vm)
            looks = [look for (of, _), seen in self.looks.items() if of == vm for look in seen]
            found.append(
                judge(
                    Evidence(
                        vm,
                        now,
                        self.tellings(vm),
                        tuple(looks),
                        party.gone_ts if party else None,
                        tuple(sorted(hva for of, hva in self.released if of == vm)),
                    )
                )
            )
        return tuple(found)

    def frozen(
        self, now: int, parties: dict[int, VmIdentity], origin: Origin | None, undelivered: int
    ) -> Incident:
        """As views see it."""
        return Incident(
            id=self.id,
            state=self.state(now, parties),
            pfn=self.pfn,
            page_type=self.page_type,
            result=self.result,
            page_class=self.page_class,
            poisoned_ts=self.poisoned_ts,
            owners=tuple(self.owners.values()),
            released=tuple(o for o in self.owners.values() if self.is_released(o)),
            exits=self.exits,
            sigbus=self.sigbus,
            sigbus_at_poison=self.sigbus_at_poison,
            sigbus_to_others=self.sigbus_to_others,
            first_delivery_ts=self.first_delivery_ts,
            last_delivery_ts=self.last_delivery_ts,
            undelivered=undelivered,
            before_start=self.before_start,
            unpoisoned_ts=self.unpoisoned_ts,
            size=self.size,
            origin=origin,
            parties=parties,
            told=self.tellings(),
            verdicts=self.verdicts(now, parties),
            timeline=self._timeline(),
            omitted=self.omitted,
            page_shift=self.page.bit_length() - 1,
            guest_memfd=self.guest_memfd,
        )

    def _timeline(self) -> tuple[TimelineEntry, ...]:
        reported = [moment for errors in self.places for moment in errors.moments.values()]
        return tuple(sorted([*self.moments.values(), *reported], key=lambda moment: moment.ts))


def _agree(one: int | None, other: int | None) -> bool:
    return one is None or other is None or one == other
