"""What belongs to an incident beside poison and delivery: hardware, refusals, sizes, ends."""

from __future__ import annotations

import itertools
from dataclasses import replace
from pathlib import Path

import pytest

from kvmtrace import kvm
from kvmtrace.correlate.limits import Limits
from kvmtrace.correlate.vms import QUIET_NS
from kvmtrace.events import (
    Event,
    Exit,
    Found,
    GmemRefusal,
    HwError,
    KernelCounts,
    Owned,
    Owner,
    Poison,
    Sigbus,
    SoftOffline,
    Unpoison,
    VmGone,
    VmSeen,
)
from kvmtrace.facts import EntryKind
from kvmtrace.probes import Probe
from kvmtrace.sources.recording import RecordingSource
from kvmtrace.views.explain import explain_text
from tests.unit.fake import machine_check
from tests.unit.test_correlate import (
    HVA,
    MS,
    OTHER,
    PFN,
    T0,
    VCPU,
    VMM,
    hwpoison,
    only,
    page,
    poison,
    seen,
    tell,
)

S = 1000 * MS
MISCV, UC, PCC = 1 << 59, 1 << 61, 1 << 57
RECORDINGS = Path(__file__).parent.parent / "recordings"


def mce(
    ts: int,
    pfn: int | None = PFN,
    status: int = UC,
    misc: int | None = None,
    vendor: str | None = None,
) -> HwError:
    addr = None if pfn is None else pfn << 12
    return machine_check(ts, addr, pfn, 7, 3, 1, status, misc, vendor=vendor)


def edac(ts: int, pfn: int | None = PFN, **fields: object) -> HwError:
    return HwError(ts, "ras:mc_event", "corrected", pfn=pfn, label="DIMM_A1", **fields)  # type: ignore[arg-type]


# -- hardware


@pytest.mark.parametrize("order", [(0, 1), (1, 0)])
def test_a_machine_check_before_or_after_the_poison(order: tuple[int, int]) -> None:
    at_memory = mce(T0, status=UC | 0x90, vendor="GenuineIntel")
    events: list[Event] = [at_memory, poison(T0 + MS)]
    origin = only(tell(*(events[n] for n in order))[0]).origin
    assert origin is not None
    assert (origin.socket, origin.bank, origin.cpu, origin.severity) == (1, 7, 3, "recoverable")


@pytest.mark.parametrize(
    ("report", "joined"),
    [
        (mce(T0, PFN + 1), False),
        (mce(T0, PFN ^ 1, UC | MISCV, 13), True),  # exact to 8 KiB
        (mce(T0, PFN ^ 2, UC | MISCV, 13), False),
        (mce(T0, PFN ^ 1, UC, 13), False),  # MISC not valid
        (mce(T0, PFN, UC | MISCV, 6), True),
        (mce(T0, PFN, UC | MISCV, 63), False),  # exact to nothing
        (mce(T0, None), False),
        (edac(T0, PFN ^ 1, grain=8192), True),
        (edac(T0, None, addr=PFN << 12), True),
        (edac(T0, None), False),
    ],
)
def test_the_address_is_as_exact_as_the_report_says(report: Event, joined: bool) -> None:
    for events in ((report, poison(T0)), (poison(T0), report)):
        assert (only(tell(*events)[0]).origin is not None) == joined


def test_corrected_errors_are_the_history() -> None:
    snapshot, _ = tell(
        *(edac(T0 + n * S, count=2) for n in range(5)),
        edac(T0 + 5 * S, PFN + 7),  # elsewhere on the DIMM
        mce(T0 + 6 * S, status=UC | PCC),
        poison(T0 + 6 * S),
    )
    origin = only(snapshot).origin
    assert origin is not None
    assert origin.dimm is not None
    assert (origin.label, origin.severity, origin.via) == (
        "DIMM_A1",
        "fatal",
        ("ras:mc_event", "mce:mce_record"),
    )
    assert (origin.history.count, origin.history.corrected, origin.history.first_ts) == (11, 10, T0)
    assert (origin.dimm.count, origin.dimm.last_ts) == (11, T0 + 5 * S)
    assert snapshot.dimms["DIMM_A1"] == origin.dimm


@pytest.mark.parametrize(
    ("vendor", "severity"),
    [("AuthenticAMD", "deferred"), ("GenuineIntel", "corrected"), (None, "corrected")],
)
def test_only_amd_defers_by_bit_44(vendor: str | None, severity: str) -> None:
    """Intel counts corrected errors in bits 38 to 52."""
    check = machine_check(T0, PFN << 12, PFN, 4, 0, 0, 1 << 44, vendor=vendor)
    origin = only(tell(check, poison(T0 + MS))[0]).origin
    assert origin is not None
    assert origin.severity == severity
    assert origin.history.corrected == (severity == "corrected")


def test_hardware_errors_open_nothing() -> None:
    assert tell(mce(T0), edac(T0))[0].incidents == ()


def test_dimm_of_a_recorded_mc_event() -> None:
    source = RecordingSource(str(RECORDINGS / "mc_event.jsonl"))
    incident = only(tell(*source.poll(0))[0])
    source.close()
    assert incident.origin is not None
    assert incident.origin.label == "CPU_SrcID#0_MC#0_Chan#1_DIMM#0"
    assert incident.origin.history.corrected == 3


# -- soft offline, unpoison, before the start


def test_soft_offline_is_no_incident() -> None:
    snapshot, _ = tell(seen(1), SoftOffline(T0, PFN, 0), Found(T0 + 1, PFN))
    assert snapshot.incidents == ()
    assert [(page.pfn, page.errno) for page in snapshot.soft_offlines] == [(PFN, 0)]


def test_soft_offline_keeps_what_the_hardware_said_of_the_page() -> None:
    worn = HwError(T0, "GHES", "corrected", PFN << 12, PFN, 64, 3, "DIMM 0")
    page = tell(worn, SoftOffline(T0 + 1, PFN, 0))[0].soft_offlines[0]
    assert page.origin is not None
    assert (page.origin.label, page.origin.history.corrected) == ("DIMM 0", 3)


def test_found_while_it_was_being_poisoned_is_not_from_before() -> None:
    snapshot, _ = tell(seen(1), Found(T0, PFN), poison(T0 + MS, gmem=page(Owner(1, 8))))
    incident = only(snapshot)
    assert (incident.before_start, incident.poisoned_ts) == (False, T0 + MS)
    assert EntryKind.FOUND not in {entry.kind for entry in incident.timeline}
    again = Poison(T0 + MS, PFN, "already poisoned", "Failed")
    assert only(tell(Found(T0, PFN), again)[0]).before_start


def test_a_page_that_fails_again_is_told_so() -> None:
    again = Poison(T0 + MS, PFN, "already poisoned", "Failed")
    incident = only(tell(seen(1), poison(T0, gmem=page(Owner(1, 8))), again)[0])
    poisons = [entry for entry in incident.timeline if entry.kind is EntryKind.POISON]
    assert [entry.count for entry in poisons] == [1, 1]
    assert poisons[1].event == again


def test_unpoison_closes() -> None:
    incident = only(tell(seen(1), poison(T0, gmem=page(Owner(1, 8))), Unpoison(T0 + MS, PFN))[0])
    assert (incident.state, incident.unpoisoned_ts) == ("closed", T0 + MS)


def test_told_although_unpoisoned_is_open_again() -> None:
    snapshot, told = tell(
        seen(1),
        poison(T0, tid=OTHER),
        Owned(T0, PFN, Owner(1, None, HVA), "pagemap"),
        Unpoison(T0 + MS, PFN),
        Sigbus(T0 + 2 * MS, 4001, VCPU, 4, HVA, 12, VCPU, vm=1, vcpu=0, gfn=8),
    )
    incident = only(snapshot)
    assert (incident.state, incident.sigbus) == ("delivered", 1)
    assert told[-1].incident == incident.id
    assert EntryKind.NOTIFIED_AGAIN in {entry.kind for entry in incident.timeline}


def test_poisoned_again_after_an_unpoison_is_a_new_incident() -> None:
    again = (poison(T0 + 2 * MS, gmem=page(Owner(1, 8))), hwpoison(T0 + 3 * MS))
    snapshot, _ = tell(seen(1), poison(T0, gmem=page(Owner(1, 8))), Unpoison(T0 + MS, PFN), *again)
    assert [(i.state, i.exits) for i in snapshot.incidents] == [("closed", 0), ("delivered", 1)]


def test_found_at_the_start() -> None:
    snapshot, _ = tell(
        seen(1), Found(T0, PFN), Owned(T0, PFN, Owner(1, 8, HVA), "pagemap"), hwpoison(T0 + MS)
    )
    incident = only(snapshot)
    assert (incident.before_start, incident.poisoned_ts) == (True, None)
    assert (incident.state, incident.owners) == ("delivered", (Owner(1, 8, HVA),))
    assert sum(snapshot.latency.counts) == 0


def test_the_kernels_own_account() -> None:
    start = KernelCounts(T0, (("total", 5),), 4096, True)
    end = KernelCounts(T0 + S, (("total", 8),), 16384)
    twice = Poison(T0 + 3, PFN, "already poisoned", "Failed")
    kernel = tell(start, poison(T0 + 1), poison(T0 + 2, PFN + 1), twice, end)[0].kernel
    assert kernel is not None
    assert (kernel.handled, kernel.seen, kernel.missed) == (3, 2, 1)
    assert tell(poison(T0))[0].kernel is None


# -- sizes


def test_a_huge_page_is_lost_as_a_whole() -> None:
    at = HVA & ~0x1FFFFF
    snapshot, told = tell(
        seen(1),
        seen(2),
        Sigbus(T0, 4001, VMM, 4, at + 0x3000, 21, sender=VMM, vm=1),
        Poison(T0 + MS, PFN, "huge page", "Recovered", tid=VMM),
        Owned(T0 + MS, PFN, Owner(1, None, at + 0x3000), "pagemap", 2 << 20),
        Owned(T0 + MS, PFN, Owner(2, None, 0x7E0000003000), "pagemap", 2 << 20),
        # KVM says 12 for the page that was touched, another one of the same loss
        Sigbus(T0 + 2 * MS, 4001, VCPU, 4, at + 0x9000, 12, VCPU, vm=1, vcpu=0, gfn=9),
        Sigbus(T0 + 3 * MS, 4001, VCPU, 4, at + (2 << 20), 12, VCPU, vm=1, vcpu=0, gfn=512),
    )
    incident = only(snapshot)
    assert incident.size == 2 << 20
    assert [one.incident for one in told[-2:]] == [incident.id, None]
    assert {owner.vm for owner in incident.owners} == {1, 2}
    assert (incident.sigbus, incident.sigbus_at_poison) == (1, 1)


def test_an_ordinary_page_is_one_page() -> None:
    assert only(tell(poison(T0))[0]).size == 4096


# -- refusals


def test_refusals_that_no_exit_told() -> None:
    log = [seen(1), poison(T0, gmem=page(Owner(1, 8)))]
    log += [GmemRefusal(T0 + MS, 1, 8, 5), hwpoison(T0 + 2 * MS, count=3)]
    assert only(tell(*log)[0]).undelivered == 0  # not quiet yet
    snapshot, _ = tell(*log, seen(2, T0 + 3 * MS + QUIET_NS))
    assert (only(snapshot).undelivered, snapshot.vms[1].undelivered) == (2, 2)


def test_refusals_alone_are_an_incident_that_nobody_was_told_of() -> None:
    snapshot, _ = tell(seen(1), GmemRefusal(T0, 1, 8), seen(1, T0 + QUIET_NS + 1))
    incident = only(snapshot)
    assert (incident.state, incident.undelivered, incident.verdict) == ("latent", 1, None)


# -- VMs that are gone


def test_names_outlive_the_vm_and_the_memory_of_it() -> None:
    log: list[Event] = [
        VmSeen(T0, 1, 4001, "web", "u-1", "qemu"),
        poison(T0, gmem=page(Owner(1, 8))),
    ]
    log += [hwpoison(T0 + MS), VmGone(T0 + S, 1)]
    for n in range(2, 9):
        log += [seen(n), Exit(T0, n, 0, 22, 0, False), VmGone(T0, n)]
    snapshot, _ = tell(*log, limits=Limits(gone_vms=2, departed=2))
    assert 1 not in snapshot.vms
    party = only(snapshot).vm_identities[1]
    assert (party.name, party.uuid, party.vmm, party.gone_ts) == ("web", "u-1", "qemu", T0 + S)
    assert only(snapshot).verdict == "exited"


def test_poison_of_a_vm_that_is_gone_already() -> None:
    snapshot, _ = tell(
        VmSeen(T0, 1, 4001, "web"), VmGone(T0, 1), poison(T0 + MS, gmem=page(Owner(1, 8)))
    )
    incident = only(snapshot)
    assert (incident.state, incident.vm_identities[1].name) == ("closed", "web")
    assert incident.verdict is None


# -- conversions


def test_conversions_neither_open_nor_hide() -> None:
    log: list[Event] = [seen(1), seen(2), poison(T0, gmem=page(Owner(1, 8)))]
    for n in range(20_000):
        log.append(Exit(T0 + n, 2, 0, 14, 39, True, 9, 8, n << 12, 4096, n, True, gmem=0, count=5))
    snapshot, _ = tell(*log, hwpoison(T0 + S))
    assert only(snapshot).exits == 1
    assert snapshot.vms[2].exits == {("EFAULT", "conversion"): 100_000}
    assert snapshot.lost == {}


# -- poison from before the start, delivered while it is not found yet


def test_signals_that_came_before_the_page_was_found() -> None:
    deaf = [
        Sigbus(T0 + n * MS, 4001, VCPU, 4, HVA, 12, VCPU, vm=1, vcpu=0, pfn=PFN) for n in range(300)
    ]
    other = Sigbus(T0, 4001, VCPU, 4, HVA + 0x1000, 12, VCPU, vm=1, vcpu=0, pfn=PFN + 1)
    later = Sigbus(T0 + S, 4001, VCPU, 4, HVA, 12, VCPU, vm=1, vcpu=0, pfn=PFN)
    snapshot, _ = tell(seen(1), other, *deaf, Found(T0 + S, PFN), later)
    incident = only(snapshot)
    assert (incident.pfn, incident.sigbus, incident.state) == (PFN, 301, "looping")
    assert incident.first_delivery_ts is not None
    # The other page's signal waits for its own page.
    snapshot, _ = tell(seen(1), other, *deaf, Found(T0 + S, PFN), Found(T0 + S, PFN + 1))
    assert [one.sigbus for one in snapshot.incidents] == [300, 1]


def test_exits_that_came_before_the_page_was_found() -> None:
    owned = Owned(T0 + S, PFN, Owner(1, 8, HVA), "pagemap")
    snapshot, told = tell(seen(1), hwpoison(T0, count=9), owned, Found(T0 + S, PFN))
    incident = only(snapshot)
    assert (incident.pfn, incident.exits, incident.before_start) == (PFN, 9, True)
    assert told[1].incident == told[3].incident == incident.id


def test_an_address_counts_in_its_own_process_only() -> None:
    """Two VMs share the page, each at an address of its own; one of them has the other's too."""
    shared: list[Event] = [
        VmSeen(T0, 1, 4001),
        VmSeen(T0, 2, 4002),
        Owned(T0, PFN, Owner(1, 8, HVA), "pagemap"),
        Owned(T0, PFN, Owner(2, 9, HVA + 0x100000), "pagemap"),
        poison(T0),
    ]
    for hva, joined in ((HVA, 0), (HVA + 0x100000, 1)):
        told = Sigbus(T0 + MS, 4002, 70, 4, hva, 12, vm=2, vcpu=0)
        assert only(tell(*shared, told)[0]).sigbus == joined


def test_a_signal_that_overtook_its_poison_is_joined() -> None:
    early = Sigbus(T0, 4001, VCPU, 4, HVA, 12, VCPU, vm=1, vcpu=0, pfn=PFN)
    own = Sigbus(T0, 4001, VMM, 4, HVA, 12, VMM, vm=1, pfn=PFN)
    snapshot, _ = tell(seen(1), early, own, Poison(T0 + MS, PFN, "page", "Failed", tid=VMM))
    incident = only(snapshot)
    assert (incident.sigbus, incident.sigbus_at_poison, incident.state) == (1, 1, "delivered")


@pytest.mark.parametrize("order", list(itertools.permutations(range(3))))
def test_one_place_in_whatever_order_its_halves_come(order: tuple[int, ...]) -> None:
    """By the page table without its gfn, by an exit without its address, by a slot with both."""
    found: list[Event] = [
        Owned(T0 + MS, PFN, Owner(1, None, HVA), "pagemap"),
        hwpoison(T0 + MS),
        Owned(T0 + MS, PFN, Owner(1, 8, HVA), "fault"),
    ]
    events = [Owned(T0, PFN, Owner(1, 8), "guest_memfd"), *(found[n] for n in order)]
    assert only(tell(seen(1), poison(T0), *events)[0]).owners == (Owner(1, 8, HVA),)


@pytest.mark.parametrize("order", list(itertools.permutations(range(3))))
def test_one_place_of_which_nothing_tells_all(order: tuple[int, ...]) -> None:
    """guest_memfd names the VM, a page table the address, an exit the gfn."""
    found: list[Event] = [
        Owned(T0 + MS, PFN, Owner(1, None), "guest_memfd"),
        Owned(T0 + MS, PFN, Owner(1, None, HVA), "pagemap"),
        Owned(T0 + MS, PFN, Owner(1, 8), "fault"),
    ]
    events = [found[n] for n in order]
    assert only(tell(seen(1), poison(T0), *events)[0]).owners == (Owner(1, 8, HVA),)


def test_two_places_of_one_page_stay_two() -> None:
    places = [Owner(1, 8), Owner(1, 9), Owner(1, None, HVA), Owner(1, 10, HVA + 4096)]
    events = [Owned(T0, PFN, place, "fault") for place in places]
    assert only(tell(seen(1), poison(T0), *events, *events)[0]).owners == tuple(places)


TWO = (VmSeen(T0, 1, 4001, "web"), VmSeen(T0, 2, 4001, "db"))  # one process with two VMs


def test_a_signal_to_a_process_with_two_vms_is_for_the_one_with_the_page() -> None:
    own = Owned(T0, PFN, Owner(1, 8, HVA), "pagemap")
    signal = Sigbus(T0 + MS, 4001, VCPU, 4, HVA, 12, VCPU, pfn=PFN, count=2)
    snapshot, told = tell(*TWO, poison(T0, tid=OTHER), own, signal)
    assert (only(snapshot).state, only(snapshot).sigbus) == ("delivered", 2)
    assert {key: vm.sigbus for key, vm in snapshot.vms.items()} == {1: {"AR": 2}, 2: {}}
    assert told[-1].vm is not None
    assert told[-1].vm.name == "web"


def test_a_signal_for_one_of_two_vms_is_a_delivery() -> None:
    owners = [Owned(T0, PFN, Owner(vm, 8, HVA), "pagemap") for vm in (1, 2)]
    signal = Sigbus(T0 + MS, 4001, VCPU, 4, HVA, 12, VCPU, pfn=PFN)
    snapshot, _ = tell(*TWO, poison(T0, tid=OTHER), *owners, signal)
    incident = only(snapshot)
    assert (incident.state, incident.first_delivery_ts) == ("delivered", T0 + MS)
    text = explain_text(incident, snapshot, 200)
    assert "1 SIGBUS to a process of which no VM, or several, are known" in text
    assert "before its guest touches" not in text


@pytest.mark.parametrize("signal_ts", [T0 + MS, T0 + 3 * MS])
def test_a_process_runs_vms_until_they_end(signal_ts: int) -> None:
    """Whose signal it is, of which VM it is not known, has what its VMs have in common."""
    vms = (VmSeen(T0, 1, 4001, "web", "u", "qemu"), VmSeen(T0, 2, 4001, "web", None, "qemu"))
    ends = (VmGone(T0 + 2 * MS, 1), VmGone(T0 + 2 * MS, 2))
    signal = Sigbus(signal_ts, 4001, VCPU, 4, HVA, 12, VCPU, pfn=PFN)
    snapshot, told = tell(*vms, poison(T0, tid=OTHER), *ends, signal)
    who = told[-1].vm
    if signal_ts > T0 + 2 * MS:
        assert who is None  # another process may have that pid now
        assert (only(snapshot).sigbus, only(snapshot).sigbus_to_others) == (0, 1)
    else:
        assert who is not None
        assert (who.pid, who.name, who.uuid, who.vmm) == (4001, "web", None, "qemu")
        assert (only(snapshot).sigbus, only(snapshot).sigbus_to_others) == (1, 0)


def test_a_signal_to_a_process_without_a_vm_tells_no_vmm() -> None:
    signal = Sigbus(T0 + MS, 9, 9, 4, HVA, 12, 9, pfn=PFN, count=2, comm="reader")
    snapshot, told = tell(seen(1), poison(T0, tid=OTHER), signal)
    incident = only(snapshot)
    assert (incident.state, incident.first_delivery_ts) == ("unowned", None)
    assert (incident.sigbus, incident.sigbus_to_others, told[-1].vm) == (0, 2, None)
    text = explain_text(incident, snapshot, 200)
    assert "2 signals to processes without a VM" in text
    assert "SIGBUS AR to reader (pid 9), which runs no VM, hva" in text
    one = replace(incident, sigbus_to_others=1, exits=2)
    text = explain_text(one, snapshot, 200)
    assert "1 signal to a process without a VM" in text
    assert "2 exits of KVM_RUN" in text


def test_an_owner_at_no_known_gfn() -> None:
    snapshot, _ = tell(seen(1), poison(T0), Owned(T0, PFN, Owner(1, None, HVA), "pagemap"))
    assert "owned: gfn not known" in explain_text(only(snapshot), snapshot, 200)


def test_what_a_plain_program_was_sent_is_none_of_its_page_s_owners() -> None:
    """It has the same page mapped as a VM, whose guest has not touched it."""
    own = Owned(T0, PFN, Owner(1, 8, HVA), "pagemap")
    signal = Sigbus(T0 + MS, 9, 9, 4, HVA, 12, 9, pfn=PFN, comm="reader")
    snapshot, _ = tell(seen(1), poison(T0, tid=OTHER), own, signal)
    incident = only(snapshot)
    assert (incident.state, incident.sigbus, incident.notifications) == ("latent", 0, ())
    assert snapshot.vms[1].sigbus == {}


def test_whether_a_page_from_before_was_touched_is_not_known() -> None:
    own = Owned(T0, PFN, Owner(1, 8, HVA), "pagemap")
    snapshot, _ = tell(seen(1), own, Found(T0, PFN))
    text = explain_text(only(snapshot), snapshot, 200)
    assert "who accessed it, and was notified, before kvmtrace started" in text
    assert "VMM not notified since kvmtrace started" in text
    assert "before its guest touches" not in text


def test_what_is_not_watched_may_have_told() -> None:
    own = Owned(T0, PFN, Owner(1, 8, HVA), "pagemap")
    snapshot, _ = tell(seen(1), own, poison(T0, tid=OTHER))
    off = replace(snapshot, probes=(Probe("run", False, why="no"), Probe("sigbus", True)))
    text = explain_text(only(off), off, 200)
    assert (
        "whether the VMM was notified: not all notifications are watched (not attached: run)"
        in text
    )


@pytest.mark.parametrize("late", [False, True])
def test_a_thread_that_consumed_the_page_did_not_poison_it(*, late: bool) -> None:
    """Its signal comes from memory_failure in the same thread, as with madvise."""
    signal = Sigbus(T0 + MS, 4001, VMM, 4, HVA, 12, VMM, vm=1, pfn=PFN)
    own = Owned(T0 + MS, PFN, Owner(1, 8, HVA), "pagemap")
    poisoned: list[Event] = [signal, own, poison(T0 + 2 * MS, tid=VMM)]
    report = mce(T0 + 3 * MS if late else T0)
    incident = only(tell(seen(1), *([*poisoned, report] if late else [report, *poisoned]))[0])
    assert (incident.state, incident.sigbus, incident.sigbus_at_poison) == ("delivered", 1, 0)
    assert [verdict.vm for verdict in incident.verdicts] == [1]
    assert EntryKind.OWN_SIGNAL not in {entry.kind for entry in incident.timeline}
    corrected = only(tell(seen(1), *poisoned, mce(T0 + 3 * MS, status=0))[0])
    assert (corrected.state, corrected.sigbus_at_poison) == ("latent", 1)


def test_a_signal_without_an_address_ends_the_thread_that_consumed_the_page() -> None:
    signal = Sigbus(T0 + MS, 4001, VCPU, kvm.SI_KERNEL, None, None, VCPU, 1, 0, pfn=PFN)
    own = Owned(T0, PFN, Owner(1, 8, HVA), "guest_memfd")
    snapshot, _ = tell(seen(1), poison(T0, tid=VCPU), own, signal)
    incident = only(snapshot)
    assert (incident.state, incident.sigbus) == ("delivered", 1)
    assert snapshot.vms[1].sigbus == {"KERNEL": 1}
    text = explain_text(incident, snapshot, 200)
    assert "SIGBUS KERNEL to vCPU 0\n" in text
    assert "by: sent by the thread that had poisoned the page" in text


def test_a_vm_that_is_gone_does_not_loop_on() -> None:
    signals = [
        Sigbus(T0 + n * S, 4001, VCPU, 4, HVA, 12, VCPU, vm=1, vcpu=0, count=500)
        for n in range(1, 5)
    ]
    story: list[Event] = [seen(1), seen(2), poison(T0, tid=OTHER)]
    story += [Owned(T0, PFN, Owner(1, None, HVA), "pagemap")]
    story += [Owned(T0, PFN, Owner(2, 5, HVA), "mapping"), *signals]
    assert only(tell(*story)[0]).state == "looping"
    assert only(tell(*story, VmGone(T0 + 4 * S, 1))[0]).state == "delivered"


def test_signals_of_two_kinds_in_turn_are_all_counted_when_their_page_is_found() -> None:
    """Some of a loop's come with the gfn of the fault that they were sent from, some without."""
    known = Sigbus(T0, 4001, VCPU, 4, HVA, 12, VCPU, 1, 0, 8, PFN)
    turns = [replace(known, ts=T0 + n, gfn=8 if n % 2 else None) for n in range(200)]
    own = Owned(T0 + S, PFN, Owner(1, 8, HVA), "pagemap")
    snapshot, _ = tell(seen(1), *turns, own, Found(T0 + S, PFN))
    assert only(snapshot).sigbus == snapshot.vms[1].sigbus["AR"] == 200


def test_what_is_told_after_a_vms_end_is_told_of_that_vm() -> None:
    late = Exit(T0 + 2 * MS, 1, 0, 14, 0, False, VCPU)
    _, told = tell(seen(1), VmGone(T0 + MS, 1), late, VmGone(T0 + 3 * MS, 1))
    assert [one.vm.pid if one.vm else None for one in told] == [4001] * 4
