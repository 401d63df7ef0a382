"""Whose memory a poisoned page is, before the guest touches it: VM first, kvmtrace second, poison
third; and poison that was there before kvmtrace. As scenarios.py: for the tests and the matrix.
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
    """{(pid, gfn): hva}: those found at once, and those that a slow search found later."""
    of_it = [x for x in lines if x.get("incident") == incident]
    owners = [owner for x in of_it if x["kind"] == "poison" for owner in x["owners"]]
    owners += [x for x in of_it if x["kind"] == "owner"]
    return {(owner["vm"]["pid"], owner.get("gfn")): owner.get("hva") for owner in owners}


def _second(machine: Machine, first: Vmm, backing: str) -> Vmm | None:
    """Another process with a VM on the same memfd; it does not touch the page."""
    if backing != "memfd":
        return None
    fd = first.step("info v")["slots"][0]["fd"]
    other = Vmm(machine, "other")
    other.step(f"create v file=/proc/{first.pid}/fd/{fd} pages=64 base=0x400")
    return other


def deliveries(lines: list[Line], incident: str) -> list[Line]:
    return [x for x in lines if x["kind"] in ("exit", "sigbus") and x.get("incident") == incident]


# PAGEMAP_SCAN with an empty argument: ENOTTY (25) where the kernel has no such call (before 6.7).
_HAS_PAGEMAP_SCAN = (
    "import fcntl, os, sys\n"
    "try: fcntl.ioctl(os.open('/proc/self/pagemap', 0), 0xC0606610, bytes(96))\n"
    "except OSError as error: sys.exit(error.errno == 25)"
)


def owners_before_any_touch(machine: Machine, source: str) -> None:
    """Every backing, both ways to poison; then a start with the poison already there."""
    end_following(machine)
    scans = machine.run(["python3", "-c", _HAS_PAGEMAP_SCAN]).status == 0
    with ExitStack() as stack:
        stories = []
        for backing, pages in BACKINGS:
            if backing == "hugetlb2m" and not scans:
                continue  # a lost one looks like one that was never touched (README, Limits)
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

        # A new start finds them all, and no one else's.
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
