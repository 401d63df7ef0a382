"""Pages in every state at once: which comes first, what it is called, and what to do.

The lab's VMM stages each state by how it behaves. What kvmtrace advises for the VMs that are stuck
is carried out, and ends the incidents: one VM is a process that nothing is known to start again,
the other one a unit of systemd where the root has it.
"""

from __future__ import annotations

import contextlib
import html
import json
import re
import time
from collections.abc import Mapping, Sequence

from tests.lab.harness import (
    PATIENCE,
    Line,
    Unstageable,
    Vmm,
    can_inject_poison,
    end_following,
    pages_of,
    serving,
)
from tests.lab.kernel_pages import poisoned
from tests.lab.machine import Job, Machine
from tests.lab.scenarios import Scenario
from tests.lab.units import pid_of, start_unit, systemd, unit_of

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

# Those whose pages of serve are looked at: each takes seconds under emulation.
WITH_PAGES = ("loops", "stops", "slab", "untouched")

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
    with contextlib.ExitStack() as stack:
        with_units = True
        try:
            stack.enter_context(systemd(machine))
        except Unstageable:
            with_units = False
        serve = stack.enter_context(serving(machine, f"--source {source}"))
        vmms: dict[str, Vmm] = {}
        stack.callback(_kill, vmms)
        pfns = _stage(machine, vmms, with_units=with_units)
        incidents = _expected(machine, pfns)
        _assert_order(machine, incidents)
        _assert_pages(machine, serve, incidents)
        commands = {
            "loops": [f"kill {vmms['loops'].pid}"],
            "stops": [f"systemctl restart {unit_of('stops')}"]
            if with_units
            else [f"kill {vmms['stops'].pid}"],
        }
        explained = {one["id"]: one for one in json.loads(_run(machine, "explain", "--json"))}
        for name in SENTENCES:
            told = explained[incidents[name]["id"]]
            _assert_explained(told, name, vmms[name].pid, commands.get(name, []))
        for name, lines in commands.items():
            text = " ".join(_run(machine, "explain", name).split())
            for part in (SENTENCES[name], *lines):
                assert re.search(re.escape(part), text, re.IGNORECASE), text
        for name, lines in commands.items():
            _carry_out(machine, incidents[name], lines)
        assert vmms["loops"].job.wait(PATIENCE) != 0
        if with_units:
            assert pid_of(machine, "stops") != vmms["stops"].pid


def _kill(vmms: Mapping[str, Vmm]) -> None:
    for vmm in vmms.values():
        vmm.job.kill()


def _stage(machine: Machine, vmms: dict[str, Vmm], *, with_units: bool) -> dict[str, int]:
    """Stage all states; add the VMMs to ``vmms``, return {name: pfn}."""
    pfns = {}
    for name in ("loops", "stops", "refused", "untouched", "copes"):
        is_unit = with_units and name == "stops"
        vmm = vmms[name] = start_unit(machine, name) if is_unit else Vmm(machine, name)
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


def _assert_order(machine: Machine, incidents: Mapping[str, Line]) -> None:
    """`top` has the worst first, and the words."""
    text = _run(machine, "top", "--once")
    _assert_sorted(text, incidents)
    for name, (urgency, _) in EXPECTED.items():
        (row,) = [row for row in text.splitlines() if incidents[name]["id"] in row]
        assert urgency in row.split(), row


def _assert_sorted(text: str, incidents: Mapping[str, Line]) -> None:
    places = [text.index(incidents[name]["id"]) for name in EXPECTED]
    assert places == sorted(places), text


def _assert_pages(machine: Machine, serve: Job, incidents: Mapping[str, Line]) -> None:
    """The landing page has the worst first, and what to do; so have the pages of incidents."""
    paths = {name: f"incident/{incidents[name]['id']}" for name in EXPECTED}
    landing, *pages = pages_of(machine, serve, "", *(paths[name] for name in WITH_PAGES))
    table = landing[landing.index("<tbody>") :]
    _assert_sorted(table, incidents)
    rows = [html.unescape(row) for row in table.split("<tr")]
    for name, (urgency, _) in EXPECTED.items():
        (row,) = [row for row in rows if f'"/{paths[name]}"' in row]
        assert urgency in row
        assert incidents[name]["actions"][0]["brief"] in row
    for name, page in zip(WITH_PAGES, map(html.unescape, pages), strict=True):
        first = incidents[name]["actions"][0]
        assert f"<title>{EXPECTED[name][0]}: " in page
        assert re.search(re.escape(first["text"]), page, re.IGNORECASE), page
        for command in first["commands"]:
            assert f'<pre class="command">{command}</pre>' in page


def _assert_explained(told: Line, name: str, pid: int, commands: Sequence[str]) -> None:
    first = told["actions"][0]
    assert told["urgency"] == EXPECTED[name][0]
    assert first["vm"] == {"pid": pid, "name": name}
    assert first["text"] == told["next"][0]
    assert first["text"].startswith(SENTENCES[name]), first
    assert 0 < len(first["brief"]) <= 30
    # The lab's VMM is one with which nothing was tried.
    assert {action["kind"] for action in told["actions"]} == {first["kind"]}
    assert first["commands"] == commands
    assert first["never"][0].startswith(f"do not migrate, save, snapshot or dump {name}: ")


def _carry_out(machine: Machine, incident: Line, commands: Sequence[str]) -> None:
    """Type what is advised for a VM that is stuck: it is over then."""
    for command in commands:
        machine.run(command, check=True)
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
