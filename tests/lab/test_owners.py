"""Owners of a poisoned page, found before the guest touches it; see owners.py."""

from __future__ import annotations

import functools
import re
import signal
import time
from collections.abc import Callable

import pytest

from tests.lab.harness import PATIENCE, Vmm, recorded, replayed, replayed_lines, watching
from tests.lab.machine import Machine
from tests.lab.owners import deliveries, owners_before_any_touch, owners_of, poison_of

pytestmark = pytest.mark.lab


def test_owners_before_any_touch(machine: Machine) -> None:
    owners_before_any_touch(machine, "bpf")


def test_an_older_guest_memfd_by_ftrace(boot: Callable[..., Machine]) -> None:
    """If no probe leads from the page to its VM, /proc shows who has its guest_memfd open.

    One VM has the page mapped, so that page tables would do; the other has unmapped it.
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


def test_one_page_of_two_vms_that_ksm_merged(machine: Machine) -> None:
    """Both VMs own it, by their page tables, and `explain` shows it."""
    source = "bpf"
    vmms = [Vmm(machine, name) for name in ("left", "right")]
    for vmm in vmms:
        vmm.step("create v backing=anon pages=64")
        vmm.step("touch v +3")
        vmm.step("merge v +3")
    machine.run(
        "cd /sys/kernel/mm/ksm && echo 10 > sleep_millisecs && echo 1000 > pages_to_scan"
        " && echo 1 > run",
        check=True,
    )
    (pfn,) = {vmm.step("merge v +3 wait=60")["pfn"] for vmm in vmms}
    machine.run("echo 0 > /sys/kernel/mm/ksm/run", check=True)
    with recorded(machine, source) as log, watching(machine, source) as watch:
        vmms[0].step(f"poison pfn={pfn}", may_fail=True)
        (reported,) = poison_of(pfn)(watch.until(poison_of(pfn), "the poison"))
        assert {owner["vm"]["pid"] for owner in reported["owners"]} == {vmm.pid for vmm in vmms}
        for owner in reported["owners"]:
            assert owner.get("gfn", source) in (0x103, "ftrace")
        for vmm in vmms:
            assert vmm.step("touch v +3", may_fail=True)["sigbus"]
        watch.until(lambda ls: len(deliveries(ls, reported["incident"])) >= 2, "both deliveries")
    story = machine.run(
        f"kvmtrace explain {pfn:#x} --from {log}", timeout=PATIENCE, check=True
    ).stdout
    assert re.search(r"^  shared by 2 VMs:$", story, re.MULTILINE)
    for vmm in vmms:
        vmm.end()


# Maps a file and reads a page of it: PATH OFFSET [early]. With "early" it gets a SIGBUS at the
# poisoning, otherwise its next read kills it.
_READER = """
import ctypes, mmap, os, signal, sys
early = len(sys.argv) > 3
if early:
    ctypes.CDLL(None).prctl(33, 1, 1, 0, 0)  # PR_MCE_KILL, PR_MCE_KILL_SET, PR_MCE_KILL_EARLY
    signal.signal(signal.SIGBUS, lambda number, frame: print("notified", flush=True))
memory = mmap.mmap(os.open(sys.argv[1], os.O_RDWR), 0)
at = int(sys.argv[2])
memory[at]
print("mapped", os.getpid(), flush=True)
sys.stdin.readline()
if not early:
    memory[at]
"""


@pytest.mark.parametrize("source", ["bpf", "ftrace"])
def test_a_program_that_has_a_vms_page_mapped_is_no_vm(machine: Machine, source: str) -> None:
    """One reader gets SIGBUS early, one dies of its read; the guest has not touched the page."""
    machine.run("cat > /tmp/reader.py", stdin=_READER, check=True)
    vmm = Vmm(machine, "shares")
    vmm.step("create v backing=memfd pages=64")
    vmm.step("touch v +3")
    place = vmm.step("pfn v +3")
    fd = vmm.step("info v")["slots"][0]["fd"]
    reads = f"exec python3 /tmp/reader.py /proc/{vmm.pid}/fd/{fd} {3 << machine.page_shift}"
    with recorded(machine, source) as log:
        reader, victim = machine.start(f"{reads} early"), machine.start(reads)
        for job in (reader, victim):
            job.wait_for(r"mapped \d+\n", timeout=PATIENCE)
        hammer = Vmm(machine, "hammer")
        hammer.step(f"poison pfn={place['pfn']}")
        hammer.end()
        reader.wait_for("notified", timeout=PATIENCE)
        for job in (victim, reader):
            job.close_stdin()
        assert victim.wait(PATIENCE) in (-signal.SIGBUS, 128 + signal.SIGBUS)
        assert reader.wait(PATIENCE) == 0
    signals = [x for x in replayed_lines(machine, log) if x["kind"] == "sigbus"]
    assert not [x for x in signals if "vm" in x], signals
    killed = {x["code"]: x["process"] for x in signals}
    assert killed["AO"] == {"pid": int(reader.stdout.split()[1]), "name": "python3"}
    assert killed["AR"] == {"pid": int(victim.stdout.split()[1]), "name": "python3"}
    incidents = replayed(machine, log)["incidents"]
    (incident,) = [x for x in incidents if x["pfn"] == place["pfn"]]
    assert (incident["state"], incident["deliveries"]) == ("latent", {"exits": 0, "sigbus": 0})
    # The page by which the other one died may be unknown.
    assert incident["sigbus_to_others"] in (1, 2)
    assert {owner["vm"]["pid"] for owner in incident["owners"]} == {vmm.pid}
    vmm.end()


def test_a_large_sparse_vm_holds_nobody_up(machine: Machine) -> None:
    """Owners in 3 GiB of address space are found as fast as in 256 KiB."""
    vmm = Vmm(machine, "large")
    vmm.step(f"create v backing=anon pages={3 << 18}")
    vmm.step("touch v +3")
    with watching(machine, "bpf") as watch:
        begin = time.monotonic()
        poison = vmm.step("poison v +3 how=inject")
        lines = watch.until(poison_of(poison["pfn"]), "the poison")
        assert time.monotonic() - begin < 10
        (reported,) = poison_of(poison["pfn"])(lines)
        watch.until(functools.partial(owners_of, reported["incident"]), "its owner")
        assert set(owners_of(reported["incident"], watch.lines())) == {(vmm.pid, poison["gfn"])}
    vmm.end()
