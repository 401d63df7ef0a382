"""Errors that start in the hardware, here QEMU's: nobody but the kernel itself poisons the page.

The emulated CPU is AMD's. A corrected error in a machine check bank is found by the kernel's poll;
a deferred one (the data is bad, nobody has used it yet) makes it call memory_failure by itself.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator

import pytest

from tests.lab.conftest import prepared
from tests.lab.drive import PATIENCE, Line, Vmm, watching
from tests.lab.machine import DEFAULT, Machine

pytestmark = pytest.mark.lab

BANK = 4  # of a machine whose CPU has ten; on AMD, the memory controller's
# MCi_STATUS: valid, enabled, address valid; deferred; a bus error at memory, ECC
CORRECTED = 1 << 63 | 1 << 60 | 1 << 58 | 0x080A13
DEFERRED = CORRECTED | 1 << 44
# The poll's interval is in seconds, and starts anew when it is written.
POLL = "echo 1 | tee /sys/devices/system/machinecheck/machinecheck*/check_interval"


@pytest.fixture(scope="module")
def failing(pytestconfig: pytest.Config) -> Iterator[Machine]:
    """A machine apart: after an error of the hardware's the kernel unpoisons no page any more."""
    prepared(pytestconfig, DEFAULT)
    with Machine.boot(DEFAULT) as machine:
        yield machine


def _error(machine: Machine, status: int, addr: int) -> None:
    """An error in the bank of the first CPU; what it held before must have been read."""
    said = machine.qmp(
        "human-monitor-command", **{"command-line": f"mce 0 {BANK} {status:#x} 0 {addr:#x} 0"}
    )
    assert not said["return"], said


def _checks(count: int) -> Callable[[list[Line]], bool]:
    return lambda lines: sum(x["kind"] == "mce" for x in lines) >= count


@pytest.mark.parametrize("source", ["bpf", "ftrace"])
def test_from_the_memory_controller_to_the_vmm(failing: Machine, source: str) -> None:
    machine = failing
    machine.run(POLL, check=True)
    vmm = Vmm(machine, f"failing-{source}")
    vmm.step("create v backing=gmem pages=32")
    vmm.step("touch v +3")
    page = vmm.step("pfn v +3")
    addr = (page["pfn"] << 12) + 0x240
    log = f"/tmp/hardware-{source}.jsonl"
    recorder = machine.start(f"exec kvmtrace record {log} --force --source {source}")
    recorder.wait_for(r"recording to", timeout=PATIENCE, stream="stderr")
    with watching(machine, source) as watch:
        for number in (1, 2):
            _error(machine, CORRECTED, addr)
            watch.until(_checks(number), f"corrected error {number}")
        assert not [x for x in watch.lines() if x["kind"] == "poison"]
        _error(machine, DEFERRED, addr)
        lines = watch.until(lambda ls: [x for x in ls if x["kind"] == "poison"], "the poison")
        (poison,) = [x for x in lines if x["kind"] == "poison"]
        assert poison["pfn"] == page["pfn"]
        assert [x["addr"] for x in lines if x["kind"] == "mce"] == [addr] * 3
        (owner,) = poison["owners"]
        assert owner["vm"]["pid"] == vmm.pid
        assert owner.get("gfn", source) in (page["gfn"], "ftrace")
        assert not [x for x in lines if x["kind"] in ("exit", "sigbus")]

        told = vmm.step("touch v +3", may_fail=True)
        assert told["errno"] == "EHWPOISON"
        watch.until(lambda ls: [x for x in ls if x["kind"] == "exit"], "the delivery")
    recorder.signal(2)
    assert recorder.wait(PATIENCE) == 0, recorder.stderr
    vmm.end()

    asked = ["kvmtrace", "explain", hex(page["pfn"]), "--from", log]
    print(machine.run(asked, timeout=PATIENCE, check=True).stdout)
    shown = machine.run([*asked, "--json"], timeout=PATIENCE, check=True).stdout
    (incident,) = json.loads(shown)
    assert incident["deliveries"] == {"exits": 1, "sigbus": 0}
    origin = incident["origin"]
    assert (origin["socket"], origin["bank"], origin["addr"]) == (0, BANK, addr)
    assert origin["severity"] == "deferred"
    assert (origin["errors"]["count"], origin["errors"]["corrected"]) == (3, 2)
    whats = [(moment["what"], moment["count"]) for moment in incident["timeline"]]
    assert whats[0] == (f"corrected error by machine check: bank {BANK}, CPU 0, socket 0", 2)
    assert whats[1] == (f"deferred error by machine check: bank {BANK}, CPU 0, socket 0", 1)
    assert "poisoned" in " ".join(what for what, _ in whats[2:4])
    assert "EHWPOISON" in whats[-1][0] + whats[-2][0]
