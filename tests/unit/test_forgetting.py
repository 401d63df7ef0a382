"""What is forgotten first where there is no room, and what outlives it."""

from __future__ import annotations

from collections.abc import Callable

import pytest

from kvmtrace.correlate import Correlator
from kvmtrace.correlate.limits import Limits
from kvmtrace.events import (
    Event,
    Exit,
    Found,
    GmemPoison,
    GmemRefusal,
    Owned,
    Owner,
    PageReplaced,
    Poison,
    Sigbus,
    Tick,
    Unpoison,
    VmGone,
)
from kvmtrace.events import VcpuState as Look
from kvmtrace.model import Snapshot
from kvmtrace.views.timeline import description
from tests.unit.test_correlate import HVA, T0, hwpoison, seen

S = 1_000_000_000
FOUR = Limits(incidents=4)


def poisoned(pfn: int, vm: int | None = None, ts: int = T0, how: str = "Recovered") -> list[Event]:
    owned = [] if vm is None else [Owned(ts, pfn, Owner(vm, pfn, HVA + (pfn << 12)), "pagemap")]
    return [*owned, Poison(ts, pfn, "dirty LRU page", how, tid=31)]


def kernel(pfn: int) -> Poison:
    return Poison(T0, pfn, "unknown page", "Ignored", tid=31)


def closed(pfn: int) -> list[Event]:
    return [*poisoned(pfn), Unpoison(T0, pfn)]


def settled(pfn: int, vm: int) -> list[Event]:
    """Its vCPU was notified once and ran on."""
    told = hwpoison(T0 + 1, vm, pfn)
    return [*poisoned(pfn, vm), told, Look(T0 + 9 * S, vm, 4002, "running", 0)]


def fed(limits: Limits, *events: Event) -> tuple[Snapshot, Correlator]:
    correlator = Correlator(limits)
    for event in events:
        correlator.feed(event)
    return correlator.snapshot(), correlator


def pfns(snapshot: Snapshot) -> set[int | None]:
    return {incident.pfn for incident in snapshot.incidents}


FLOODS: dict[str, Callable[[int], list[Event]]] = {
    "left by the kernel": lambda n: [kernel(n)],
    "free pages": lambda n: [Poison(T0, n, "free buddy page", "Recovered", tid=31)],
    "memory of processes": lambda n: [Poison(T0, n, "unsplit thp", "Failed", tid=31)],
    "from before the start": lambda n: [Found(T0, n)],
    "poisoned and mended": closed,
}


@pytest.mark.parametrize("flood", FLOODS.values(), ids=FLOODS)
def test_no_flood_of_pages_of_nobody_pushes_out_a_vms(
    flood: Callable[[int], list[Event]],
) -> None:
    """Thousands of "unknown page: Ignored" in a row (enarx/enarx#2263), while one VM loops."""
    latent = poisoned(0xABD, 1)
    story = [seen(1), *poisoned(0xABC, 1), *latent, *settled(0xABE, 1)]
    loops = [hwpoison(T0 + tenth * S // 10, 1, 0xABC, count=10) for tenth in range(50)]
    pages = [event for number in range(2000) for event in flood(0x100000 + number)]
    snapshot, _ = fed(Limits(), *story, *loops, *pages, hwpoison(T0 + 6 * S, 1, 0xABC, count=10))
    mine = [incident for incident in snapshot.incidents if incident.owners]
    assert [(i.pfn, i.exits) for i in mine] == [(0xABC, 510), (0xABD, 0), (0xABE, 1)]
    assert mine[0].state == "looping"
    assert snapshot.vms[1].poisoned_pages == 3


def test_the_order() -> None:
    """Closed, nobody's, the kernel's, settled; each the oldest first."""
    story = [seen(1), *settled(1, 1), kernel(2), *poisoned(3), *poisoned(4), *closed(5)]
    gone = []
    correlator = Correlator(Limits(incidents=5))
    for event in story:
        correlator.feed(event)
    for pfn in range(10, 15):
        before = pfns(correlator.snapshot())
        for event in poisoned(pfn, 1):
            correlator.feed(event)
        gone += sorted(before - pfns(correlator.snapshot()), key=str)
    assert gone == [5, 3, 4, 2, 1]


def test_of_several_vms_the_one_with_most_makes_room() -> None:
    story = [seen(1), seen(2), *poisoned(1, 2), *(e for n in range(10, 17) for e in poisoned(n, 1))]
    snapshot, _ = fed(FOUR, *story)
    assert pfns(snapshot) == {1, 14, 15, 16}


def test_a_new_page_of_nobody_makes_room_for_itself() -> None:
    story = [seen(1), *(e for n in range(1, 5) for e in poisoned(n, 1)), kernel(9)]
    snapshot, _ = fed(FOUR, *story)
    assert pfns(snapshot) == {1, 2, 3, 4}
    assert snapshot.kernel_pages == 1


def test_to_forget_what_is_over_is_no_loss() -> None:
    pages = [event for pfn in range(100) for event in closed(pfn)]
    assert fed(FOUR, *pages)[0].lost == {}
    assert fed(FOUR, *(Found(T0, pfn) for pfn in range(10)))[0].lost == {"incidents": 6}


def test_an_all_clear_is_never_made_by_forgetting() -> None:
    pages = [event for pfn in range(1, 11) for event in poisoned(pfn, 1)]
    snapshot, correlator = fed(FOUR, seen(1), *pages)
    vm = snapshot.vms[1]
    assert (vm.poisoned_pages, vm.forgotten_pages, len(snapshot.incidents)) == (10, 6, 4)
    # Reported again, it is counted once.
    correlator.feed(hwpoison(T0 + S, 1, 1))
    assert correlator.snapshot().vms[1].poisoned_pages == 10
    correlator.feed(Unpoison(T0 + S, 3))
    correlator.feed(PageReplaced(T0 + S, 1, 4, HVA + (4 << 12)))
    assert correlator.snapshot().vms[1].poisoned_pages == 8
    correlator.feed(VmGone(T0 + 2 * S, 1))
    correlator.feed(Tick(T0 + 3 * S))
    assert correlator.snapshot().vms[1].poisoned_pages == 0


def test_the_newest_of_a_vm_is_known_while_it_is_told() -> None:
    correlator = Correlator(FOUR)
    correlator.feed(seen(1))
    for gfn in range(100):
        told = correlator.feed(Exit(T0 + gfn, 1, 0, 133, 39, True, gfn=gfn))
        assert told.incident in {i.id for i in correlator.snapshot().incidents}


# -- within an incident


def test_vms_that_are_gone_make_room_for_owners_that_live() -> None:
    """A page of an image that VMs share, as they come and go."""
    story: list[Event] = [Poison(T0, 5, "clean LRU page", "Failed", tid=31)]
    for vm in range(1, 200):
        place = Owned(T0 + vm, 5, Owner(vm, 8, HVA), "mapping")
        story += [seen(vm), place, *([VmGone(T0 + vm, vm)] if 1 < vm < 190 else [])]
    (incident,) = fed(Limits(), *story)[0].incidents
    assert {owner.vm for owner in incident.owners} >= {1, *range(190, 200)}
    assert len(incident.owners) == 64
    assert incident.state == "latent"
    assert fed(Limits(), *story)[0].lost == {}


def test_many_entries_of_one_sort_leave_room_for_what_matters() -> None:
    many = [Owned(T0, 5, Owner(1, gfn, HVA + (gfn << 12)), "pagemap") for gfn in range(200)]
    poison = Poison(T0, 5, "dirty LRU page", "Failed", tid=31)
    told = hwpoison(T0 + S, 1, 3)
    snapshot, _ = fed(Limits(), seen(1), poison, *many, told, VmGone(T0 + 2 * S, 1))
    (incident,) = snapshot.incidents
    assert len(incident.timeline) == 64
    whats = [description(entry) for entry in incident.timeline]
    assert "the VM is gone" in whats
    assert any(what.startswith("KVM_RUN on vCPU 0: EHWPOISON") for what in whats)
    assert incident.omitted == 139


# -- what is of no known VM is lost, and what is reported late is counted


def test_what_is_read_after_the_end_of_a_quiet_vm_is_counted() -> None:
    signal = Sigbus(T0 + 2 * S, 4001, 4002, 4, HVA, 12, sender=4002, vm=1, count=50)
    exits = Exit(T0 + 2 * S, 1, 0, 14, 39, True, gfn=5, gmem=0, count=1000)
    snapshot, _ = fed(Limits(), seen(1), VmGone(T0 + S, 1), exits, signal, GmemRefusal(T0, 1, 5, 7))
    vm = snapshot.vms[1]
    assert (vm.gone, vm.name, vm.exits_by_cause()) == (True, "vm-1", {"conversion": 1000})
    assert vm.sigbus == {"AR": 50}
    assert snapshot.lost == {}


def test_what_is_told_of_a_vm_that_nobody_introduced_is_lost() -> None:
    signal = Sigbus(T0, 4001, 4002, 4, HVA, 12, sender=4002, vm=9, count=50)
    exits = Exit(T0, 9, 0, 14, 39, True, gfn=5, count=1000)
    snapshot, _ = fed(Limits(), exits, signal, GmemRefusal(T0, 9, 5, 7))
    assert snapshot.lost == {"unknown_vms": 1057}
    plain = Sigbus(T0, 168, 168, 4, HVA, 12, sender=168)  # a process without VMs
    assert fed(Limits(), plain)[0].lost == {}


def test_halves_that_give_way_while_they_may_be_wanted_are_lost() -> None:
    halves = [GmemPoison(T0 + tid, tid, 7, 1, (Owner(1, tid),)) for tid in range(1, 1030)]
    assert fed(Limits(), *halves)[0].lost == {"halves": 5}
    stale = [GmemPoison(T0 + tid * 6 * S, tid, 7, 1) for tid in range(1, 1030)]
    assert fed(Limits(pending=1), *stale)[0].lost == {}


# -- a huge page is lost as a whole

HUGE = 2 << 20


def huge(vm: int = 1, gfn: int = 0x1010, size: int = HUGE) -> list[Event]:
    """The poisoned page is the 17th of a huge one, whose first is gfn 0x1000."""
    hva = 0x7F0000000000 + ((gfn - 0x1000) << 12)
    return [
        seen(vm),
        Owned(T0, 0x80010, Owner(vm, gfn, hva), "pagemap", size),
        Poison(T0, 0x80010, "huge page", "Failed", tid=5),
    ]


@pytest.mark.parametrize("pages", [512, 1 << 18])
def test_all_gfns_of_one_loss_are_one_incident(pages: int) -> None:
    other = poisoned(0x55, 2)
    touches = [hwpoison(T0 + n, 1, 0x1000 + n, vcpu=n % 4) for n in range(0, pages, pages // 512)]
    refusals = [GmemRefusal(T0 + n, 1, 0x1000 + n) for n in range(0, pages, pages // 512)]
    story = [seen(2), *other, *huge(size=pages << 12), *refusals, *touches]
    snapshot, correlator = fed(Limits(), *story)
    assert [(i.pfn, i.exits) for i in snapshot.incidents] == [(0x55, 0), (0x80010, 512)]
    assert snapshot.vms[1].poisoned_pages == snapshot.vms[2].poisoned_pages == 1
    assert snapshot.lost == {}
    (mine,) = [i for i in snapshot.incidents if i.pfn == 0x80010]
    assert [owner.gfn for owner in mine.owners] == [0x1010]
    assert sum(t.exits for t in mine.notifications) == 512
    # Each page once: its guest goes through it, and no VMM goes back to the same page.
    assert (mine.state, mine.verdict) == ("delivered", "unknown")
    correlator.feed(Tick(T0 + 60 * S))
    assert correlator.snapshot().vms[1].undelivered == 0


@pytest.mark.parametrize(("vm", "gfn"), [(1, 0xFFF), (1, 0x1200), (2, 0x1010)])
def test_what_is_outside_of_the_loss_is_another_page(vm: int, gfn: int) -> None:
    snapshot, _ = fed(Limits(), seen(2), *huge(), hwpoison(T0 + 1, vm, gfn))
    assert [incident.exits for incident in snapshot.incidents] == [0, 1]


def test_one_page_of_a_huge_one_again_and_again_is_a_loop() -> None:
    touches = [hwpoison(T0 + n, 1, 0x1000 + n) for n in range(100)]
    loop = [hwpoison(T0 + S + n, 1, 0x1005) for n in range(10)]
    (incident,) = fed(Limits(), *huge(), *touches, *loop)[0].incidents
    assert (incident.state, incident.exits) == ("looping", 110)
