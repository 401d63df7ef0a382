"""More kinds of exits than the eBPF source has counters: errno and cause stay exact.

Here the number of counters is reduced. test_verdicts.py exceeds the real number by conversions;
test_ftrace.py does it for ftrace.
"""

from __future__ import annotations

import json
from collections import Counter

import pytest

from tests.lab.harness import Line, Vmm, Watch, exits_reported, exits_returned
from tests.lab.machine import Machine
from tests.lab.scenarios import vms_gone

pytestmark = pytest.mark.lab

FEW = 16

# kvmtrace with room for that many different exits only.
SMALL = f"""
import sys
from kvmtrace.sources import limits
limits.MAX_KEYS = {FEW}
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


def test_exits_beyond_the_last_counter(machine: Machine) -> None:
    """Closed guest_memfd takes all counters; a poisoned page then is counted by cause."""
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
        lines = watch.until(vms_gone(vmm.pid, 2), "the VMs' end")
    finally:
        watch.end()
    truth = exits_returned(report)
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
    seen = exits_reported([x for x in lines if x["kind"] != "exit" or "vcpu" in x], vmm.pid)
    assert len(seen) == FEW
    assert seen == Counter({key: truth[key] for key in seen})
    # Exits counted without their address are reported under `lost`.
    lost = {x["where"]: 0 for x in lines if x["kind"] == "lost"}
    assert lost.keys() == {"exit_keys"}
