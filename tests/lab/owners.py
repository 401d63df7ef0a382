"""Owners of a poisoned page, found before the guest touches it.

The VM is started first, then kvmtrace, then the page is poisoned; in a second run the poison is
older than kvmtrace. Tests and the matrix run the same functions.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import ExitStack

from tests.lab.harness import (
    Line,
    Unstageable,
    Vmm,
    Watch,
    can_inject_poison,
    end_following,
    top,
    watching,
)
from tests.lab.machine import Machine

# (backing, pages)
BACKINGS = (("anon", 64), ("thp", 1024), ("hugetlb2m", 1024), ("memfd", 64), ("gmem", 64))


def poison_of(pfn: int) -> Callable[[list[Line]], list[Line]]:
    return lambda lines: [x for x in lines if x["kind"] == "poison" and x["pfn"] == pfn]


def owners_of(incident: str, lines: list[Line]) -> dict[tuple[int, int | None], int | None]:
    """{(pid, gfn): hva} of the owners in the poison event and of those found later."""
    of_it = [x for x in lines if x.get("incident") == incident]
    owners = [owner for x in of_it if x["kind"] == "poison" for owner in x["owners"]]
    owners += [x for x in of_it if x["kind"] == "owner"]
    return {(owner["vm"]["pid"], owner.get("gfn")): owner.get("hva") for owner in owners}


def _second(machine: Machine, first: Vmm, backing: str) -> Vmm | None:
    """Start another VM on the same memfd; it does not touch the page. None for other backings."""
    if backing != "memfd":
        return None
    fd = first.step("info v")["slots"][0]["fd"]
    other = Vmm(machine, "other")
    other.step(f"create v file=/proc/{first.pid}/fd/{fd} pages=64 base=0x400")
    return other


def deliveries(lines: list[Line], incident: str) -> list[Line]:
    return [x for x in lines if x["kind"] in ("exit", "sigbus") and x.get("incident") == incident]


# Status 1 before Linux 6.7, which has no PAGEMAP_SCAN and returns ENOTTY (25).
_HAS_PAGEMAP_SCAN = (
    "import fcntl, os, sys\n"
    "try: fcntl.ioctl(os.open('/proc/self/pagemap', 0), 0xC0606610, bytes(96))\n"
    "except OSError as error: sys.exit(error.errno == 25)"
)


def owners_before_any_touch(machine: Machine, source: str) -> None:
    """Poison each backing in both ways; then start kvmtrace when the poison is already there."""
    end_following(machine)
    scans = machine.run(["python3", "-c", _HAS_PAGEMAP_SCAN]).status == 0
    with ExitStack() as stack:
        stories = []
        for backing, pages in BACKINGS:
            if backing == "hugetlb2m" and not scans:
                continue  # a poisoned one looks as if never touched (docs/how-it-works.md)
            for how in ("inject", "madvise") if can_inject_poison(machine) else ("madvise",):
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

        watch = stack.enter_context(watching(machine, source))
        for vmm, how, other in stories:
            _poison_and_check(watch, vmm, how, other)
        lost = watch.lines("lost")
        assert not lost, lost
        watch.end()

        # A new start finds all of these owners, and no others.
        found = top(machine, source, interval=20)
        owners = {
            (owner["vm"]["name"], owner.get("gfn"))
            for incident in found["incidents"]
            for owner in incident["owners"]
        }
        for vmm, _, _ in stories:
            assert any(name == vmm.name and gfn for name, gfn in owners), (vmm.name, owners)
        assert not any(name == "bystander" for name, _ in owners)
        for vmm, _, other in [*stories, (bystander, "", None)]:
            vmm.end()
            if other:
                other.end()


def _poison_and_check(watch: Watch, vmm: Vmm, how: str, other: Vmm | None) -> None:
    poison = vmm.step(f"poison v +3 how={how}", may_fail=True)
    assert poison["poisoned"], poison
    lines = watch.until(poison_of(poison["pfn"]), f"the poison of {vmm.name}")
    (reported,) = poison_of(poison["pfn"])(lines)
    wanted = {(vmm.pid, poison["gfn"])} | ({(other.pid, 0x403)} if other else set())
    incident = reported["incident"]
    lines = watch.until(lambda ls: len(owners_of(incident, ls)) >= len(wanted), "its owners")
    owners = owners_of(incident, lines)
    assert set(owners) == wanted, (vmm.name, reported)
    assert owners[vmm.pid, poison["gfn"]] == poison["hva"]
    assert deliveries(lines, reported["incident"]) == []

    vmm.step("touch v +3", may_fail=True)
    watch.until(lambda ls: deliveries(ls, reported["incident"]), f"the delivery to {vmm.name}")
