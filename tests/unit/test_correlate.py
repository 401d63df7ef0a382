"""Stories as kernels reported them (7.3.4 and 6.18, guest_memfd and HVA-backed), and their ends.

Properties over arbitrary orders are in tests/property/test_correlate.py.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable

import pytest

from kvmtrace.correlate import Correlator, cause_of
from kvmtrace.correlate.limits import Limits
from kvmtrace.correlate.pending import JOIN_NS
from kvmtrace.correlate.verdicts import LOOPING_AFTER
from kvmtrace.events import (
    Event,
    Exit,
    Found,
    GmemPoison,
    GmemRefusal,
    Lost,
    Owned,
    Owner,
    Poison,
    Sigbus,
    Tick,
    Unpoison,
    VmGone,
    VmSeen,
)
from kvmtrace.model import CorrelatedEvent, Incident, Snapshot

T0 = 1_790_000_000_000_000_000
MS = 1_000_000
HVA = 0x7F3A00008000
PFN = 0x103275
VMM, VCPU, OTHER = 4001, 4002, 5001  # thread ids


def seen(vm: int, ts: int = T0) -> VmSeen:
    return VmSeen(ts, vm, 4000 + vm, f"vm-{vm}")


def hwpoison(ts: int, vm: int = 1, gfn: int | None = 8, vcpu: int = 0, count: int = 1) -> Exit:
    return Exit(
        ts, vm, vcpu, 133, 39, True, VCPU, 0, 0x8000, 4096, gfn, False, gmem=133, count=count
    )


def poison(ts: int, pfn: int = PFN, tid: int | None = VMM) -> Poison:
    return Poison(ts, pfn, "dirty unevictable LRU page", "Failed", 11, 1, tid)


def gmem(ts: int, *owners: Owner, tid: int = VMM) -> GmemPoison:
    return GmemPoison(ts, tid, 383, 8, owners)


def tell(*events: Event, limits: Limits = Limits()) -> tuple[Snapshot, list[CorrelatedEvent]]:  # noqa: B008
    correlator = Correlator(limits)
    told = [correlator.feed(event) for event in events]
    return correlator.snapshot(), told


def only(snapshot: Snapshot) -> Incident:
    (incident,) = snapshot.incidents
    return incident


# -- causes


def fault(errno: int = 14, flags: int | None = 0, **fields: object) -> Exit:
    facts: dict[str, object] = {"tid": VCPU, "gpa": 0x8000, "size": 4096, "gfn": 8}
    return Exit(T0, 1, 0, errno, 39, True, flags=flags, **(facts | fields))  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("exit_", "cause"),
    [
        (fault(flags=1 << 4, gmem=14), "userfault"),
        (fault(flags=1 << 4, gmem=0), "userfault"),
        (fault(flags=1 << 4), "userfault"),  # no probe watched guest_memfd
        (fault(flags=3 << 3, gmem=0), "userfault"),  # and private
        (fault(flags=1 << 5, gmem=0), "other"),
        (fault(flags=1 << 40, gmem=14), "other"),
        (fault(flags=1 << 3, gmem=0), "conversion"),
        (fault(flags=None, gmem=0), "conversion"),  # only a count has it
        (fault(flags=None, gmem=12), "backing"),
        (fault(133, flags=1 << 4), "hwpoison"),
        (fault(133, flags=1 << 40), "hwpoison"),
        (fault(0, gmem=133), "hwpoison"),  # arm64, nested
        (fault(0, gmem=14), "other"),
        (fault(0), "other"),
    ],
)
def test_causes_by_errno_and_flags(exit_: Exit, cause: str) -> None:
    snapshot, told = tell(seen(1), exit_)
    assert told[-1].cause == cause_of(exit_) == cause
    assert (len(snapshot.incidents) == 1) == (cause == "hwpoison")
    assert snapshot.vms[1].exits_by_cause() == {cause: 1}


@pytest.mark.parametrize("gmem", [133, None])
def test_what_a_nested_fault_told_is_not_undelivered(gmem: int | None) -> None:
    """arm64 returns 0 for EHWPOISON of a guest_memfd slot (kvm_handle_vncr_abort)."""
    snapshot, _ = tell(seen(1), GmemRefusal(T0, 1, 8), fault(0, gmem=gmem), Tick(T0 + 60_000 * MS))
    assert snapshot.vms[1].undelivered == 0
    assert snapshot.vms[1].exits_by_errno() == {"MEMORY_FAULT": 1}


# -- guest_memfd


def test_guest_memfd_story() -> None:
    snapshot, told = tell(
        seen(1),
        Sigbus(T0 + MS, 4001, VMM, 4, HVA, 12, sender=VMM, vm=1),  # madvise hits its caller
        gmem(T0 + 2 * MS, Owner(1, 8, HVA)),
        poison(T0 + 3 * MS),
        hwpoison(T0 + 53 * MS),
    )
    incident = only(snapshot)
    assert incident.pfn == PFN
    assert incident.owners == (Owner(1, 8, HVA),)
    assert incident.state == "delivered"
    assert (incident.exits, incident.sigbus, incident.sigbus_at_poison) == (1, 0, 1)
    assert incident.poisoned_ts == T0 + 3 * MS
    assert incident.first_delivery_ts == T0 + 53 * MS
    assert snapshot.latency.sum_seconds == pytest.approx(0.05)
    assert told[-1].cause == "hwpoison"
    assert told[-1].incident == told[-2].incident == incident.id
    assert [(o.gfn, s.name) for o, s in told[-2].owners if s] == [(8, "vm-1")]
    assert snapshot.vms[1].exits == {("EHWPOISON", "hwpoison"): 1}
    assert snapshot.vms[1].poisoned_pages == 1


def test_latent_until_the_guest_touches_it() -> None:
    snapshot, _ = tell(seen(1), gmem(T0, Owner(1, 8)), poison(T0 + MS))
    assert only(snapshot).state == "latent"


def test_exit_that_overtook_its_poison_is_joined() -> None:
    snapshot, told = tell(
        seen(1), hwpoison(T0 + 5 * MS), gmem(T0 + 2 * MS, Owner(1, 8)), poison(T0 + 3 * MS)
    )
    assert only(snapshot).pfn == PFN
    assert told[1].incident == told[3].incident


def test_poison_nobody_saw_still_opens_an_incident() -> None:
    snapshot, _ = tell(seen(1), hwpoison(T0))
    incident = only(snapshot)
    assert (incident.pfn, incident.poisoned_ts, incident.state) == (None, None, "delivered")
    assert sum(snapshot.latency.counts) == 0


def test_poison_without_owner() -> None:
    assert only(tell(poison(T0))[0]).state == "unowned"


@pytest.mark.parametrize(
    "half",
    [
        gmem(T0, Owner(1, 8), tid=OTHER),  # another thread's
        gmem(T0 - JOIN_NS - 1, Owner(1, 8)),  # its own poison was lost long ago
        gmem(T0 + 1, Owner(1, 8)),  # from the future
    ],
)
def test_same_thread_join_is_not_stretched(half: GmemPoison) -> None:
    assert only(tell(seen(1), half, poison(T0))[0]).owners == ()


def test_a_half_is_used_once() -> None:
    snapshot, _ = tell(seen(1), gmem(T0, Owner(1, 8)), poison(T0), poison(T0 + 1, PFN + 1))
    assert [i.owners for i in snapshot.incidents] == [(Owner(1, 8),), ()]


def test_one_page_of_two_vms() -> None:
    snapshot, told = tell(
        seen(1),
        seen(2),
        gmem(T0, Owner(1, 8), Owner(2, 16)),
        poison(T0),
        hwpoison(T0 + MS, vm=2, gfn=16),
        hwpoison(T0 + MS, vm=1, gfn=8),
    )
    assert only(snapshot).exits == 2
    assert told[-1].incident == told[-2].incident


def test_same_gfn_of_other_vms_is_another_incident() -> None:
    snapshot, told = tell(
        seen(1), seen(2), gmem(T0, Owner(1, 8)), poison(T0), hwpoison(T0 + MS, vm=2, gfn=8)
    )
    assert told[-1].incident != told[-2].incident
    assert {i.state for i in snapshot.incidents} == {"latent", "delivered"}


def test_poisoned_again_is_the_same_incident() -> None:
    snapshot, told = tell(seen(1), gmem(T0, Owner(1, 8)), poison(T0), poison(T0 + MS))
    assert told[-1].incident == told[-2].incident
    assert only(snapshot).poisoned_ts == T0
    assert snapshot.poisons == {("dirty unevictable LRU page", "Failed"): 2}


# -- HVA-backed memory


def test_hva_story() -> None:
    snapshot, told = tell(
        seen(1),
        poison(T0, tid=OTHER),
        Owned(T0 + MS, PFN, Owner(1, None, HVA), "pagemap"),
        Sigbus(T0 + 9 * MS, 4001, VCPU, 4, HVA + 0x10, 12, VCPU, vm=1, vcpu=0, gfn=8),
    )
    incident = only(snapshot)
    assert incident.state == "delivered"
    assert incident.sigbus == 1
    assert incident.owners == (Owner(1, 8, HVA),)
    assert told[-1].incident == incident.id
    assert snapshot.vms[1].sigbus == {"AR": 1}


def test_hva_of_the_same_page_in_another_process_is_not_it() -> None:
    _, told = tell(
        seen(1),
        seen(2),
        poison(T0, tid=OTHER),
        Owned(T0, PFN, Owner(1, None, HVA), "pagemap"),
        Sigbus(T0 + MS, 4002, OTHER, 4, HVA, 12, OTHER, vm=2, vcpu=0, gfn=8),
        Sigbus(T0 + MS, 4001, VCPU, 4, HVA + 4096, 12, VCPU, vm=1),
    )
    assert [one.incident for one in told[-2:]] == [None, None]


def test_owner_found_before_its_poison() -> None:
    snapshot, _ = tell(seen(1), Owned(T0, PFN, Owner(1, 8, HVA), "pagemap"), poison(T0 + MS))
    assert only(snapshot).owners == (Owner(1, 8, HVA),)


@pytest.mark.parametrize("lost", [poison, lambda ts: Found(ts, PFN)])
def test_an_owner_of_long_ago_is_none(lost: Callable[[int], Event]) -> None:
    """Its poison was missed, or there was none; somebody else may have the page by now."""
    owned = Owned(T0, PFN, Owner(1, 8, HVA), "pagemap")
    assert only(tell(seen(1), owned, lost(T0 + JOIN_NS))[0]).owners == (Owner(1, 8, HVA),)
    assert only(tell(seen(1), owned, lost(T0 + JOIN_NS + 1))[0]).owners == ()


def test_an_owner_found_a_moment_after_its_page_is_its_owner() -> None:
    """Though it comes before it: pages are looked up when they were found."""
    owned = Owned(T0 + MS, PFN, Owner(1, 8, HVA), "pagemap")
    assert only(tell(seen(1), owned, Found(T0, PFN))[0]).owners == (Owner(1, 8, HVA),)


def test_what_waits_for_a_page_is_not_about_it_once_it_is_unpoisoned() -> None:
    owned = Owned(T0, PFN, Owner(1, 8, HVA), "pagemap")
    signal = Sigbus(T0, 4001, VCPU, 5, HVA, 12, OTHER, vm=1, pfn=PFN)
    snapshot, _ = tell(seen(1), owned, signal, Unpoison(T0 + MS, PFN), poison(T0 + 2 * MS))
    assert (only(snapshot).owners, only(snapshot).sigbus) == ((), 0)


def test_an_owner_found_late_is_told_once() -> None:
    late = Owned(T0 + MS, PFN, Owner(1, None, HVA), "pagemap")
    better = Owned(T0 + 9 * MS, PFN, Owner(1, 8, HVA), "fault")
    told = tell(seen(1), poison(T0), late, late, better, late)[1]
    found = [[owner for owner, _ in one.owners] for one in told[2:]]
    assert found == [[late.owner], [], [better.owner], []]
    assert told[2].vm is not None


def test_signal_by_pfn() -> None:
    snapshot, _ = tell(
        seen(1), poison(T0), Sigbus(T0 + MS, 4001, VCPU, 5, HVA, 12, OTHER, vm=1, pfn=PFN)
    )
    assert only(snapshot).sigbus == 1
    assert snapshot.vms[1].sigbus == {"AO": 1}


def test_ignored_signals_are_looping() -> None:
    signals = [
        Sigbus(T0 + n * MS, 4001, VCPU, 4, HVA, 12, VCPU, vm=1, vcpu=0, gfn=8, pfn=PFN)
        for n in range(1, LOOPING_AFTER + 1)
    ]
    assert only(tell(seen(1), poison(T0), *signals[:-1])[0]).state == "delivered"
    assert only(tell(seen(1), poison(T0), *signals)[0]).state == "looping"


# -- causes


@pytest.mark.parametrize(
    ("errno", "annotated", "gmem_errno", "cause"),
    [
        (133, True, 133, "hwpoison"),
        (133, False, None, "hwpoison"),
        (14, True, 0, "conversion"),
        (14, True, 2, "backing"),
        (14, True, None, None),
        (14, False, 2, "unannotated"),
        (14, False, None, "unannotated"),
        (22, False, None, "other"),
        (9999, False, None, "other"),
    ],
)
def test_causes(errno: int, annotated: bool, gmem_errno: int | None, cause: str | None) -> None:
    event = Exit(T0, 1, 0, errno, 39 if annotated else 0, annotated, gmem=gmem_errno)
    assert cause_of(event) == cause


@pytest.mark.parametrize("errno", [14, 22])
def test_only_hwpoison_opens_incidents(errno: int) -> None:
    snapshot, told = tell(seen(1), Exit(T0, 1, 0, errno, 39, True, gfn=8, gmem=2))
    assert snapshot.incidents == ()
    assert told[-1].incident is None


# -- looping and ends


def test_looping_counts_to_the_last_one() -> None:
    snapshot, _ = tell(
        seen(1), gmem(T0, Owner(1, 8)), poison(T0), hwpoison(T0 + MS), hwpoison(T0, count=199_999)
    )
    assert only(snapshot).state == "looping"
    assert only(snapshot).exits == snapshot.vms[1].exits[("EHWPOISON", "hwpoison")] == 200_000


def test_every_vcpu_told_once_is_not_looping() -> None:
    exits = [hwpoison(T0 + MS, vcpu=vcpu) for vcpu in range(16)]
    assert only(tell(seen(1), gmem(T0, Owner(1, 8)), poison(T0), *exits)[0]).state == "delivered"


def test_closed_when_its_vm_is_gone() -> None:
    snapshot, _ = tell(
        seen(1), gmem(T0, Owner(1, 8)), poison(T0), hwpoison(T0 + MS), VmGone(T0 + 2 * MS, 1)
    )
    assert only(snapshot).state == "closed"
    assert snapshot.vms[1].gone
    assert snapshot.vms[1].poisoned_pages == 0


def test_not_closed_while_another_owner_lives() -> None:
    start = (seen(1), seen(2), gmem(T0, Owner(1, 8), Owner(2, 8)), poison(T0))
    assert only(tell(*start, VmGone(T0, 1))[0]).state == "latent"
    assert only(tell(*start, VmGone(T0, 1), VmGone(T0, 2))[0]).state == "closed"


def test_last_counts_read_after_the_end_open_nothing() -> None:
    snapshot, told = tell(
        seen(1),
        gmem(T0, Owner(1, 8)),
        poison(T0),
        hwpoison(T0 + MS),
        VmGone(T0 + 2 * MS, 1),
        hwpoison(T0 + MS, count=41),
        hwpoison(T0 + MS, gfn=9),
    )
    assert only(snapshot).state == "closed"
    assert only(snapshot).exits == 42
    assert told[-2].incident == only(snapshot).id
    assert told[-1].incident is None
    assert sum(snapshot.vms[1].exits.values()) == 43


def test_page_used_again_is_a_new_incident() -> None:
    snapshot, _ = tell(
        seen(1),
        gmem(T0, Owner(1, 8)),
        poison(T0),
        VmGone(T0, 1),
        seen(2),
        gmem(T0 + MS, Owner(2, 8)),
        poison(T0 + MS),
    )
    assert [(i.id, i.state) for i in snapshot.incidents] == [
        (f"{PFN:x}-1", "closed"),
        (f"{PFN:x}-2", "latent"),
    ]


def test_uneventful_vms_leave_nothing() -> None:
    births = [event for vm in range(1000) for event in (seen(vm), VmGone(T0, vm))]
    assert tell(*births)[0].vms == {}


def test_an_end_told_twice() -> None:
    snapshot, _ = tell(
        seen(1),
        gmem(T0, Owner(1, 8)),
        poison(T0),
        VmGone(T0, 1),
        poison(T0, PFN + 1),  # pushes the incident out
        VmGone(T0, 1),
        seen(2),
        hwpoison(T0, vm=2),
        VmGone(T0, 2),
        limits=Limits(incidents=1, gone_vms=1),
    )
    assert set(snapshot.vms) == {2}


# -- bounds


def test_signals_without_a_poison_do_not_pile_up() -> None:
    """A VMM that ignores SIGBUS, on a page poisoned before anyone looked."""
    correlator = Correlator()
    correlator.feed(seen(1))
    for n in range(10_000):
        correlator.feed(Sigbus(T0 + n, 4001, VCPU, 4, HVA, 12, VCPU, vm=1, vcpu=0, gfn=8))
    assert sum(map(len, correlator._pending._signals.values())) <= Limits().pending_each
    assert correlator.snapshot().vms[1].sigbus == {"AR": 10_000}


def test_forgotten_incidents_are_counted() -> None:
    more = Limits().incidents + 5
    snapshot, _ = tell(*(poison(T0 + n, 0x1000 + n, tid=None) for n in range(more)))
    assert len(snapshot.incidents) == Limits().incidents
    assert snapshot.lost == {"incidents": 5}


def test_closed_incidents_are_forgotten_first() -> None:
    filler: Iterable[Event] = [poison(T0, 0x1000 + n, tid=None) for n in range(Limits().incidents)]
    snapshot, _ = tell(
        poison(T0, 1), seen(1), gmem(T0, Owner(1, 8)), poison(T0, 2), VmGone(T0, 1), *filler
    )
    ids = [incident.id for incident in snapshot.incidents]
    assert "2-1" not in ids
    assert "1-1" not in ids
    snapshot, _ = tell(
        poison(T0, 1),
        seen(1),
        gmem(T0, Owner(1, 8)),
        poison(T0, 2),
        VmGone(T0, 1),
        *list(filler)[:-1],
    )
    assert "1-1" in [incident.id for incident in snapshot.incidents]


def test_ids_stay_unique_when_numbers_are_forgotten() -> None:
    log = [seen(1), seen(2), gmem(T0, Owner(1, 8)), hwpoison(T0)]
    for n in range(40):  # each closes at once, and so goes before the first
        vm = 100 + n
        log += [seen(vm), hwpoison(T0, vm=vm, gfn=0x100 + n), VmGone(T0, vm)]
    snapshot, told = tell(*log, hwpoison(T0, vm=2), limits=Limits(incidents=4))
    assert "g8-1" in [incident.id for incident in snapshot.incidents]
    assert told[-1].incident == "g8-2"


def test_lost_adds_up() -> None:
    snapshot, _ = tell(Lost(T0, "ringbuf", 3), Lost(T0, "ringbuf", 4), Lost(T0, "maps", 1))
    assert snapshot.lost == {"ringbuf": 7, "maps": 1}


def test_a_signal_event_may_stand_for_many() -> None:
    snapshot, _ = tell(
        seen(1),
        poison(T0),
        Sigbus(T0 + MS, 4001, VCPU, 4, HVA, 12, VCPU, vm=1, vcpu=0, pfn=PFN),
        Sigbus(T0 + 2 * MS, 4001, VCPU, 4, HVA, 12, VCPU, vm=1, vcpu=0, pfn=PFN, count=999),
    )
    assert only(snapshot).sigbus == 1000
    assert snapshot.vms[1].sigbus == {"AR": 1000}
    assert only(snapshot).notifications[0].sigbus == {"AR": 1000}


def test_a_synchronous_external_abort_is_a_delivery() -> None:
    """KVM_EXIT_ARM_SEA: Documentation/virt/kvm/api.rst; no lab machine can make one."""
    sea = Exit(T0 + MS, 1, 0, 0, 41, False, VCPU, gfn=8, count=2)
    snapshot, told = tell(seen(1), gmem(T0, Owner(1, 8)), poison(T0), sea)
    (incident,) = snapshot.incidents
    assert (incident.state, incident.exits) == ("delivered", 2)
    assert told[-1].cause == "hwpoison"
    assert snapshot.vms[1].exits == {("ARM_SEA", "hwpoison"): 2}
    # Reason 41 with an errno is another exit's leftover.
    assert cause_of(Exit(T0, 1, 0, 14, 41, False)) == "unannotated"
    assert cause_of(Exit(T0, 1, 0, 0, 6, False)) == "other"
