"""Pages in every state at once: which comes first, what it is called, and what to do.

The lab's VMM stages each state by how it behaves. What kvmtrace advises for the VM that is stuck
is carried out, and ends the incident.
"""

from __future__ import annotations

import json
import re
import signal
import time
from collections.abc import Sequence

from tests.lab.harness import (
    PATIENCE,
    Line,
    Unstageable,
    Vmm,
    can_inject_poison,
    end_following,
    page_of,
    start_serve,
)
from tests.lab.kernel_pages import poisoned
from tests.lab.machine import Job, Machine
from tests.lab.scenarios import Scenario

# {name of the VM or kind of the page: its urgency, its first action}, the worst first. No word of
# this is kvmtrace's own: they are the contract of docs/json.md.
EXPECTED = {
    "loops": ("looping", "stop_and_start"),
    "stops": ("stopped", "stop_and_start"),
    "refused": ("undelivered", "shut_down"),
    "slab": ("kernel", "move_away"),
    "ahead": ("unclear", "shut_down"),
    "untouched": ("latent", "shut_down"),
    "free": ("unowned", "nothing"),
    "copes": ("handled", "shut_down"),
}

# {VM: how the first sentence of its advice begins}
SENTENCES = {
    "loops": "stop loops and start it again: its VMM goes back to the lost page",
    "stops": "stop stops and start it again: the vCPU that was notified",
    "refused": "shut refused down from inside the guest and start it again: guest_memfd refused",
    "ahead": "shut ahead down from inside the guest and start it again: its VMM was notified",
    "untouched": "shut untouched down from inside the guest and start it again: its guest has not",
    "copes": "at the next opportunity shut copes down from inside the guest",
}


def all_at_once(machine: Machine, source: str) -> None:
    """Pages in every state at once: the worst comes first, everywhere, with what to do."""
    if not can_inject_poison(machine):
        raise Unstageable("no hwpoison-inject")
    end_following(machine)
    serve = start_serve(machine, f"--source {source}")
    vmms: dict[str, Vmm] = {}
    try:
        pfns = _stage(machine, vmms)
        incidents = _expected(machine, pfns)
        _assert_order(machine, serve, [incidents[name]["id"] for name in EXPECTED])
        for name, begin in SENTENCES.items():
            _assert_explained(machine, name, vmms[name].pid, incidents[name], begin)
        _carry_out(machine, vmms["loops"], incidents["loops"])
    finally:
        for vmm in vmms.values():
            vmm.job.kill()
        serve.signal(signal.SIGINT)
        assert serve.wait(PATIENCE) == 0, serve.stderr


def _stage(machine: Machine, vmms: dict[str, Vmm]) -> dict[str, int]:
    """Stage all states; add the VMMs to ``vmms``, return {name: pfn}."""
    pfns = {}
    for name in ("loops", "stops", "refused", "untouched", "copes"):
        vmm = vmms[name] = Vmm(machine, name)
        vmm.step("create v backing=gmem pages=32")
        vmm.step("touch v +3")
        pfns[name] = vmm.step("poison v +3")["pfn"]
    ahead = vmms["ahead"] = Vmm(machine, "ahead")
    ahead.step("earlykill on")
    ahead.step("create v backing=anon")
    pfns["ahead"] = ahead.step("pfn v +3")["pfn"]
    # By another process: a signal from a thread's own madvise is no delivery.
    hammer = Vmm(machine, "hammer")
    hammer.step(f"poison pfn={pfns['ahead']}")
    hammer.end()
    pfns |= poisoned(machine, "slab", "free")
    assert vmms["refused"].step("prefault v +3", may_fail=True).get("errno") == "EHWPOISON"
    for name in ("stops", "copes"):
        assert vmms[name].step("touch v +3")["errno"] == "EHWPOISON"
    vmms["copes"].step("pio v 1000000000 bg=1")
    vmms["loops"].step("loop v +3 1000000000 gap_us=20000 bg=1")
    return pfns


def _expected(machine: Machine, pfns: dict[str, int]) -> dict[str, Line]:
    """Wait until ``top --json`` has what is expected; return {name: incident}."""
    deadline = time.monotonic() + PATIENCE
    while True:
        shown = json.loads(_run(machine, "top", "--once", "--json"))
        by_pfn = {incident.get("pfn"): incident for incident in shown["incidents"]}
        found = {name: by_pfn.get(pfn, {}) for name, pfn in pfns.items()}
        judged = {
            name: (one.get("urgency"), one["actions"][0]["kind"] if one else None)
            for name, one in found.items()
        }
        if judged == EXPECTED:
            return found
        assert time.monotonic() < deadline, judged
        time.sleep(1)


def _assert_order(machine: Machine, serve: Job, ids: Sequence[str]) -> None:
    """All tables have the worst first, and the words."""
    for text in (_run(machine, "top", "--once"), page_of(machine, serve)):
        places = [text.index(one) for one in ids]
        assert places == sorted(places), text
    rows = _run(machine, "top", "--once").splitlines()
    for one, (urgency, _) in zip(ids, EXPECTED.values(), strict=True):
        (row,) = [row for row in rows if one in row]
        assert urgency in row.split(), row


def _assert_explained(machine: Machine, name: str, pid: int, incident: Line, begin: str) -> None:
    (told,) = json.loads(_run(machine, "explain", name, "--json"))
    first = told["actions"][0]
    assert told["urgency"] == incident["urgency"]
    assert first["vm"] == {"pid": pid, "name": name}
    assert first["text"] == told["next"][0]
    assert first["text"].startswith(begin), first
    assert 0 < len(first["brief"]) <= 30
    # The lab's VMM is one with which nothing was tried.
    assert {action["kind"] for action in told["actions"]} == {first["kind"]}
    assert first["commands"] == ([f"kill {pid}"] if first["kind"] == "stop_and_start" else [])
    assert first["never"][0].startswith(f"do not migrate, save, snapshot or dump {name}: ")
    text = " ".join(_run(machine, "explain", name).split())
    assert re.search(re.escape(begin), text, re.IGNORECASE), text


def _carry_out(machine: Machine, vmm: Vmm, incident: Line) -> None:
    """Do what is advised for a VM that is stuck: it is over then."""
    for command in incident["actions"][0]["commands"]:
        machine.run(command, check=True)
    vmm.job.wait(PATIENCE)
    deadline = time.monotonic() + PATIENCE
    while True:
        (told,) = json.loads(_run(machine, "explain", incident["id"], "--json"))
        if told["urgency"] == "closed":
            break
        assert time.monotonic() < deadline, told
        time.sleep(0.5)
    assert [action["kind"] for action in told["actions"]] == ["nothing"]


def _run(machine: Machine, *arguments: str) -> str:
    result = machine.run(["kvmtrace", *arguments], timeout=PATIENCE, check=True)
    return result.stdout


# It needs a machine of its own: the kernel's page stays poisoned.
ALL_AT_ONCE = Scenario(all_at_once, boot={"memory": "1500M"})
