"""From machine check to verdict: each verdict is staged by a VMM with that behaviour."""

from __future__ import annotations

import json
import re
import signal
import time
from collections.abc import Callable

import pytest

from kvmtrace.model import VerdictWord
from kvmtrace.sources import limits
from tests.lab.harness import (
    PATIENCE,
    Line,
    Vmm,
    exits_returned,
    metrics_of,
    recorded,
    replayed,
    replayed_lines,
    start_serve,
)
from tests.lab.machine import Machine
from tests.lab.vmm import private_vms

pytestmark = pytest.mark.lab

LOG = "/tmp/verdicts.jsonl"


def explain(machine: Machine, target: str) -> Line:
    """The one incident of a VM or page, from the recording."""
    result = machine.run(
        ["kvmtrace", "explain", target, "--json", "--from", LOG], timeout=PATIENCE, check=True
    )
    (incident,) = json.loads(result.stdout)
    return dict(incident)


EVIDENCE = {
    "exited": r"the VM was gone [\d.]+ s after it was first notified",
    "stopped": r"vCPU 0 \(thread \d+\) sleeps outside KVM_RUN, [\d.]+ s after it was notified",
    "handled": r"vCPU 0 .* CPU time since not notified of this page again since",
    "looping": r"vCPU 0 was notified \d+ times in [\d.]+ s, [\d.]+ a second",
}


def poisoned(machine: Machine, name: str, backing: str = "gmem") -> tuple[Vmm, Line]:
    vmm = Vmm(machine, name)
    vmm.step(f"create v backing={backing} pages=32")
    vmm.step("touch v +3")
    return vmm, vmm.step("poison v +3")


def test_each_verdict(machine: Machine) -> None:
    with recorded(machine, "bpf", LOG):
        vmms = {name: poisoned(machine, name) for name in ("exits", "stops", "copes", "loops")}
        vmms["mends"] = poisoned(machine, "mends", "anon")
        for name in ("exits", "stops", "copes"):
            assert vmms[name][0].step("touch v +3")["errno"] == "EHWPOISON"
        mends = vmms["mends"][0]
        assert mends.step("touch v +3", may_fail=True)["sigbus"]
        time.sleep(2)  # a page that is replaced at once is missed
        mends.step("remap v +3")
        assert mends.step("touch v +3")["ok"]
        mends.step("pio v 1000000000 bg=1")
        vmms["exits"][0].end()
        vmms["copes"][0].step("pio v 1000000000 bg=1")
        vmms["loops"][0].step("loop v +3 1000000 gap_us=20000 bg=1")
        time.sleep(8)
    for vmm, _ in vmms.values():
        vmm.job.kill()  # they would compete with `explain` for the CPUs
    for name, verdict in (
        ("exits", "exited"),
        ("stops", "stopped"),
        ("copes", "handled"),
        ("mends", "handled"),
        ("loops", "looping"),
    ):
        incident = explain(machine, name)
        assert incident["verdict"] == verdict, incident
        assert incident["pfn"] == vmms[name][1]["pfn"]
        assert [owner["gfn"] for owner in incident["owners"]] == [vmms[name][1]["gfn"]]
        evidence = " ".join(incident["verdicts"][0]["evidence"])
        assert re.search(EVIDENCE[verdict], evidence), evidence
    mended = explain(machine, "mends")
    assert [owner["released"] for owner in mended["owners"]] == [True]
    assert "has no longer that page" in " ".join(mended["verdicts"][0]["evidence"])
    assert explain(machine, "loops")["state"] == "looping"
    assert explain(machine, "exits")["state"] == "closed"
    assert explain(machine, "exits")["owners"][0]["vm"]["name"] == "exits"


def test_a_machine_check_and_the_poison_that_follows(machine: Machine) -> None:
    with recorded(machine, "bpf", LOG):
        vmm = Vmm(machine, "checked")
        vmm.step("create v backing=gmem pages=32")
        vmm.step("touch v +3")
        # Valid, uncorrected, address and MISC valid, poison (the CPU is AMD's: a physical address).
        vmm.step(f"mce v +3 status={0xBD80080000100134} misc={0x86} bank=7")
        poison = vmm.step("poison v +3")
        time.sleep(1)
        vmm.end()
    incident = explain(machine, hex(poison["pfn"]))
    assert incident["pfn"] == poison["pfn"]
    assert incident["origin"]["bank"] == 7
    assert incident["origin"]["severity"] == "recoverable"
    assert incident["origin"]["consumer_cpu"] == incident["origin"]["cpu"]
    assert "socket" not in incident["origin"]
    whats = [moment["what"] for moment in incident["timeline"]]
    assert "machine check" in whats[0]
    assert any("poisoned" in what for what in whats[1:])


def test_what_is_never_delivered(machine: Machine) -> None:
    """guest_memfd refuses the page outside KVM_RUN: a counter that starts at 0, and `explain`."""
    serve = start_serve(machine, "--source bpf")

    def metrics() -> set[str]:
        return set(metrics_of(machine, serve).splitlines())

    try:
        vmm, poison = poisoned(machine, "swallowed")
        series = 'kvmtrace_undelivered_total{vm="swallowed"} '
        born = metrics()
        assert f"{series}0.0" in born
        words = {f'kvmtrace_incident_verdicts{{verdict="{word}"}}' for word in VerdictWord}
        assert words <= {line.rpartition(" ")[0] for line in born}
        for number in (1, 2):
            assert vmm.step("prefault v +3", may_fail=True)["errno"] == "EHWPOISON"
            deadline = time.monotonic() + PATIENCE
            # No other events happen meanwhile.
            while f"{series}{number}.0" not in metrics():
                assert time.monotonic() < deadline
                time.sleep(0.5)
        explain_command = ["kvmtrace", "explain", hex(poison["pfn"])]
        (incident,) = json.loads(
            machine.run([*explain_command, "--json"], timeout=PATIENCE, check=True).stdout
        )
        assert (incident["undelivered"], incident["deliveries"]) == (2, {"exits": 0, "sigbus": 0})
        assert incident["state"] == "latent"
        page = f"the lost page (gfn {poison['gfn']:#x})"
        assert incident["next"] == [
            "shut swallowed down from inside the guest and start it again: guest_memfd refused "
            f"{page} 2 times, and no VMM was notified",
            "until then do not migrate, save, snapshot or dump swallowed: each of these reads "
            "every page, the lost one too",
        ]
        text = machine.run(explain_command, timeout=PATIENCE, check=True).stdout
        assert "2 refusals by guest_memfd of which KVM_RUN did not notify the VMM" in text
        assert all(len(line) <= 80 for line in text.splitlines())
        vmm.end()
    finally:
        serve.signal(signal.SIGINT)
        assert serve.wait(PATIENCE) == 0, serve.stderr


def test_pages_that_are_moved_or_mended(machine: Machine) -> None:
    """Soft-offlined and unpoisoned pages: the first is no poison, the second a closed incident."""
    with recorded(machine, "bpf", LOG):
        moved, mended = Vmm(machine, "moved"), Vmm(machine, "mended")
        for vmm in (moved, mended):
            vmm.step("create v backing=anon pages=32")
            vmm.step("touch v +3")
        soft = moved.step("pfn v +3")["pfn"]
        place = "/sys/devices/system/memory/soft_offline_page"
        machine.run(f"echo {soft << 12:#x} > {place}", check=True)
        poison = mended.step("poison v +3 how=inject")
        mended.step("unpoison v +3")
        time.sleep(1)
        for vmm in (moved, mended):
            vmm.end()
    story = machine.run(f"kvmtrace explain {soft:#x} --from {LOG}", timeout=PATIENCE, check=True)
    told = " ".join(story.stdout.split())
    assert "soft-offlined; its contents were moved, no guest is harmed" in told
    incident = explain(machine, hex(poison["pfn"]))
    assert (incident["state"], incident.get("verdict")) == ("closed", None)
    assert any("unpoisoned" in moment["what"] for moment in incident["timeline"])
    assert incident["next"] == ["nothing: the page is no longer poisoned"]


def test_conversions_beside_a_real_poison(boot: Callable[..., Machine]) -> None:
    """Conversions of one page repeatedly, and of more pages than the eBPF source has counters."""
    machine = boot()
    private_vms.offer(machine)
    pages = limits.MAX_KEYS + 600
    with recorded(machine, "bpf", LOG):
        busy = Vmm(machine, "confidential")
        busy.step(f"create p private=1 backing=gmem pages={pages + 8}")
        busy.step(f"convert p +1 1 pages={pages}", patience=10 * PATIENCE)
        vmm, poison = poisoned(machine, "sick")
        busy.step("convert p +1 50000", patience=10 * PATIENCE)
        vmm.step("touch v +3")
        busy.step("convert p +2 5000", patience=10 * PATIENCE)
        truth = busy.end()
        report = vmm.end()
    incident = explain(machine, "sick")
    assert (incident["pfn"], incident["deliveries"]) == (poison["pfn"], {"exits": 1, "sigbus": 0})
    shown = replayed(machine, LOG)
    assert len(shown["incidents"]) == 1
    causes = {vm["name"]: vm["causes"] for vm in shown["vms"]}
    assert sum(exits_returned(truth).values()) == pages + 55_000
    assert causes["confidential"] == {"conversion": pages + 55_000}
    assert causes["sick"] == {"hwpoison": sum(exits_returned(report).values())}
    assert shown["lost"] == {}
    exit_lines = _exits(machine, "confidential")
    addresses = {key[5] for key in exits_returned(truth)}
    for line in exit_lines:
        assert (line["vcpu"], line["reason"], line["annotated"]) == (0, 39, True)
        # A line has an address only if all exits that it counts have that one.
        assert line.get("gpa") in (addresses if line["count"] == 1 else {None, *addresses})
    assert any("gpa" not in line for line in exit_lines)
    (of_sick,) = _exits(machine, "sick")
    assert (of_sick["gfn"], of_sick["vcpu"]) == (poison["gfn"], 0)


def _exits(machine: Machine, name: str) -> list[Line]:
    """The exits of a VM, from the recording."""
    events = replayed_lines(machine, LOG)
    return [x for x in events if x["kind"] == "exit" and x["vm"]["name"] == name]
