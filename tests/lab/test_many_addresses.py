"""More addresses than the kernel has counters for: exits, their errno and their cause stay exact.

By ftrace see test_ftrace.py, which has room for fewer.
"""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Callable

import pytest

from tests.lab.drive import PATIENCE, Line, Vmm, Watch, seen_by, told_by, watching
from tests.lab.machine import Machine
from tests.lab.scenarios import gone
from tests.lab.vmm import private_vms

pytestmark = pytest.mark.lab

ROOM = 16384  # sources/bpf.py, MAX_KEYS
FEW = 64

# kvmtrace with room for that many exits of different kinds only.
SMALL = f"""
import sys
from kvmtrace.sources import bpf
bpf.MAX_KEYS = {FEW}
from kvmtrace.cli import main
sys.argv = ["kvmtrace", "events", "--json", "--source", "bpf"]
main()
"""


def causes(lines: list[Line], pid: int) -> Counter[tuple[str, str | None]]:
    """{(errno, cause): exits} of a process."""
    found: Counter[tuple[str, str | None]] = Counter()
    for line in lines:
        if line["kind"] == "exit" and line["vm"]["pid"] == pid:
            found[line["errno"], line.get("cause")] += line["count"]
    return found


def test_conversions_of_a_whole_vm(boot: Callable[..., Machine]) -> None:
    """A confidential VM converts more pages than there are counters; then a page of it is lost."""
    machine = boot()
    private_vms.offer(machine)
    pages = ROOM + 600
    with watching(machine, "bpf") as watch:
        busy = Vmm(machine, "confidential")
        busy.step(f"create p private=1 backing=gmem pages={pages + 8}")
        busy.step(f"convert p +1 1 pages={pages}", patience=10 * PATIENCE)
        sick = Vmm(machine, "sick")
        for step in ("create v backing=gmem", "touch v +3", "poison v +3", "touch v +3"):
            told = sick.step(step)
        reports = {vmm.pid: vmm.end() for vmm in (busy, sick)}
        lines = watch.until(lambda ls: all(gone(pid)(ls) for pid in reports), "the VMs' end")
    truth = told_by(reports[busy.pid])
    assert (len(truth), truth.total()) == (pages, pages)
    assert causes(lines, busy.pid) == {("EFAULT", "conversion"): pages}
    converted = [x for x in lines if x["kind"] == "exit" and x["vm"]["pid"] == busy.pid]
    assert {(x["vcpu"], x["reason"], x["annotated"], x["size"]) for x in converted} == {
        (0, 39, True, 4096)
    }
    # Those that stand for one exit have its address, the others none.
    addresses = {key[5] for key in truth}
    assert all(x["gpa"] in addresses for x in converted if x["count"] == 1)
    assert all("gpa" not in x and "gfn" not in x for x in converted if x["count"] > 1)
    (exit_,) = [x for x in lines if x["kind"] == "exit" and x["vm"]["pid"] == sick.pid]
    assert (exit_["gpa"], exit_["vcpu"], exit_["cause"]) == (told["gpa"], 0, "hwpoison")
    assert [x for x in lines if x["kind"] == "lost"] == []


def test_other_exits_beyond_that(machine: Machine) -> None:
    """Pages that guest_memfd lost, and one that is poisoned when all counters are taken."""
    pages, each = 3 * FEW, 5
    watch = Watch(machine, "bpf", job=machine.start(["python3", "-c", SMALL]))
    try:
        vmm = Vmm(machine, "many")
        vmm.step(f"create v backing=gmem pages={pages} vcpus=2")
        vmm.step("create w backing=gmem base=0x4000")
        vmm.step("touch w +3")
        vmm.step("poison w +3")
        vmm.step("close-gmem v")
        for page in range(pages):
            vmm.step(f"loop v +{page} {each} vcpu={page % 2}")
        vmm.step("loop w +3 7")
        report = vmm.end()
        lines = watch.until(gone(vmm.pid, 2), "the VMs' end")
    finally:
        watch.end()
    truth = told_by(report)
    assert truth.total() == pages * each + 7
    assert causes(lines, vmm.pid) == {
        ("EFAULT", "backing"): pages * each,
        ("EHWPOISON", "hwpoison"): 7,
    }
    exits = [x for x in lines if x["kind"] == "exit"]
    assert {(x["reason"], x["annotated"]) for x in exits} == {(39, True)}
    unknown = [x for x in exits if "vcpu" not in x]
    assert unknown, json.dumps(exits[-5:])
    assert not {"gpa", "gfn", "size", "access"} & {name for x in unknown for name in x}
    seen = seen_by([x for x in lines if x["kind"] != "exit" or "vcpu" in x], vmm.pid)
    assert len(seen) == FEW
    assert seen == Counter({key: truth[key] for key in seen})
    # What was counted without its address is told as that.
    lost = {x["where"]: 0 for x in lines if x["kind"] == "lost"}
    assert lost.keys() == {"exit_keys"}
