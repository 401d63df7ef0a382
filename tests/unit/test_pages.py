"""Whose a poisoned page is: the kernel's verdicts (mm/memory-failure.c of 6.1, 6.12 and 7.3)."""

from __future__ import annotations

import dataclasses
import json

import pytest

from kvmtrace.correlate import Correlator
from kvmtrace.events import Event, Exit, Owned, Owner, Poison, Sigbus, Unpoison
from kvmtrace.model import Incident, PageClass, Snapshot
from kvmtrace.page_types import outcome_of
from kvmtrace.views import json_output
from kvmtrace.views.explain import as_object, explain_text
from kvmtrace.views.tables.table import table_text
from kvmtrace.views.web import landing
from tests.unit.test_correlate import HVA, MS, PFN, T0, hwpoison, only, page, seen, tell

KERNEL = ("reserved kernel page", "high-order kernel page", "kernel slab page")
UNHELD = (
    "get hwpoison page",
    "unknown page",
    "different compound page after locking",
    "free buddy page",
    "free huge page",
    "dax page",
    "non struct page pfn",
)
USER = (
    "huge page",
    "unmapping failed page",
    "dirty swapcache page",
    "clean mlocked LRU page",
    "dirty unevictable LRU page",
    "clean LRU page",
    "already truncated LRU page",
    "unsplit thp",
)


def verdict(page_type: str, result: str = "Ignored", ts: int = T0, pfn: int = PFN) -> Poison:
    return Poison(ts, pfn, page_type, result, None, None, 31)


def owned(vm: int, gfn: int | None, hva: int | None, ts: int = T0) -> Owned:
    return Owned(ts, PFN, Owner(vm, gfn, hva), "pagemap")


@pytest.mark.parametrize("page_type", [*KERNEL, *UNHELD, *USER, "page of a newer kernel"])
def test_what_was_handled_is_out_of_use(page_type: str) -> None:
    for result in ("Recovered", "Delayed"):
        incident = only(tell(seen(1), verdict(page_type, result))[0])
        assert (incident.page_class, incident.host_at_risk) == ("handled", False)
        assert as_object(incident, Snapshot())["next"][0].startswith("nothing: ")


@pytest.mark.parametrize(
    "page_type", [*KERNEL, *UNHELD, "huge zero page", "page of a newer kernel"]
)
@pytest.mark.parametrize("result", ["Ignored", "Failed"])
def test_what_nobody_could_take_from_the_kernel_puts_the_host_at_risk(
    page_type: str, result: str
) -> None:
    snapshot, _ = tell(seen(1), verdict(page_type, result))
    incident = only(snapshot)
    assert (incident.page_class, incident.state) == ("kernel", "unowned")
    assert snapshot.kernel_pages == 1
    (step,) = as_object(incident, snapshot)["next"]
    assert "move the VMs away and reboot this host" in step
    assert f"({page_type}: {result})" in step


@pytest.mark.parametrize("page_type", USER)
@pytest.mark.parametrize("result", ["Ignored", "Failed"])
def test_memory_of_a_process_is_not_the_kernels_and_not_harmless(
    page_type: str, result: str
) -> None:
    snapshot, _ = tell(seen(1), verdict(page_type, result))
    incident = only(snapshot)
    assert incident.page_class == "process"
    assert snapshot.kernel_pages == 0
    (step,) = as_object(incident, snapshot)["next"]
    assert step.startswith("see in the kernel's log which processes")


@pytest.mark.parametrize(
    ("page_type", "result", "verdict"),
    [
        (None, None, None),
        ("unknown page", "named by a newer kernel", None),
        ("already poisoned", "Failed", None),
        ("already poisoned page", "Failed", None),
        ("0", "0", None),  # a kernel whose names could not be read
        ("reserved kernel page", "0", "kernel"),
        ("Unknown Page", "IGNORED", "unheld"),
    ],
)
def test_words(page_type: str | None, result: str | None, verdict: str | None) -> None:
    assert outcome_of(page_type, result) == verdict


@pytest.mark.parametrize("page_type", ["dirty unevictable LRU page", "unknown page"])
def test_a_page_of_a_vm_is_the_vms_whatever_the_kernel_could_not_do(page_type: str) -> None:
    """guest_memfd's handler returns MF_DELAYED where 0 is expected: "Failed", though it is kept."""
    failed = dataclasses.replace(verdict(page_type, "Failed"), gmem=page(Owner(1, 8, HVA)))
    incident = only(tell(seen(1), failed)[0])
    assert (incident.page_class, incident.state) == ("vm", "latent")
    snapshot, _ = tell(seen(1), dataclasses.replace(failed, gmem=page()))
    assert (only(snapshot).page_class, only(snapshot).state) == ("vm", "unowned")
    assert as_object(only(snapshot), snapshot)["next"][0].startswith("find the VM that owns page ")


def test_what_a_guest_ran_into_is_guest_memory() -> None:
    """Found by `make fuzz`: it was delivered, and then two owners made it the kernel's."""
    failed = verdict("unknown page")
    shared = dataclasses.replace(failed, gmem=page(Owner(1, 8), Owner(2, 8)))
    for story in ((hwpoison(T0), shared), (hwpoison(T0), failed, owned(1, 8, HVA))):
        incident = tell(seen(1), seen(2), *story)[0].incidents[0]
        assert incident.page_class == "vm"
        assert (1, 8) in {(owner.vm, owner.gfn) for owner in incident.owners}


ORDERS: dict[str, tuple[Event, ...]] = {
    "before": (*(owned(vm, vm, HVA + (vm << 12)) for vm in range(1, 300)),),
    "two places of one VM": (owned(1, 8, HVA), owned(1, 9, HVA + 4096)),
    "without addresses": (owned(1, 8, None), owned(2, 8, None)),
}


@pytest.mark.parametrize("mapped", ORDERS.values(), ids=ORDERS)
@pytest.mark.parametrize("page_type", ["reserved kernel page", "get hwpoison page", "unknown page"])
@pytest.mark.parametrize("first", [True, False])
def test_vms_that_have_the_zero_page_mapped_do_not_own_it(
    mapped: tuple[Event, ...], page_type: str, first: bool
) -> None:
    poison = verdict(page_type)
    story = (*mapped, poison) if first else (poison, *mapped)
    snapshot, _ = tell(*(seen(vm) for vm in range(1, 300)), *story)
    incident = only(snapshot)
    assert (incident.page_class, incident.state, incident.owners) == ("kernel", "unowned", ())
    assert snapshot.kernel_pages == 1
    assert not any(vm.poisoned_pages for vm in snapshot.vms.values())
    assert snapshot.lost == {}
    assert "mapped by VMs" in explain_text(incident, snapshot)


def test_a_place_that_only_had_the_zero_page_may_lose_a_page_of_its_own() -> None:
    snapshot, told = tell(
        seen(1),
        verdict("unknown page"),
        owned(1, 8, HVA),
        owned(1, 9, HVA + 4096),
        Owned(T0 + MS, PFN + 1, Owner(1, 8, HVA), "pagemap"),
        verdict("dirty LRU page", "Recovered", T0 + MS, PFN + 1),
        hwpoison(T0 + 2 * MS),
    )
    assert [i.page_class for i in snapshot.incidents] == ["kernel", "vm"]
    assert told[-1].incident == snapshot.incidents[1].id


def test_a_vm_that_ran_into_the_kernels_page_was_told() -> None:
    snapshot, _ = tell(
        seen(1),
        verdict("reserved kernel page"),
        Sigbus(T0 + MS, 4001, 4002, 4, HVA, 12, sender=4002, vm=1, vcpu=0, pfn=PFN),
    )
    incident = only(snapshot)
    assert (incident.page_class, incident.state) == ("kernel", "delivered")
    steps = as_object(incident, snapshot)["next"]
    assert "reboot this host" in steps[0]
    assert "stop vm-1 and start again on another host" in steps[0]


@pytest.mark.parametrize(
    ("verdicts", "last", "page_class"),
    [
        ([("unsplit thp", "Delayed"), ("clean LRU page", "Recovered")], 1, "handled"),
        ([("unknown page", "Ignored"), ("free buddy page", "Recovered")], 1, "handled"),
        ([("clean LRU page", "Recovered"), ("already poisoned", "Failed")], 0, "handled"),
        ([("already poisoned", "Failed"), ("reserved kernel page", "Ignored")], 1, "kernel"),
        ([("already poisoned", "Failed"), ("already poisoned", "Failed")], 0, None),
    ],
)
def test_the_last_verdict_is_what_the_kernel_thinks_now(
    verdicts: list[tuple[str, str]], last: int, page_class: str | None
) -> None:
    events = [verdict(*words, ts=T0 + n * MS) for n, words in enumerate(verdicts)]
    incident = only(tell(*events)[0])
    assert (incident.page_type, incident.result) == verdicts[last]
    assert incident.page_class == page_class
    assert sum(moment.count for moment in incident.timeline) == 2


def test_a_verdict_that_is_read_late_is_not_the_last_one() -> None:
    late = verdict("unsplit thp", "Delayed", T0)
    incident = only(tell(verdict("clean LRU page", "Recovered", T0 + MS), late)[0])
    assert incident.result == "Recovered"


def test_without_a_verdict_nobody_says_that_it_is_harmless() -> None:
    snapshot, _ = tell(verdict("already poisoned", "Failed"))
    (step,) = as_object(only(snapshot), snapshot)["next"]
    assert step.startswith("see in the kernel's log what became of page 0x103275")


def test_an_unpoisoned_page_of_the_kernels_is_no_risk() -> None:
    snapshot, _ = tell(verdict("reserved kernel page"), Unpoison(T0 + MS, PFN))
    assert (only(snapshot).state, only(snapshot).host_at_risk) == ("closed", False)
    assert snapshot.kernel_pages == 0


def shown() -> tuple[Incident, Snapshot]:
    snapshot, _ = tell(seen(1), verdict("dirty LRU page", pfn=7), verdict(KERNEL[0]))
    return next(i for i in snapshot.incidents if i.pfn == PFN), snapshot


def test_every_view_shows_it_first_and_by_name() -> None:
    incident, snapshot = shown()
    table = table_text(snapshot, now=T0, width=160)
    (row,) = [line for line in table.splitlines() if f" {incident.id} " in line]
    assert "kernel  " in row
    assert "the kernel itself" in row
    assert "host at risk: 1 poisoned page of the kernel's" in table
    assert table.index(incident.id) < table.index("7-1")
    text = explain_text(incident, snapshot)
    assert text.startswith("KERNEL  The host can go down at any time: its kernel may use a page")
    assert f"\nThe page (incident {incident.id})\n" in text
    assert "the kernel itself" in text
    html = landing.render(snapshot, T0)
    assert ">1 kernel</span>" in html
    assert ">the kernel itself</a>" in html
    assert "host at risk" in html
    top = json.loads(json.dumps(json_output.top(snapshot)))
    assert top["kernel_poisoned_pages"] == 1
    (told,) = [one for one in top["incidents"] if one["pfn"] == PFN]
    assert (told["state"], told["page_class"]) == ("unowned", "kernel")
    assert {one["page_class"] for one in top["incidents"]} <= set(PageClass)


def test_what_had_to_be_forgotten_still_puts_the_host_at_risk() -> None:
    correlator = Correlator()
    for number in range(6000):
        correlator.feed(verdict("unknown page", ts=T0 + number, pfn=0x100000 + number))
    snapshot = correlator.snapshot()
    assert len(snapshot.incidents) == 1024
    assert snapshot.kernel_pages == 6000
    correlator.feed(Unpoison(T0 + 7000, 0x100000 + 4000))
    assert correlator.snapshot().kernel_pages == 5999
    again = dataclasses.replace(verdict("unknown page"), pfn=0x100000 + 4001, ts=T0 + 8000)
    correlator.feed(again)  # known again, and counted once
    assert correlator.snapshot().kernel_pages == 5999


def test_exits_of_an_unknown_vcpu() -> None:
    """A full map in the kernel leaves errno and cause."""
    exit_ = Exit(T0, 1, None, 133, None, True, count=7)
    snapshot, told = tell(seen(1), exit_)
    assert told[-1].cause == "hwpoison"
    assert snapshot.vms[1].exits == {("EHWPOISON", "hwpoison"): 7}
    line = json_output.event_line(told[-1])
    assert line is not None
    assert "vcpu" not in line
    assert "reason" not in line
    assert "a vCPU: EHWPOISON" in explain_text(only(snapshot), snapshot)
