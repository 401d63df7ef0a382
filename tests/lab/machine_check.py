"""Hardware errors of an x86 host: machine checks, from the error to the VMM's reaction.

`kvmtrace serve` runs, as it does on a host; `events`, `top` and `explain` connect to it. Tests and
the matrix run the same functions. After a hardware error the kernel refuses to unpoison any page,
so these scenarios need a machine of their own.
"""

from __future__ import annotations

import contextlib
import json
import signal
import time
import weakref
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

from tests.lab import mca
from tests.lab.harness import (
    PATIENCE,
    Line,
    Unstageable,
    Vmm,
    Watch,
    exits_reported,
    exits_returned,
    start_serve,
)
from tests.lab.machine import Job, Machine
from tests.lab.owners import owners_of, poison_of
from tests.lab.scenarios import Scenario, vms_gone

# Without the modules that inject poison.
BOOT: dict[str, Any] = {"modules": ("kvm-amd",)}
INTEL_BOOT: dict[str, Any] = {"modules": (), "cpu": "intel"}


class _Served(NamedTuple):
    source: str
    serve: Job
    events: Job


_served: weakref.WeakKeyDictionary[Machine, _Served] = weakref.WeakKeyDictionary()


@contextlib.contextmanager
def served(machine: Machine, source: str) -> Iterator[Watch]:
    """Watch what a serve with ``source`` reports; it keeps running for the next scenario."""
    now = _served.get(machine)
    if now is None or now.source != source:
        end_serving(machine)
        serve = start_serve(machine, f"--source {source}")
        now = _served[machine] = _Served(source, serve, Watch(machine, "auto").job)
    yield Watch(machine, "auto", job=now.events)


def end_serving(machine: Machine) -> None:
    """End the serve and the `events` connected to it."""
    now = _served.pop(machine, None)
    for job in () if now is None else (now.events, now.serve):
        job.signal(signal.SIGINT)
        assert job.wait(PATIENCE) == 0, job.stderr


def _checks(lines: list[Line], address: int) -> list[Line]:
    return [x for x in lines if x["kind"] == "mce" and x.get("addr") == address]


def _checked(address: int, times: int) -> Callable[[list[Line]], bool]:
    return lambda lines: len(_checks(lines, address)) == times


def _incident(machine: Machine, pfn: int) -> Line | None:
    """The incident of a page by `top --once --json`; None if there is none."""
    shown = machine.run("kvmtrace top --once --json", timeout=PATIENCE, check=True)
    found = [x for x in json.loads(shown.stdout)["incidents"] if x.get("pfn") == pfn]
    assert len(found) < 2, found
    return dict(found[0]) if found else None


def _explained(machine: Machine, pfn: int) -> Line:
    shown = machine.run(f"kvmtrace explain --json {pfn:#x}", timeout=PATIENCE, check=True)
    (incident,) = json.loads(shown.stdout)
    return dict(incident)


def _verdict(machine: Machine, pfn: int) -> Line:
    """Wait for the incident's verdict: kvmtrace samples the vCPU for some seconds."""
    deadline = time.monotonic() + PATIENCE
    while time.monotonic() < deadline:
        incident = _explained(machine, pfn)
        if incident.get("verdict") not in (None, "unknown"):
            return incident
    raise AssertionError(f"no verdict: {incident}")


def machine_check(machine: Machine, source: str, backing: str = "anon") -> None:
    """Two corrected errors and an uncorrected one: all up to the verdict is one incident."""
    mca.poll_often(machine)
    with served(machine, source) as watch:
        vmm = Vmm(machine, f"failing-{backing}")
        vmm.step(f"create v backing={backing} pages=32")
        vmm.step("touch v +3")
        page = vmm.step("pfn v +3")
        pfn, address = page["pfn"], mca.address_in(machine, page["pfn"])

        for number in (1, 2):
            mca.inject(machine, mca.CORRECTED, address)
            watch.until(_checked(address, number), f"error {number}")
        assert _incident(machine, pfn) is None, "corrected errors are no incident"

        mca.inject(machine, mca.LOST, address)
        (poison,) = poison_of(pfn)(watch.until(poison_of(pfn), "the poison"))
        latent = _incident(machine, pfn)
        touch = vmm.step("touch v +3", may_fail=True)
        incident = _verdict(machine, pfn)
        report = vmm.end()
        lines = watch.until(vms_gone(vmm.pid), "the VM's end")

    # Every error that hardware reported; AMD's register has no count.
    checks = _checks(lines, address)
    assert [(x["pfn"], x["bank"], x["cpu"], x["status"], x.get("count", 1)) for x in checks] == [
        (pfn, record.bank, mca.CPU, record.status, 1)
        for record in (mca.CORRECTED, mca.CORRECTED, mca.LOST)
    ]
    assert checks[-1]["ts"] < poison["ts"]
    # The owner is known before the guest touches the page.
    owners = set(owners_of(poison["incident"], lines))
    assert owners <= {(vmm.pid, page["gfn"]), (vmm.pid, None)}
    assert source == "ftrace" or owners == {(vmm.pid, page["gfn"])}
    assert latent is not None
    assert (latent["id"], latent["state"]) == (poison["incident"], "latent")
    assert latent["deliveries"] == {"exits": 0, "sigbus": 0}
    # The delivery, exactly as the VMM was notified.
    assert exits_reported(lines, vmm.pid) == exits_returned(report)
    (delivery,) = [
        line
        for line in lines
        if line["kind"] in ("exit", "sigbus") and line.get("vm", {}).get("pid") == vmm.pid
    ]
    if backing == "gmem":
        assert (touch["errno"], touch["reason"]) == ("EHWPOISON", 39), touch
        assert (delivery["errno"], delivery["gfn"]) == ("EHWPOISON", page["gfn"])
        assert incident["deliveries"] == {"exits": 1, "sigbus": 0}
    else:
        (signal_,) = touch["sigbus"]
        assert [signal_["code"], touch["tid"], signal_["hva"]] == [
            delivery[name] for name in ("code", "tid", "hva")
        ]
        assert incident["deliveries"] == {"exits": 0, "sigbus": 1}
    assert poison["ts"] < delivery["ts"]
    # One incident, from the first corrected error to the verdict.
    assert {delivery["incident"], incident["id"]} == {poison["incident"]}
    assert (incident["state"], incident["verdict"]) == ("delivered", "stopped")
    assert [owner["vm"]["name"] for owner in incident["owners"]] == [vmm.name]
    origin = incident["origin"]
    assert (origin["via"], origin["severity"]) == (["mce:mce_record"], "deferred")
    assert [origin[name] for name in ("addr", "bank", "status", "socket")] == [
        *(address, mca.LOST.bank, mca.LOST.status, 0)
    ]
    assert (origin["errors"]["count"], origin["errors"]["corrected"]) == (3, 2)
    corrected, lost, *others = incident["timeline"]
    assert (corrected["what"].partition(" ")[0], corrected["count"]) == ("corrected", 2)
    assert (lost["what"].partition(" ")[0], lost["count"]) == ("deferred", 1)
    assert "poisoned" in " ".join(moment["what"] for moment in others[:2])
    assert [x for x in lines if x["kind"] == "lost"] == []


def machine_check_gmem(machine: Machine, source: str) -> None:
    """``machine_check`` with a page of guest_memfd."""
    machine_check(machine, source, "gmem")


def machine_check_elsewhere(machine: Machine, source: str) -> None:
    """An error whose address is not physical is not related to a page."""
    mca.poll_often(machine)
    with served(machine, source) as watch:
        vmm = Vmm(machine, "elsewhere")
        vmm.step("create v backing=anon pages=32")
        vmm.step("touch v +3")
        pfn = vmm.step("pfn v +3")["pfn"]
        address = mca.address_in(machine, pfn)
        for number, record in enumerate((mca.NOT_PHYSICAL, mca.CORRECTED_NOT_PHYSICAL), 1):
            mca.inject(machine, record, address)
            watch.until(_checked(address, number), f"error {number}")
        # The kernel handles a record before it reads the next one.
        mca.inject(machine, mca.POISON_ELSEWHERE, address)
        watch.until(_checked(address, 3), "error 3")
        lines = watch.until(poison_of(pfn), "the poison")
        *others, lost = _checks(lines, address)
        poison = poison_of(pfn)(lines)[0]
        incident = _explained(machine, pfn)
        vmm.end()
    for check in others:
        assert not {"pfn", "incident"} & set(check), check
    assert lost["pfn"] == pfn
    if poison["ts"] < lost["ts"]:
        raise Unstageable("this kernel treats every address in an AMD bank as physical")
    origin = incident["origin"]
    assert origin["status"] == mca.POISON_ELSEWHERE.status
    assert (origin["errors"]["count"], origin["errors"].get("corrected", 0)) == (1, 0)


# An ordinary program instead of a VM: this machine has no KVM.
_PROGRAM = """
import ctypes, mmap, struct, sys
memory = mmap.mmap(-1, mmap.PAGESIZE)
memory[0] = 1
address = ctypes.addressof(ctypes.c_char.from_buffer(memory))
with open("/proc/self/pagemap", "rb") as pagemap:
    pagemap.seek(address // mmap.PAGESIZE * 8)
    print("pfn", struct.unpack("Q", pagemap.read(8))[0] & (1 << 55) - 1, flush=True)
sys.stdin.read()
"""


def machine_check_intel(machine: Machine, source: str) -> None:
    """Intel's registers have a count and the kind of address. No VM: the CPU has no SVM."""
    mca.poll_often(machine)
    program = machine.start(["python3", "-c", _PROGRAM])
    pfn = int(program.wait_for(r"pfn \d+\n", timeout=PATIENCE).split()[1])
    address = mca.address_in(machine, pfn)
    records = (mca.INTEL_LINEAR, mca.INTEL_UNKNOWN_MODE, mca.INTEL_THREE_CORRECTED, mca.INTEL_LOST)
    with served(machine, source) as watch:
        for number, record in enumerate(records, 1):
            mca.inject(machine, record, address)
            watch.until(_checked(address, number), f"error {number}")
        lines = watch.until(poison_of(pfn), "the poison")
        incident = _explained(machine, pfn)
        program.close_stdin()
    linear, unknown, corrected, lost = _checks(lines, address)
    assert [x.get("pfn") for x in (linear, unknown, corrected, lost)] == [None, None, pfn, pfn]
    assert corrected["count"] == 3
    assert [x["bank"] for x in (linear, unknown, corrected, lost)] == [mca.INTEL_BANK] * 4
    (poison,) = poison_of(pfn)(lines)
    assert poison["owners"] == []
    assert (incident["state"], incident["id"]) == ("unowned", poison["incident"])
    origin = incident["origin"]
    assert (origin["severity"], origin["addr"]) == ("recoverable", address)
    assert (origin["status"], origin["bank"]) == (mca.INTEL_LOST.status, mca.INTEL_BANK)
    assert origin["errors"]["corrected"] == 3


SCENARIOS = (
    *(Scenario(one, BOOT) for one in (machine_check, machine_check_gmem, machine_check_elsewhere)),
    Scenario(machine_check_intel, INTEL_BOOT),
)
