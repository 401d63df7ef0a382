"""Hardware errors that firmware reports to an arm64 host (ACPI's GHES), from error to delivery.

Both sources record at once, and both recordings have to agree with what the VMMs were notified of.
The test and the matrix run the same function.
"""

from __future__ import annotations

import contextlib
import signal
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import NamedTuple

from tests.lab import cper
from tests.lab.harness import PATIENCE, Line, Unstageable, Vmm, replayed, replayed_lines
from tests.lab.machine import Machine

SOURCES = ("bpf", "ftrace")
DIMM = cper.Dimm(node=0, card=2, module=3, handle=0x1100)  # the handle in QEMU's SMBIOS


def _log(source: str) -> str:
    return f"/tmp/ghes-{source}.jsonl"


@contextlib.contextmanager
def _recorded(machine: Machine) -> Iterator[None]:
    jobs = [
        machine.start(f"exec kvmtrace record {_log(source)} --source {source}")
        for source in SOURCES
    ]
    for job in jobs:
        job.wait_for("recording to", timeout=PATIENCE, stream="stderr")
    yield
    time.sleep(3)  # kvmtrace samples the vCPUs that were notified
    for job in jobs:
        job.signal(signal.SIGINT)
        assert job.wait(PATIENCE) == 0, job.stderr


@dataclass
class Page:
    """A page of a VM, its place, and the VMM's answer to a touch after the error."""

    vmm: Vmm
    gfn: int
    pfn: int
    touch: Line = field(default_factory=dict)


class Host:
    """VMs on the machine whose pages will fail."""

    def __init__(self, machine: Machine) -> None:
        self.machine = machine
        self.vmms: dict[str, Vmm] = {}
        for name, backing in (("gmem", "gmem"), ("hva", "anon")):
            vmm = self.vmms[name] = Vmm(machine, name)
            vmm.step(f"create v backing={backing} pages=64")

    def page(self, name: str, number: int) -> Page:
        """Let the guest touch a page, and return it."""
        vmm = self.vmms[name]
        vmm.step(f"touch v +{number}")
        where = vmm.step(f"pfn v +{number}")
        return Page(vmm, where["gfn"], where["pfn"])

    def address(self, page: Page, at: int = 0x40) -> int:
        return (page.pfn << self.machine.page_shift) + at

    def touch(self, page: Page) -> None:
        page.touch = page.vmm.step(f"touch v {page.gfn}")


def _explained(machine: Machine, source: str, target: str) -> str:
    command = ["kvmtrace", "explain", target, "--from", _log(source)]
    return machine.run(command, timeout=PATIENCE, check=True).stdout


def ghes(machine: Machine, _source: str = "both", *, may_know_less: bool = True) -> None:
    """Inject each kind of error. ``may_know_less``: tracepoints of some kernels lack fields."""
    if machine.run("ls -d /sys/devices/platform/GHES.*").status:
        raise Unstageable("this machine has no firmware that reports errors (ACPI's GHES)")
    if "error" in Vmm(machine, "probe").step("create v backing=gmem pages=4", may_fail=True):
        raise Unstageable("guest_memfd that can be mapped: this kernel has none")
    host = Host(machine)
    with _recorded(machine):
        # Two corrected errors, then an uncorrected one in the same place: its history.
        lost = host.page("gmem", 3)
        for _ in range(2):
            cper.memory_error(machine, host.address(lost), cper.Severity.CORRECTED, dimm=DIMM)
        cper.memory_error(machine, host.address(lost), dimm=DIMM)
        host.touch(lost)
        cper.memory_error(machine, host.address(lost, 0x80), dimm=DIMM)  # the same page again

        plain = host.page("hva", 4)
        cper.memory_error(machine, host.address(plain))
        host.touch(plain)

        worn = host.page("hva", 6)
        cper.memory_error(
            machine,
            host.address(worn),
            cper.Severity.CORRECTED,
            flags=cper.THRESHOLD_EXCEEDED,
            dimm=DIMM,
        )
        host.touch(worn)
        moved = worn.vmm.step(f"pfn v {worn.gfn}")["pfn"]

        cached = host.page("hva", 8)
        error = cper.arm_processor(host.address(cached))
        cper.inject(machine, cper.ARM_PROCESSOR, error, cper.Severity.RECOVERABLE)
        host.touch(cached)

        cper.inject(machine, cper.UNKNOWN, b"whatever" * 4, cper.Severity.RECOVERABLE)

        untouched = host.page("gmem", 9)
        cper.memory_error(machine, host.address(untouched))

        nobodys = host.page("hva", 10)
        host.vmms["hva"].end()
        cper.memory_error(machine, host.address(nobodys))
    host.vmms["gmem"].end()

    # First check that the VMMs were notified as expected; then compare kvmtrace with that.
    assert (lost.touch["errno"], lost.touch["reason"]) == ("EHWPOISON", 39)
    assert [x["code"] for x in plain.touch["sigbus"]] == ["AR"]
    assert [x["code"] for x in cached.touch["sigbus"]] == ["AR"]
    assert worn.touch["ok"]
    assert moved != worn.pfn
    pages = Pages(lost, plain, cached, untouched, nobodys, worn)
    for source in SOURCES:
        _check(machine, source, pages, may_know_less)


class Pages(NamedTuple):
    """The pages by what happened to them.

    ``lost`` (guest_memfd), ``plain`` (anonymous) and ``cached`` (by a cache error) were poisoned
    and touched, ``untouched`` was only poisoned, ``nobodys`` was poisoned after its VM had ended,
    and ``worn`` was soft-offlined.
    """

    lost: Page
    plain: Page
    cached: Page
    untouched: Page
    nobodys: Page
    worn: Page


def _check(machine: Machine, source: str, pages: Pages, may_know_less: bool) -> None:
    def if_known(value: object) -> tuple[object, ...]:
        return (value, None) if may_know_less else (value,)

    lost, plain, cached, untouched, nobodys, worn = pages
    model = replayed(machine, _log(source))
    incidents = {one["pfn"]: one for one in model["incidents"]}
    lines = replayed_lines(machine, _log(source))
    assert set(incidents) == {p.pfn for p in (lost, plain, cached, untouched, nobodys)}, source
    assert [x for x in lines if x["kind"] == "lost"] == []
    attached = {probe["name"] for probe in model["probes"] if probe["attached"]}
    assert {"apei", "arm_event", "non_standard"} <= attached
    # TCG raises no synchronous external abort, so only check that its probe is attached.
    assert "arm_sea" in attached or may_know_less

    incident = incidents[lost.pfn]
    assert (incident["state"], incident["deliveries"]) == ("delivered", {"exits": 1, "sigbus": 0})
    origin = incident["origin"]
    assert (origin["via"], origin["severity"], origin["node"]) == (["GHES"], "recoverable", 0)
    assert "DIMM" in origin["label"]
    assert "card 2, module 3" in origin["message"]
    assert (origin["errors"]["count"], origin["errors"]["corrected"]) == (4, 2)
    assert origin["dimm"]["count"] == 5  # the worn page is on the same DIMM
    assert origin["addr"] >> machine.page_shift == lost.pfn
    _owned(incident, lost, gfn=True)
    poisons = [x for x in lines if x["kind"] == "poison" and x["pfn"] == lost.pfn]
    assert [x["page_type"] == "already poisoned" for x in poisons] == [False, True]
    assert _owner_pids(poisons[0]) == {lost.vmm.pid}, "the owner is known before any touch"
    (fault,) = [x for x in lines if x["kind"] == "exit"]
    assert (fault["errno"], fault["gfn"]) == ("EHWPOISON", lost.gfn)
    assert poisons[0]["ts"] < fault["ts"]
    text = _explained(machine, source, hex(lost.pfn))
    assert "GHES" in text
    assert origin["label"] in text

    for page, via in ((plain, "GHES"), (cached, "ras:arm_event")):
        incident = incidents[page.pfn]
        assert incident["deliveries"] == {"exits": 0, "sigbus": 1}
        origin = incident.get("origin") or {"via": [via]}
        assert origin["via"] == [via]
        assert origin.get("severity") in if_known("recoverable")
        assert origin.get("addr", -1) >> machine.page_shift in (
            (page.pfn, -1) if may_know_less else (page.pfn,)
        )
        _owned(incident, page, gfn=source == "bpf")
        (poison,) = [x for x in lines if x["kind"] == "poison" and x["pfn"] == page.pfn]
        assert _owner_pids(poison) == {page.vmm.pid}
        (signal_,) = [x for x in lines if x["kind"] == "sigbus" and x["incident"] == incident["id"]]
        assert signal_["tid"] == page.touch["tid"]
        assert signal_.get("vcpu") in if_known(0)
        assert signal_["hva"] == page.touch["sigbus"][0]["hva"]

    incident = incidents[untouched.pfn]
    assert (incident["state"], incident["deliveries"]) == ("latent", {"exits": 0, "sigbus": 0})
    _owned(incident, untouched, gfn=source == "bpf")

    incident = incidents[nobodys.pfn]
    assert (incident["state"], incident["owners"]) == ("unowned", [])
    assert incident["origin"]["via"] == ["GHES"]

    (page_line,) = [x for x in model["soft_offlined"] if x["pfn"] == worn.pfn]
    assert "errno" not in page_line
    text = _explained(machine, source, hex(worn.pfn))
    assert "soft-offlined" in text
    assert "corrected" in text
    (vendor,) = [x for x in lines if x.get("via") == "ras:non_standard_event"]
    assert vendor["severity"] == "recoverable"


def _owned(incident: Line, page: Page, *, gfn: bool) -> None:
    (owner,) = incident["owners"]
    assert owner["vm"]["pid"] == page.vmm.pid
    assert owner.get("gfn") in ([page.gfn] if gfn else [None, page.gfn])


def _owner_pids(poison: Line) -> set[int]:
    return {owner["vm"]["pid"] for owner in poison["owners"]}
