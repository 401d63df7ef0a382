"""A guest that is itself a hypervisor loses a page that KVM reads on its behalf (arm64, NV2).

kvm_handle_vncr_abort annotates the fault but KVM_RUN returns 0, contrary to api.rst. All other
memory faults have an errno.
"""

from __future__ import annotations

import json
from typing import Any

from tests.lab.harness import Vmm, recorded
from tests.lab.machine import Machine
from tests.lab.scenarios import Scenario

EHWPOISON = 133


def nested(machine: Machine, source: str) -> None:
    """The page in VNCR_EL2 is poisoned: KVM_RUN reports a memory fault without an errno."""
    with recorded(machine, source) as log:
        vmm = Vmm(machine, "hypervisor")
        vmm.step("create w backing=gmem pages=32 nested=1 base=0x400")
        assert vmm.step("touch w +5 op=nested")["ok"]
        vmm.step("create v backing=gmem pages=32 nested=1")
        vmm.step("touch v +3")
        vmm.step("poison v +3")
        returns = vmm.step("loop v +3 4 op=nested")["returns"]
        vmm.end()
    (fault,) = returns
    assert (fault["ret"], fault["reason"], fault["annotated"], fault["count"]) == (0, 39, True, 4)
    lines = machine.run(["cat", log], check=True).stdout.splitlines()
    events: list[dict[str, Any]] = [json.loads(line) for line in lines[1:]]  # after the header
    exits = [event for event in events if event["kind"] == "exit"]
    assert sum(event["count"] for event in exits) == 4
    for event in exits:
        assert (event["errno"], event["reason"], event["annotated"]) == (0, 39, True)
        assert (event["gpa"], event["gfn"]) == (fault["gpa"], fault["gfn"])
        assert (event["flags"], event["size"]) == (fault["flags"], fault["size"])
        assert event["gmem"] == EHWPOISON
    assert [event for event in events if event["kind"] == "lost"] == []


NESTED = Scenario(nested, boot={"nested": True})
