"""From the machine check to the VMM's reaction: each verdict staged by a VMM that behaves so."""

from __future__ import annotations

import contextlib
import json
import signal
import time
from collections.abc import Callable, Iterator

import pytest

from tests.lab.drive import PATIENCE, Line, Vmm, told_by
from tests.lab.machine import Machine
from tests.lab.vmm import private_vms

pytestmark = pytest.mark.lab

LOG = "/tmp/verdicts.jsonl"


@contextlib.contextmanager
def recorded(machine: Machine, source: str = "bpf") -> Iterator[None]:
    """What happens in the block is in ``LOG`` afterwards."""
    job = machine.start(f"exec kvmtrace record {LOG} --force --source {source}")
    job.wait_for(r"recording to", timeout=PATIENCE, stream="stderr")
    try:
        yield
        time.sleep(1)
    finally:
        job.signal(signal.SIGINT)
        assert job.wait(PATIENCE) == 0, job.stderr


def explain(machine: Machine, target: str) -> Line:
    """The one incident of a VM or page, as the recording tells it."""
    result = machine.run(
        ["kvmtrace", "explain", target, "--json", "--from", LOG], timeout=PATIENCE, check=True
    )
    (incident,) = json.loads(result.stdout)
    return dict(incident)


def poisoned(machine: Machine, name: str) -> tuple[Vmm, Line]:
    vmm = Vmm(machine, name)
    vmm.step("create v backing=gmem pages=32")
    vmm.step("touch v +3")
    return vmm, vmm.step("poison v +3")


def test_each_verdict(machine: Machine) -> None:
    with recorded(machine):
        vmms = {name: poisoned(machine, name) for name in ("exits", "stops", "copes", "loops")}
        for name in ("exits", "stops", "copes"):
            assert vmms[name][0].step("touch v +3")["errno"] == "EHWPOISON"
        vmms["exits"][0].end()
        vmms["copes"][0].step("pio v 1000000000 bg=1")
        vmms["loops"][0].step("loop v +3 1000000 gap_us=20000 bg=1")
        time.sleep(8)
    for name, verdict in (
        ("exits", "exited"),
        ("stops", "stopped"),
        ("copes", "handled"),
        ("loops", "looping"),
    ):
        told = explain(machine, name)
        assert told["verdict"] == verdict, told
        assert told["pfn"] == vmms[name][1]["pfn"]
        assert [owner["gfn"] for owner in told["owners"]] == [vmms[name][1]["gfn"]]
        assert told["verdicts"][0]["evidence"]
    assert explain(machine, "loops")["state"] == "looping"
    assert explain(machine, "exits")["state"] == "closed"
    assert explain(machine, "exits")["owners"][0]["vm"]["name"] == "exits"
    for name in ("stops", "copes", "loops"):
        vmms[name][0].job.signal(signal.SIGKILL)


def test_a_machine_check_and_the_poison_that_follows(machine: Machine) -> None:
    with recorded(machine):
        vmm = Vmm(machine, "checked")
        vmm.step("create v backing=gmem pages=32")
        vmm.step("touch v +3")
        # Valid, uncorrected, address and MISC valid; MISC: exact to 64 bytes.
        vmm.step(f"mce v +3 status={0xBD80000000100134} misc={0x86} bank=7")
        poison = vmm.step("poison v +3")
        time.sleep(1)
        vmm.end()
    told = explain(machine, hex(poison["pfn"]))
    assert told["pfn"] == poison["pfn"]
    assert told["origin"]["bank"] == 7
    assert told["origin"]["severity"] == "recoverable"
    whats = [moment["what"] for moment in told["timeline"]]
    assert "machine check" in whats[0]
    assert any("poisoned" in what for what in whats[1:])


def test_conversions_beside_a_real_poison(boot: Callable[..., Machine]) -> None:
    machine = boot()
    private_vms.offer(machine)
    with recorded(machine):
        busy = Vmm(machine, "confidential")
        busy.step("create p private=1 backing=gmem")
        vmm, poison = poisoned(machine, "sick")
        busy.step("convert p +1 50000", patience=10 * PATIENCE)
        vmm.step("touch v +3")
        busy.step("convert p +1 50000", patience=10 * PATIENCE)
        truth = busy.end()
        report = vmm.end()
    told = explain(machine, "sick")
    assert (told["pfn"], told["deliveries"]) == (poison["pfn"], {"exits": 1, "sigbus": 0})
    shown = json.loads(
        machine.run(f"kvmtrace replay {LOG} --json", timeout=PATIENCE, check=True).stdout
    )
    assert len(shown["incidents"]) == 1
    causes = {vm["name"]: vm["causes"] for vm in shown["vms"]}
    assert causes["confidential"] == {"conversion": sum(told_by(truth).values())}
    assert causes["sick"] == {"hwpoison": sum(told_by(report).values())}
