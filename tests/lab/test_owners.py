"""Whose memory a poisoned page is, before the guest touches it: VM first, kvmtrace second, poison
third; and poison that was there before kvmtrace.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from contextlib import ExitStack

import pytest

from tests.lab.drive import Line, Unstageable, Vmm, Watch, recorded, replayed, top, watching
from tests.lab.machine import Machine

pytestmark = pytest.mark.lab

KERNELS = ("trixie-newest", "trixie-6.18", "trixie")
# (backing, pages)
BACKINGS = (("anon", 64), ("thp", 1024), ("hugetlb2m", 1024), ("memfd", 64), ("gmem", 64))


def _poison_of(pfn: int) -> Callable[[list[Line]], list[Line]]:
    return lambda lines: [x for x in lines if x["kind"] == "poison" and x["pfn"] == pfn]


def _owners(line: Line) -> set[tuple[int, int | None]]:
    return {(owner["vm"]["pid"], owner.get("gfn")) for owner in line["owners"]}


def _second(machine: Machine, first: Vmm, backing: str) -> Vmm | None:
    """Another process with a VM on the same memfd; it does not touch the page."""
    if backing != "memfd":
        return None
    fd = first.step("info v")["slots"][0]["fd"]
    other = Vmm(machine, "other")
    other.step(f"create v file=/proc/{first.pid}/fd/{fd} pages=64 base=0x400")
    return other


def _deliveries(lines: list[Line], incident: str) -> list[Line]:
    return [x for x in lines if x["kind"] in ("exit", "sigbus") and x.get("incident") == incident]


@pytest.mark.parametrize("kernel", KERNELS)
def test_owners_before_any_touch(kernel: str, boot: Callable[..., Machine]) -> None:
    """One boot, every backing, both ways to poison; then a start with the poison already there."""
    machine = boot(kernel)
    with ExitStack() as stack:
        stories = []
        for backing, pages in BACKINGS:
            for how in ("inject", "madvise"):
                vmm = Vmm(machine, f"{backing}-{how}")
                try:
                    vmm.step(f"create v backing={backing} pages={pages}")
                except Unstageable:
                    vmm.end()
                    continue
                vmm.step("touch v +3")
                stories.append((vmm, how, _second(machine, vmm, backing)))
        bystander = Vmm(machine, "bystander")
        bystander.step("create v backing=anon")
        bystander.step("touch v +3")

        watch = stack.enter_context(watching(machine, "bpf"))
        for vmm, how, other in stories:
            _one(watch, vmm, how, other)
        assert not [line for line in watch.lines() if line["kind"] == "lost"]
        watch.end()

        # A new start finds them all, and no one else's.
        found = top(machine, "bpf", interval=20)
        owners = {
            (owner["vm"]["name"], owner.get("gfn"))
            for incident in found["incidents"]
            for owner in incident["owners"]
        }
        for vmm, _, _ in stories:
            assert any(name == vmm.name[:15] and gfn for name, gfn in owners), (vmm.name, owners)
        assert not any(name == "bystander" for name, _ in owners)
        for vmm, _, other in [*stories, (bystander, "", None)]:
            vmm.end()
            if other:
                other.end()


def _one(watch: Watch, vmm: Vmm, how: str, other: Vmm | None) -> None:
    poison = vmm.step(f"poison v +3 how={how}", may_fail=True)
    assert poison["poisoned"], poison
    lines = watch.until(_poison_of(poison["pfn"]), f"the poison of {vmm.name}")
    (told,) = _poison_of(poison["pfn"])(lines)
    wanted = {(vmm.pid, poison["gfn"])} | ({(other.pid, 0x403)} if other else set())
    assert _owners(told) == wanted, (vmm.name, told)
    assert [o["hva"] for o in told["owners"] if o["vm"]["pid"] == vmm.pid] == [poison["hva"]]
    assert _deliveries(lines, told["incident"]) == []

    vmm.step("touch v +3", may_fail=True)
    watch.until(lambda ls: _deliveries(ls, told["incident"]), f"the delivery to {vmm.name}")


def test_an_older_guest_memfd_by_ftrace(boot: Callable[..., Machine]) -> None:
    """Where probes cannot follow the page to its VM, /proc tells who holds its guest_memfd.

    Not only by page tables: one page is mapped, of the other nothing is.
    """
    machine = boot("trixie-6.18")
    mapped, unmapped, bystander = (Vmm(machine, name) for name in ("mapped", "unmapped", "other"))
    for vmm in (mapped, unmapped, bystander):
        vmm.step("create v backing=gmem pages=32")
        vmm.step("touch v +3")
    places = {vmm: vmm.step("pfn v +3") for vmm in (mapped, unmapped)}
    unmapped.step("unmap v +3")
    with recorded(machine, "ftrace") as log:
        for vmm, place in places.items():
            poison = vmm.step(f"poison pfn={place['pfn']}", may_fail=True)
            assert poison["poisoned"], poison
    shown = replayed(machine, log)
    assert shown["lost"] == {}
    incidents = {incident["pfn"]: incident for incident in shown["incidents"]}
    for vmm, place in places.items():
        incident = incidents.pop(place["pfn"])
        assert incident["state"] == "latent"
        assert [owner["vm"]["pid"] for owner in incident["owners"]] == [vmm.pid], incident
        hva = place["hva"] if vmm is mapped else None
        assert [owner.get("hva") for owner in incident["owners"]] == [hva]
    assert incidents == {}
    for vmm in (mapped, unmapped, bystander):
        vmm.end()


def test_a_large_sparse_vm_holds_nobody_up(machine: Machine) -> None:
    """Owners of a page in 3 GiB of address space come as fast as in 256 KiB."""
    vmm = Vmm(machine, "large")
    vmm.step(f"create v backing=anon pages={3 << 18}")
    vmm.step("touch v +3")
    with watching(machine, "bpf") as watch:
        begin = time.monotonic()
        poison = vmm.step("poison v +3 how=inject")
        lines = watch.until(_poison_of(poison["pfn"]), "the poison")
        assert time.monotonic() - begin < 10
        assert _owners(_poison_of(poison["pfn"])(lines)[0]) == {(vmm.pid, poison["gfn"])}
    vmm.end()
