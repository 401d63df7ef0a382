"""The backlog that a client of a serve gets."""

from __future__ import annotations

import pytest
from hypothesis import given, settings

from kvmtrace.correlate import Correlator
from kvmtrace.events import (
    Event,
    Exit,
    Found,
    GmemPage,
    GmemRefusal,
    HwError,
    Lost,
    Owned,
    Owner,
    Poison,
    Sigbus,
    SoftOffline,
    Tick,
    Unpoison,
    VcpuState,
    VmGone,
    VmSeen,
)
from kvmtrace.model import Snapshot
from kvmtrace.session.history import MAX_FORGOTTEN, CompactLog
from tests.property.test_correlate import LOGS
from tests.unit.fake import SECOND, T0, machine_check
from tests.unit.test_explain import STORY


def model(events: list[Event]) -> Snapshot:
    correlator = Correlator()
    for event in events:
        correlator.feed(event)
    return correlator.snapshot()


def log_of(events: list[Event], limit: int = 1000) -> list[Event]:
    log = CompactLog(limit)
    for event in events:
        log.add(event)
    return log.events()


def test_the_same_story_later() -> None:
    assert model(log_of(list(STORY))).incidents == model(list(STORY)).incidents


def test_a_storm_is_a_few_events_and_exact() -> None:
    storm: list[Event] = [VmSeen(T0, 1, 4001, "mad")]
    storm += [Exit(T0 + n, 1, 0, 133, 39, True, 7, gfn=8, count=3) for n in range(10_000)]
    storm += [Exit(T0, 1, 0, 14, 39, True, 7, gpa=n << 12, gfn=n, gmem=0) for n in range(10_000)]
    log = log_of(storm)
    assert len(log) < 400  # up to a quarter of the limit is kept as it came
    assert model(log).vms[1].exits == model(storm).vms[1].exits


def test_bounded_and_what_went_is_said() -> None:
    many: list[Event] = [Sigbus(T0 + n, 4001, n, 4, 0x7F0000000000, sender=n) for n in range(1000)]
    log = log_of(many, limit=100)
    kept = sum(event.kind == "sigbus" for event in log)
    assert 50 <= kept <= 100
    assert model(log).lost == {"history": 1000 - kept}


def test_a_long_loop_does_not_push_its_poison_out() -> None:
    storm: list[Event] = list(STORY)
    for n in range(20_000):
        at = T0 + 20 * SECOND + n * SECOND
        storm.append(VcpuState(at, 1, 78, "running", 0, 5))
        storm.append(Sigbus(at, 4001, 78, 4, 0x7F0000008000, 12, 78, vm=1, vcpu=0, gfn=8))
    (incident,) = model(log_of(storm, limit=200)).incidents
    assert incident.pfn == 0x103275
    assert incident.state == "looping"


def test_uneventful_vms_leave_nothing_once_others_ended() -> None:
    """Until then their last counts may come: who reads them must know that the VM has ended."""
    first: list[Event] = [VmSeen(T0, 1, 4001), VmGone(T0, 1)]
    assert log_of(first) == first
    others: list[Event] = [
        event
        for n in range(2, MAX_FORGOTTEN + 2)
        for event in (VmSeen(T0 + n, n, n), VmGone(T0 + n, n))
    ]
    assert log_of([*first, *others]) == others


def test_vms_of_many_processes_are_bounded() -> None:
    """No kernel has them. Signals to each process belong to the VM, so each is kept for a while."""
    log = CompactLog(100)
    for vm in range(20):
        for process in range(50):
            log.add(VmSeen(T0, vm, 10_000 + 50 * vm + process))
        log.add(VmGone(T0, vm))
    assert len(log.events()) <= 101
    assert log.dropped == 20 * 51 - (len(log.events()) - 1)


def test_last_counts_that_come_after_a_joiner_open_no_incident_there_either() -> None:
    story: list[Event] = [VmSeen(T0, 1, 4001, "mad"), VmGone(T0 + 1, 1)]
    late = Exit(T0 + 2, 1, 0, 133, 39, True, 7, gfn=8, count=3)
    assert model([*log_of(story), late]) == model([*story, late])
    assert model([*log_of(story), late]).incidents == ()


def test_what_is_told_of_a_vm_after_its_end_is_told_with_its_vm() -> None:
    """By ftrace the last counts of a VM are read after its end."""
    late = Exit(T0 + 2, 1, 0, 133, 39, True, 7, gfn=8, count=3)
    story: list[Event] = [VmSeen(T0, 1, 4001, "mad"), VmGone(T0 + 1, 1), late]
    assert log_of(story) == story
    assert model(log_of(story)) == model(story)
    many: list[Event] = [VmSeen(T0, n, n) for n in range(1, 2000)]
    many += [VmGone(T0 + 1, n) for n in range(1, 2000)]
    kept = log_of([*many, late])
    assert kept[-1] == late
    # Of so many, the first is forgotten for good.
    assert not [event for event in kept if isinstance(event, (VmSeen, VmGone)) and event.vm == 1]


def test_of_many_vms_that_were_notified_the_latest_are_remembered() -> None:
    log = CompactLog(1000)
    for n in range(10_000):
        log.add(VmSeen(T0, n, n))
        log.add(GmemRefusal(T0, n, 8))
        log.add(VmGone(T0 + 1, n))
    kept = log.events()
    seen = [event.vm for event in kept if isinstance(event, VmSeen)]
    assert 200 < len(seen) < 400
    assert seen == list(range(seen[0], 10_000))
    assert {e.vm for e in kept if isinstance(e, VmGone)} == set(seen)  # or they would live for ever
    assert kept[-1].kind == "lost"


def test_signals_and_machine_checks_are_counted() -> None:
    """All of them: `top` through a serve and /metrics show the same counts."""
    hva, pfn = 0x7F0000008000, 0x103275
    story: list[Event] = [VmSeen(T0, 1, 4001, "web-1")]
    for n in range(1000):
        story.append(machine_check(T0 + n, pfn << 12, pfn, 4, 0, 0, 0x9C00000000080A13 + n % 7))
    story.append(Poison(T0 + SECOND, pfn, "dirty LRU page", "Recovered", tid=7))
    for n in range(1000):
        at = T0 + 2 * SECOND + n * SECOND
        story.append(Sigbus(at, 4001, 78, 4, hva + n, 12, 78, 1, 0, 8, pfn, count=3))
    log = log_of(story, limit=100)
    assert len(log) < 100
    assert model(log).vms[1].sigbus == {"AR": 3000}
    (incident,) = model(log).incidents
    assert (incident.sigbus, incident.state) == (3000, "looping")
    assert incident.origin is not None
    assert (incident.origin.history.count, incident.origin.history.corrected) == (1000, 1000)


def test_one_error_that_many_cpus_ran_into_stays_one() -> None:
    pfn = 0x103275
    checks: list[Event] = [
        machine_check(
            T0 + n, pfn << 12, pfn, 1, n, n % 2, 0xBD80000000100134, 0x86, 1, "GenuineIntel"
        )
        for n in range(8)
    ]
    (poisoned,) = model([*log_of(checks), Poison(T0 + SECOND, pfn, "", "Failed")]).incidents
    assert poisoned.origin is not None
    assert poisoned.origin.history.count == 1


def test_errors_of_another_sort_are_not_added_up() -> None:
    pfn = 0x103275
    checks: list[Event] = [
        machine_check(T0 + n, pfn << 12, pfn, 4, 0, 0, status)
        for n, status in enumerate(4 * [0x9C00000000080A13, 0xBD80000000100134])
    ]
    (poisoned,) = model([*log_of(checks), Poison(T0 + SECOND, pfn, "", "Failed")]).incidents
    assert poisoned.origin is not None
    assert (poisoned.origin.history.count, poisoned.origin.history.corrected) == (8, 4)


def test_what_is_told_of_another_page_at_the_same_place_is_not_added_up() -> None:
    """A page is unpoisoned, and another one poisoned where it was."""
    story: list[Event] = [VmSeen(T0, 1, 4001, "web-1")]
    for n, pfn in enumerate((0x1000, 0x2000)):
        at = T0 + n * 100 * SECOND
        page = GmemPage(1, 8, (Owner(1, 8),))
        story.append(Poison(at + 1, pfn, "", "Failed", tid=7, gmem=page))
        for k in range(10):
            told = at + (k + 1) * SECOND
            story.append(Exit(told, 1, 0, 133, 39, True, 7, gfn=8, gmem=133))
        story.append(Unpoison(at + 50 * SECOND, pfn))
    later = model(log_of(story)).incidents
    assert [incident.exits for incident in later] == [10, 10]
    assert later == model(story).incidents


def test_refusals_that_were_told_later_are_not_undelivered() -> None:
    """Sums stand where the last came: between them and the exits that delivered is not a storm."""
    story: list[Event] = [VmSeen(T0, 1, 4001, "web-1"), VmSeen(T0, 2, 4002, "db-1")]
    for n in range(100):
        at = T0 + n * 60 * SECOND
        story.append(GmemRefusal(at, 1, 8))
        story.append(Exit(at, 2, n, 14, 0, False, 7))
        story.append(Exit(at + 1, 1, 0, 133, 39, True, 7, gfn=8, gmem=133))
    story.append(GmemRefusal(T0 + 6000 * SECOND, 1, 8))
    story.append(Exit(T0 + 6060 * SECOND, 2, 0, 14, 0, False, 7))
    assert model(story).vms[1].undelivered == 1
    assert model(log_of(story)).vms[1].undelivered == 1


def test_the_end_of_a_vm_is_not_pushed_out() -> None:
    story: list[Event] = [
        VmSeen(T0, 1, 4001, "web-1"),
        Exit(T0, 1, 0, 133, 39, True, 7, gfn=8),
        VmGone(T0 + 1, 1),
        VmSeen(T0 + 2, 2, 4002, "db-1"),
    ]
    story += [Exit(T0 + n, 2, 0, 133, 39, True, 7, gfn=n) for n in range(100)]
    later = model(log_of(story, limit=50))
    assert [key for key, vm in later.vms.items() if not vm.gone] == [2]
    lost = later.lost["history"]
    assert later.vms[2].exits["EHWPOISON", "hwpoison"] == 100 - (lost - 3)  # 3 of web-1


def test_vms_that_live_are_all_remembered() -> None:
    many: list[Event] = [VmSeen(T0, n, n) for n in range(10_000)]
    assert log_of(many, limit=100) == many


PFN = 0x103275
# A page of web-1's, which lives and is looping on it.
OPEN: list[Event] = [
    VmSeen(T0, 1, 4001, "web-1"),
    Owned(T0 + 1, PFN, Owner(1, 8, 0x7F0000008000), "pagemap", 4096),
    Poison(T0 + 1, PFN, "dirty LRU page", "Recovered", tid=7),
    *(Exit(T0 + n * SECOND, 1, 0, 133, 39, True, 7, gfn=8, gmem=133) for n in range(1, 8)),
]
FLOODS: dict[str, list[Event]] = {
    "corrected errors": [
        HwError(T0 + n, "ras:mc_event", "corrected", n << 12, n, label="D1") for n in range(5000)
    ],
    "machine checks": [machine_check(T0 + n, n << 12, n, 4, 0, 0, 1 << 63) for n in range(5000)],
    "poison of nobody": [Poison(T0 + n, 1 + n, "unknown page", "Ignored") for n in range(5000)],
    "pages moved": [SoftOffline(T0 + n, 1 + n, 0) for n in range(5000)],
    "VMs with a conversion each": [
        event
        for n in range(2, 2000)
        for event in (
            VmSeen(T0, n, n, f"vm-{n}"),
            Exit(T0 + n, n, 0, 14, 39, True, n, gfn=1, gmem=0),
            VmGone(T0 + n, n),
        )
    ],
    "VMs that were notified and ended": [
        event
        for n in range(2, 2000)
        for event in (
            VmSeen(T0, n, n, f"vm-{n}"),
            Exit(T0 + n, n, 0, 133, 39, True, n, gfn=1, gmem=133),
            VmGone(T0 + n, n),
        )
    ],
}


@pytest.mark.parametrize("flood", FLOODS)
def test_an_open_incident_outlives_any_flood(flood: str) -> None:
    later = model(log_of([*OPEN, *FLOODS[flood]], limit=200))
    mine = [incident for incident in later.incidents if any(o.vm == 1 for o in incident.owners)]
    (incident,) = mine
    assert (incident.pfn, incident.exits, incident.owners) == (
        PFN,
        7,
        (Owner(1, 8, 0x7F0000008000),),
    )
    assert incident.vm_identities[1].label == "web-1"
    assert later.lost["history"] > 0


def test_time_goes_on_though_vms_that_left_nothing_are_forgotten() -> None:
    """Six seconds after a refusal that no exit followed, it counts as undelivered."""
    story: list[Event] = [
        VmSeen(T0, 1, 4001, "web-1"),
        GmemRefusal(T0, 1, 8),
        VmSeen(T0 + 6 * SECOND, 2, 4002, "db-1"),
        VmGone(T0 + 6 * SECOND, 2),
    ]
    assert model(log_of(story)).vms[1].undelivered == model(story).vms[1].undelivered == 1


def test_a_lost_does_not_tell_how_late_it_is() -> None:
    story: list[Event] = [VmSeen(T0, 1, 4001), VmGone(T0, 1), Lost(T0, "ringbuf", 1)]
    assert model(log_of(story)).last_ts == model(story).last_ts == T0


def test_a_signal_to_the_process_of_a_vm_that_ended_is_of_that_vm() -> None:
    """Which of its VMs a signal is for may not be known, or be known late."""
    late = Sigbus(T0 + 2, 4001, 7, 4, 0x1000)
    story: list[Event] = [VmSeen(T0, 1, 4001), VmGone(T0 + 1, 1), late]
    assert log_of(story) == story


@pytest.mark.parametrize("poisoned", [Found(T0 + 4, 16), Poison(T0 + 4, 16, "", "Failed", tid=8)])
def test_a_signal_that_was_told_before_its_vm_is_of_that_vm(poisoned: Event) -> None:
    """A VM is met when somebody looks, and may have come to its end by the time of the poison."""
    story: list[Event] = [
        Sigbus(T0, 4001, 7, 5, None, sender=7, pfn=16),
        VmSeen(T0 + 1, 1, 4001, "web-1"),
        VmGone(T0 + 2, 1),
        poisoned,
    ]
    assert model(log_of(story)).incidents == model(story).incidents
    assert model(story).incidents[0].sigbus == 1


@pytest.mark.parametrize("later", [1000, 1100])
def test_as_many_vms_that_ended_are_known_as_the_correlator_knows(later: int) -> None:
    story: list[Event] = [VmSeen(T0, 1, 4001, "web-1"), VmGone(T0 + 1, 1)]
    for n in range(2, later):
        story += [VmSeen(T0 + n, n, n), VmGone(T0 + n, n)]
    story.append(Exit(T0 + 1, 1, 0, 133, 39, True, 7, gfn=8))
    assert model(log_of(story, limit=10_000)).incidents == model(story).incidents
    assert model(log_of(story, limit=10_000)).lost == model(story).lost


def test_a_vm_that_starts_later_is_no_evidence_against_others() -> None:
    """Page refused and notified; 8 s later any other VM starts."""
    story: list[Event] = [
        VmSeen(T0, 1, 4001, "web-1"),
        GmemRefusal(T0 + SECOND, 1, 8),
        Exit(T0 + SECOND + 1000, 1, 0, 133, 39, True, 7, gfn=8, gmem=133),
        VmSeen(T0 + 9 * SECOND, 2, 4002, "db-1"),
    ]
    assert model(log_of(story)).vms[1].undelivered == model(story).vms[1].undelivered == 0


def settled_pages(first: int, pages: int) -> list[Event]:
    return [
        event
        for n in range(first, first + pages)
        for event in (
            VmSeen(T0 + n, n, n),
            Owned(T0 + n, n << 8, Owner(n, 8), "pagemap", 4096),
            Poison(T0 + n, n << 8, "dirty LRU page", "Recovered", tid=n),
            VmGone(T0 + n, n),
        )
    ]


def test_a_page_of_two_vms_is_open_while_one_of_them_lives() -> None:
    shared: list[Event] = [
        VmSeen(T0, 1, 4001, "web-1"),
        VmSeen(T0, 2, 4002, "db-1"),
        Owned(T0, 7, Owner(1, 8), "pagemap", 4096),
        Owned(T0, 7, Owner(2, 8), "pagemap", 4096),
        Poison(T0, 7, "dirty LRU page", "Recovered", tid=7),
        VmGone(T0 + 1, 1),
    ]
    later = model(log_of([*shared, *settled_pages(10, 17)], limit=64))
    assert later.lost["history"] > 0
    (mine,) = [incident for incident in later.incidents if incident.pfn == 7]
    assert 2 in {owner.vm for owner in mine.owners}


def test_refusals_are_told_gfn_by_gfn_also_by_exits_without_an_errno() -> None:
    story: list[Event] = [VmSeen(T0, 1, 4001, "web-1")]
    story += [GmemRefusal(T0 + gfn, 1, gfn) for gfn in range(8)]
    for gfn in range(8):
        story.append(Exit(T0 + SECOND + gfn, 1, 0, 0, 39, False, 7, gfn=gfn))
    story += [Sigbus(T0 + SECOND + n, 9, 9, 4, 0x1000, sender=9) for n in range(20)]
    story.append(Tick(T0 + 20 * SECOND))
    log = log_of(story, limit=64)
    assert model(log).vms[1].undelivered == model(story).vms[1].undelivered == 0


def test_a_vm_that_only_exits_tell_of_is_settled_not_traffic() -> None:
    """It outlives the poison of pages that nobody owns."""
    story: list[Event] = [
        VmSeen(T0, 1, 4001, "web-1"),
        Exit(T0, 1, 0, 133, 39, True, 7, gfn=8),
        VmGone(T0 + 1, 1),
    ]
    story += [Poison(T0 + 2 + n, 1 + n, "free buddy page", "Recovered") for n in range(70)]
    later = log_of(story, limit=64)
    assert model(later).lost["history"] > 0
    assert later[:3] == story[:3]


def test_a_vm_that_was_named_before_the_log_began_lives() -> None:
    """Totals of a subscriber that already has its VMs."""
    log = CompactLog(64, forget=False, where="follower")
    mine: list[Event] = [
        Owned(T0, 7, Owner(1, 8), "pagemap", 4096),
        Poison(T0, 7, "dirty LRU page", "Recovered", tid=7),
    ]
    for event in [*mine, *settled_pages(10, 17)]:
        log.add(event)
    later = log.events()
    assert later[-1].kind == "lost"
    assert later[:2] == mine


def test_uneventful_vms_take_no_room_also_after_room_was_made() -> None:
    vms: list[Event] = [VmSeen(T0, n, n) for n in range(1, 11)]
    vms += [Sigbus(T0 + n, 99, n, 4, 0x1000, sender=n) for n in range(20)]
    vms += [VmGone(T0 + SECOND, n) for n in range(1, 11)]
    vms += [VmSeen(T0 + SECOND, n, n) for n in range(100, 100 + MAX_FORGOTTEN)]
    vms += [VmGone(T0 + SECOND, n) for n in range(100, 100 + MAX_FORGOTTEN)]
    later = log_of(vms, limit=64)
    ended = {event.vm for event in later if isinstance(event, (VmSeen, VmGone))}
    assert not ended & set(range(1, 11))


def test_a_vm_whose_process_got_a_signal_is_kept_also_after_room_was_made() -> None:
    story: list[Event] = [VmSeen(T0, 1, 4001, "web-1"), Sigbus(T0, 4001, 1, 4, 0x1000)]
    story += [Sigbus(T0 + n, 99, n, 4, 0x1000, sender=n) for n in range(20)]
    story.append(VmGone(T0 + SECOND, 1))
    later = log_of(story, limit=64)
    assert later[:2] == story[:2]
    assert VmGone(T0 + SECOND, 1) in later


@given(LOGS)
@settings(max_examples=100)
def test_any_log_can_be_kept(events: list[Event]) -> None:
    kept = log_of(events, limit=20)
    vms = {event.vm for event in events if isinstance(event, (VmSeen, VmGone))}
    assert len(kept) <= 20 + len(vms) + 1
    model(kept)


@given(LOGS)
@settings(max_examples=300)
def test_a_late_client_has_the_model_of_the_serve(events: list[Event]) -> None:
    """Events come in the order of their times, as sources report them."""
    events = sorted(events, key=lambda event: event.ts)
    now, later = model(events), model(log_of(events))
    assert later.incidents == now.incidents
    assert (later.poisons, later.lost, later.latency) == (now.poisons, now.lost, now.latency)
    assert later.last_ts == now.last_ts or not log_of(events)
    # Of VMs that ended and to which nothing happened the log need hold nothing.
    for key in now.vms.keys() | later.vms.keys():
        one, other = now.vms.get(key), later.vms.get(key)
        counts = [
            (vm.exits, vm.sigbus, vm.undelivered) if vm else ({}, {}, 0) for vm in (one, other)
        ]
        assert counts[0] == counts[1]


@given(LOGS)
@settings(max_examples=300)
def test_what_is_counted_from_it_is_what_was_counted(events: list[Event]) -> None:
    """Also where it was added up, with room for all that cannot be.

    VMs are named first and seen off last, as sources do it: of others nothing is counted.
    """
    events = sorted(events, key=lambda e: isinstance(e, VmGone) - isinstance(e, VmSeen))
    log = CompactLog(len(events))
    for event in events:
        log.add(event)
    now, later = model(events), model(log.events())
    for key in now.vms.keys() | later.vms.keys():
        one, other = now.vms.get(key), later.vms.get(key)
        counts = [(vm.exits, vm.sigbus) if vm else ({}, {}) for vm in (one, other)]
        assert counts[0] == counts[1]
    assert now.poisons == later.poisons
    assert now.lost == later.lost
