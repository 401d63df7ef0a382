"""Scenarios: memory of VMs fails, and kvmtrace's report is compared with the VMM's.

Each scenario is a function; test_sources.py and matrix.py run the same ones. It raises
AssertionError if kvmtrace is wrong, Unstageable if the kernel cannot do that to a VM.
"""

from __future__ import annotations

import contextlib
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from tests.lab.harness import (
    PATIENCE,
    Line,
    Unstageable,
    Vmm,
    Watch,
    end_following,
    exits_reported,
    exits_returned,
    following,
    recorded,
    replayed,
    replayed_lines,
    top,
    watching,
)
from tests.lab.machine import Machine

SOURCES = ("bpf", "ftrace")

Beside = Callable[[], contextlib.AbstractContextManager[object]]
"""What else watches, from when the scenario's kvmtrace starts until the end."""


def _exit_of(lines: list[Line], pid: int, errno: str) -> list[Line]:
    return [
        line
        for line in lines
        if line["kind"] == "exit" and line["vm"]["pid"] == pid and line["errno"] == errno
    ]


def vms_gone(pid: int, vms: int = 1) -> Callable[[list[Line]], bool]:
    """For Watch.until: the ends of that many VMs of a process have been reported."""

    def over(lines: list[Line]) -> bool:
        ends = [x for x in lines if x["kind"] == "vm" and x["state"] == "gone"]
        return len([x for x in ends if x["vm"]["pid"] == pid]) >= vms

    return over


def _assert_same_exits(lines: list[Line], pid: int, report: Line, source: str = "") -> None:
    """kvmtrace has to report exactly the exits that KVM_RUN returned to the process."""
    reported, returned = exits_reported(lines, pid), exits_returned(report)
    assert reported == returned, (
        f"{source} only kvmtrace: {reported - returned}; only the VMM: {returned - reported};"
        f" lost: {[line for line in lines if line['kind'] == 'lost']}"
    )


def _needs_exits(*watches: Watch) -> None:
    """Unstageable if a source cannot see exits on this kernel, which it reports."""
    for watch in watches:
        if "run" in watch.not_attached():
            raise Unstageable("no source for exits here: the run probe is reported as not attached")


def _assert_nothing_lost(lines: list[Line]) -> None:
    assert [line for line in lines if line["kind"] == "lost"] == []


def gmem_poison(machine: Machine, source: str) -> None:
    """A guest_memfd page is poisoned, then touched: poison and exit are one incident."""
    with following(machine, source) as (watch,):
        vmm = Vmm(machine, "gmem-poison")
        vmm.step("create v backing=gmem pages=32")
        vmm.step("touch v +3")
        poison = vmm.step("poison v +3")
        watch.until(lambda ls: [x for x in ls if x["kind"] == "poison"], "the poison")
        touch = vmm.step("touch v +3")
        assert (touch["errno"], touch["reason"]) == ("EHWPOISON", 39), touch
        report = vmm.end()
        lines = watch.until(vms_gone(vmm.pid), "the VM's end")

    (reported,) = [x for x in lines if x["kind"] == "poison" and x["pfn"] == poison["pfn"]]
    assert reported["owners"], reported
    owner = reported["owners"][0]
    assert (owner["vm"]["pid"], owner["gfn"]) == (vmm.pid, poison["gfn"])
    assert owner["vm"]["name"] == "gmem-poison"
    assert not reported["page_type"].isdecimal()
    assert reported["result"] in ("Failed", "Delayed", "Recovered", "Ignored")
    exits = _exit_of(lines, vmm.pid, "EHWPOISON")
    assert sum(x["count"] for x in exits) == 1
    (fault,) = exits
    assert (fault["gpa"], fault["gfn"], fault["size"], fault["flags"], fault["private"]) == (
        touch["gpa"],
        touch["gfn"],
        touch["size"],
        touch["flags"],
        False,
    )
    assert (fault["cause"], fault["annotated"], fault["reason"]) == ("hwpoison", True, 39)
    assert fault["incident"] == reported["incident"]
    assert reported["ts"] < fault["ts"]
    _assert_same_exits(lines, vmm.pid, report)
    _assert_nothing_lost(lines)


def under_way(machine: Machine, source: str, beside: Beside = contextlib.nullcontext) -> None:
    """The vCPU enters KVM_RUN before kvmtrace starts, and returns because of the poison."""
    end_following(machine)
    vmm = Vmm(machine, "old")
    vmm.step("create v backing=gmem pages=32")
    vmm.step("touch v +3 op=spin bg=1 timeout=3600")
    with beside(), watching(machine, source) as watch:
        _needs_exits(watch)
        poison = vmm.step("poison v +3")
        answer = vmm.step("wait")
        lines = watch.until(lambda ls: _exit_of(ls, vmm.pid, "EHWPOISON"), "the exit")
        (exit_,) = _exit_of(lines, vmm.pid, "EHWPOISON")
        assert (exit_["count"], exit_["vcpu"], exit_["gfn"]) == (1, 0, poison["gfn"]), exit_
        assert (exit_["annotated"], exit_["cause"]) == (True, "hwpoison")
        assert ("gpa" in exit_) == (source == "bpf")  # the tracepoint has no gpa
        # Later exits of this vCPU are seen in the ordinary way.
        vmm.step("touch v +3")
        report = vmm.end()
        lines = watch.until(vms_gone(vmm.pid), "the VM's end")
    assert sum(x["count"] for x in _exit_of(lines, vmm.pid, "EHWPOISON")) == 2
    assert sum(row["count"] for row in report["failed"]) == 2, (report, answer)
    _assert_nothing_lost(lines)


def efault(machine: Machine, source: str) -> None:
    """EFAULT with and without annotation: neither is an incident."""
    with following(machine, source) as (watch,):
        vmm = Vmm(machine, "efault")
        vmm.step("create bare backing=anon")
        vmm.step("unmap bare +5")
        bare = vmm.step("touch bare +5")
        assert (bare["errno"], bare["reason"]) == ("EFAULT", 0), bare
        vmm.step("create v backing=gmem pages=32")
        vmm.step("touch v +3")
        vmm.step("close-gmem v")
        closed = vmm.step("touch v +9")
        assert (closed["errno"], closed["reason"]) == ("EFAULT", 39), closed
        report = vmm.end()
        lines = watch.until(vms_gone(vmm.pid, 2), "the VMs' end")

    exits = _exit_of(lines, vmm.pid, "EFAULT")
    (reported,) = [x for x in exits if x["annotated"]]
    assert (reported["cause"], reported["gpa"], reported["gfn"]) == (
        "backing",
        closed["gpa"],
        closed["gfn"],
    )
    (unannotated,) = [x for x in exits if not x["annotated"]]
    assert unannotated["cause"] == "unannotated"
    assert not {"gpa", "size", "flags"} & set(unannotated)
    assert unannotated.get("gfn") in (None, bare["page"])
    assert not any("incident" in x for x in exits)
    _assert_same_exits(lines, vmm.pid, report)


def unannotated(machine: Machine, source: str) -> None:
    """An unmapped hva: EFAULT without reason 39, on every kernel."""
    with following(machine, source) as (watch,):
        _needs_exits(watch)
        vmm = Vmm(machine, "unmapped")
        vmm.step("create v backing=anon")
        vmm.step("touch v +3")
        vmm.step("unmap v +5")
        vmm.step("touch v +5")
        report = vmm.end()
        lines = watch.until(vms_gone(vmm.pid), "the VM's end")
    (reported,) = _exit_of(lines, vmm.pid, "EFAULT")
    assert (reported["cause"], reported["annotated"]) == ("unannotated", False)
    assert not {"gpa", "size", "flags", "incident"} & set(reported)
    _assert_same_exits(lines, vmm.pid, report)


def no_crosstalk(machine: Machine, source: str) -> None:
    """Three VMs of two vCPUs; each vCPU loops on its own poisoned page, all at once."""
    with following(machine, source) as (watch,):
        vmms = [Vmm(machine, f"vm{n}") for n in range(3)]
        poisons = {}
        for n, vmm in enumerate(vmms):
            vmm.step(f"create v backing=gmem pages=64 vcpus=2 base={0x100 + 0x40 * n}")
            for vcpu in (0, 1):
                page = f"+{4 + 8 * vcpu + n}"
                vmm.step(f"touch v {page} vcpu={vcpu}")
                poisons[vmm.pid, vcpu] = vmm.step(f"poison v {page}")
        for n, vmm in enumerate(vmms):
            for vcpu in (0, 1):
                vmm.step(f"loop v +{4 + 8 * vcpu + n} {3 + n} vcpu={vcpu} bg=1")
        for vmm in vmms:
            vmm.step("wait")
        reports = {vmm.pid: vmm.end() for vmm in vmms}
        for vmm in vmms:
            lines = watch.until(vms_gone(vmm.pid), f"the end of {vmm.name}")

    for (pid, _), poison in poisons.items():
        (reported,) = [x for x in lines if x["kind"] == "poison" and x["pfn"] == poison["pfn"]]
        assert [(o["vm"]["pid"], o["gfn"]) for o in reported["owners"]] == [(pid, poison["gfn"])]
        exits = [x for x in lines if x["kind"] == "exit" and x["vm"]["pid"] == pid]
        assert {x["incident"] for x in exits if x["gfn"] == poison["gfn"]} == {reported["incident"]}
    for pid, report in reports.items():
        _assert_same_exits(lines, pid, report)


def storm(machine: Machine, source: str, rounds: int = 200_000) -> None:
    """A VMM loops on a lost page while another makes ordinary exits: counts are exact.

    The page is poisoned guest_memfd if the kernel has it for ordinary VMs, else an unmapped hva.
    """
    with following(machine, source) as (watch,):
        _needs_exits(watch)
        calm, mad = Vmm(machine, "calm"), Vmm(machine, "mad")
        calm.step("create v backing=anon")
        ends = 1
        if "error" in mad.step("create v backing=gmem pages=32", may_fail=True):
            ends = 2  # the VM that could not be created ends at once
            mad.step("create v backing=anon")
            mad.step("unmap v +3")
        else:
            mad.step("touch v +3")
            mad.step("poison v +3")
        calm.step(f"pio v {rounds // 4} bg=1")
        mad.step(f"loop v +3 {rounds}", patience=10 * PATIENCE)
        calm.step("wait", patience=10 * PATIENCE)
        report, quiet = mad.end(), calm.end()
        lines = watch.until(vms_gone(mad.pid, ends), "the VM's end")
    assert sum(row["count"] for row in report["failed"]) == rounds
    _assert_same_exits(lines, mad.pid, report)
    assert quiet["failed"] == []
    _assert_same_exits(lines, calm.pid, quiet)
    _assert_nothing_lost(lines)


def _run_at_once(vmms: Sequence[Vmm], step: str) -> dict[int, Line]:
    """Let all VMMs do a step at the same time, then end; {pid: report}."""
    for vmm in vmms:
        vmm.begin(step)
    for vmm in vmms:
        vmm.finish(step, patience=10 * PATIENCE)
    return {vmm.pid: vmm.end() for vmm in vmms}


def crowd(machine: Machine, source: str, vmms: int = 5, rounds: int = 10_000) -> None:
    """More VMMs than CPUs loop at once: counts and causes of exits are exact."""
    with following(machine, source) as (watch,):
        _needs_exits(watch)
        all_ = [Vmm(machine, f"crowd-{n}") for n in range(vmms)]
        backing, ends = "backing", 1
        for vmm in all_:
            if "error" in vmm.step("create v backing=gmem pages=32", may_fail=True):
                backing, ends = "unannotated", 2
                vmm.step("create v backing=anon")
                vmm.step("unmap v +3")
            else:
                vmm.step("close-gmem v")
        reports = _run_at_once(all_, f"loop v +3 {rounds}")
        lines = watch.until(
            lambda lines: all(vms_gone(pid, ends)(lines) for pid in reports), "the VMs' end"
        )
    for pid, report in reports.items():
        assert sum(row["count"] for row in report["failed"]) == rounds
        _assert_same_exits(lines, pid, report)
        causes = Counter[str]()
        for reported in _exit_of(lines, pid, "EFAULT"):
            causes[reported["cause"]] += reported["count"]
        assert causes == {backing: rounds}
    _assert_nothing_lost(lines)


def churn(machine: Machine, source: str, vmms: int = 4, vms: int = 250) -> None:
    """A thousand VMs are created and destroyed, by more VMMs than CPUs: none is missed."""
    with following(machine, source) as (watch,):
        all_ = [Vmm(machine, f"churn-{n}") for n in range(vmms)]
        _run_at_once(all_, f"churn {vms}")

        def states(lines: list[Line]) -> Counter[tuple[int, str]]:
            return Counter((x["vm"]["pid"], x["state"]) for x in lines if x["kind"] == "vm")

        def over(lines: list[Line]) -> bool:
            return all(states(lines)[vmm.pid, "gone"] >= vms for vmm in all_)

        lines = watch.until(over, f"{vmms} x {vms} VMs gone", patience=3 * PATIENCE)
    assert states(lines) == {(v.pid, state): vms for v in all_ for state in ("seen", "gone")}
    assert [x for x in lines if x["kind"] == "lost"] == []


def stale_join(machine: Machine, source: str) -> None:
    """A guest_memfd failure outside KVM_RUN is not joined to the thread's next exit."""
    with following(machine, source) as (watch,):
        vmm = Vmm(machine, "stale")
        vmm.step("create v backing=gmem pages=32")
        vmm.step("create w backing=anon base=0x400")
        vmm.step("touch v +3")
        vmm.step("poison v +3")
        vmm.step("prefault v +3 n=3")
        vmm.step("unmap w +5")
        bare = vmm.step("touch w +5")
        report = vmm.end()
        lines = watch.until(vms_gone(vmm.pid, 2), "the VMs' end")
    (reported,) = _exit_of(lines, vmm.pid, "EFAULT")
    assert reported["cause"] == "unannotated"
    assert reported.get("gfn") in (None, bare["page"])
    assert "incident" not in reported
    assert _exit_of(lines, vmm.pid, "EHWPOISON") == []
    _assert_same_exits(lines, vmm.pid, report)


def _hva(
    machine: Machine, source: str, backing: str, lsb: int, pages: int, *, huge: bool = False
) -> None:
    """Poison and touch a page of ordinary memory: the vCPU thread gets a SIGBUS.

    ``lsb``: of the SIGBUS that memory_failure sends, which is exact; that of KVM's SIGBUS may not
    be. Kernels differ in whether the caller of madvise gets one, which the VMM reports. ``huge``:
    the page has to be a huge page.
    """
    with following(machine, source) as (watch,):
        vmm = Vmm(machine, f"hva-{backing}")
        vmm.step(f"create v backing={backing} pages={pages}")
        vmm.step("touch v +3")
        poison = vmm.step("poison v +3")
        assert poison["huge"] == huge, poison
        touch = vmm.step("touch v +3")
        assert touch["errno"] == "EINTR", touch
        assert [s["code"] for s in touch["sigbus"]] == ["AR"], touch
        watch.until(
            lambda ls: [x for x in ls if x["kind"] == "sigbus" and x["tid"] == touch["tid"]],
            "the SIGBUS",
        )
        report = vmm.end()
        lines = watch.until(vms_gone(vmm.pid), "the VM's end")
    (signal,) = touch["sigbus"]
    reported = [x for x in lines if x["kind"] == "sigbus" and x["tid"] == touch["tid"]]
    assert [(x["code"], x["hva"], x["lsb"]) for x in reported] == [
        ("AR", signal["hva"], signal["lsb"])
    ]
    at_poison = [x["lsb"] for x in lines if x["kind"] == "sigbus" and x["tid"] == vmm.pid]
    assert at_poison == [x["lsb"] for x in poison["sigbus"]]
    assert set(at_poison) <= {lsb}
    assert reported[0]["vm"]["pid"] == vmm.pid
    assert reported[0].get("gfn") in (None, touch["page"])
    assert poison["pfn"] in {x["pfn"] for x in lines if x["kind"] == "poison"}
    assert _exit_of(lines, vmm.pid, "EINTR") == []
    _assert_same_exits(lines, vmm.pid, report)


def hva_anon(machine: Machine, source: str) -> None:
    """Anonymous memory: the vCPU thread gets a SIGBUS; EINTR of KVM_RUN is no error."""
    _hva(machine, source, "anon", machine.page_shift, 64)


def hva_thp(machine: Machine, source: str) -> None:
    """A transparent huge page: the kernel splits it, and one small page is lost."""
    result = machine.run("cat /sys/kernel/mm/transparent_hugepage/hpage_pmd_size", check=True)
    pages = 2 * int(result.stdout) >> machine.page_shift
    _hva(machine, source, "thp", machine.page_shift, pages, huge=True)


def hva_hugetlb(machine: Machine, source: str) -> None:
    """A hugetlb page of 2 MiB: all of it is lost."""
    pages = 4 << 20 >> machine.page_shift
    _hva(machine, source, "hugetlb2m", 21, pages, huge=True)


def hva_hugetlb1g(machine: Machine, source: str) -> None:
    """A hugetlb page of 1 GiB, reserved at boot: all of it is lost."""
    pages = "/sys/kernel/mm/hugepages/hugepages-1048576kB/nr_hugepages"
    if machine.run(["cat", pages]).stdout.strip() in ("", "0"):
        raise Unstageable("the kernel could not reserve a page of 1 GiB")
    _hva(machine, source, "hugetlb1g", 30, 1 << 30 >> machine.page_shift, huge=True)


def hva_early_kill(machine: Machine, source: str) -> None:
    """VMMs with the early-kill policy get SIGBUS AO before their guests touch the page."""
    machine.run("echo 8 > /proc/sys/vm/nr_hugepages", check=True)
    poisons = {}
    with recorded(machine, source) as log:
        for name, backing in (("early", "anon"), ("early-huge", "hugetlb2m")):
            vmm = Vmm(machine, name)
            vmm.step("earlykill on")
            vmm.step(f"create v backing={backing} pages={4 << 20 >> machine.page_shift}")
            place = vmm.step("pfn v +3")
            # By another process: a signal from a thread's own madvise is no delivery.
            hammer = Vmm(machine, "hammer")
            hammer.step(f"poison pfn={place['pfn']}")
            hammer.end()
            poisons[name] = vmm, place
    incidents = replayed(machine, log)["incidents"]
    lines = replayed_lines(machine, log)
    for name, lsb in (("early", machine.page_shift), ("early-huge", 21)):
        vmm, place = poisons[name]
        (signal,) = vmm.end()["sigbus"]
        assert (signal["code"], signal["tid"], signal["count"]) == ("AO", vmm.pid, 1), signal
        reported = [
            x for x in lines if x["kind"] == "sigbus" and x.get("vm", {}).get("pid") == vmm.pid
        ]
        assert [(x["code"], x["tid"], x["hva"], x["lsb"]) for x in reported] == [
            ("AO", vmm.pid, signal["hva"], lsb)
        ]
        assert signal["lsb"] == lsb
        assert "vcpu" not in reported[0]  # no vCPU accessed the page
        order = lsb - machine.page_shift
        (incident,) = [x for x in incidents if x["pfn"] >> order == place["pfn"] >> order]
        assert incident["state"] == "delivered", incident
        assert incident["deliveries"] == {"exits": 0, "sigbus": 1}
        assert {owner["vm"]["pid"] for owner in incident["owners"]} == {vmm.pid}


def hva_looping(machine: Machine, source: str) -> None:
    """A VMM that ignores SIGBUS gets it again and again."""
    with following(machine, source) as (watch,):
        vmm = Vmm(machine, "deaf")
        vmm.step("create v backing=anon")
        vmm.step("touch v +3")
        poison = vmm.step("poison v +3")
        vmm.step("loop v +3 50")
        report = vmm.end()
        lines = watch.until(vms_gone(vmm.pid), "the VM's end")
    reported = [
        x
        for x in lines
        if x["kind"] == "sigbus" and x["hva"] == poison["hva"] and x["tid"] != vmm.pid
    ]
    returned = [s for s in report["sigbus"] if s["tid"] != vmm.pid]
    counts = sum(x.get("count", 1) for x in reported), sum(s["count"] for s in returned)
    assert counts == (50, 50), (counts, lines)
    _assert_same_exits(lines, vmm.pid, report)


def deaf_crowd(machine: Machine, source: str, vmms: int = 4, rounds: int = 2_000) -> None:
    """VMMs ignore SIGBUS at the same time, all on one CPU: a busy host may do that to four VMMs."""
    with following(machine, source) as (watch,):
        all_ = [Vmm(machine, f"deaf-{n}", program="taskset 1 vmm") for n in range(vmms)]
        for vmm in all_:
            for step in ("create v backing=anon", "touch v +3", "poison v +3"):
                vmm.step(step)
        reports = _run_at_once(all_, f"loop v +3 {rounds}")
        lines = watch.until(
            lambda lines: all(vms_gone(pid)(lines) for pid in reports), "the VMs' end"
        )
    for pid, report in reports.items():
        reported = sum(
            x.get("count", 1)
            for x in lines
            if x["kind"] == "sigbus" and x.get("vm", {}).get("pid") == pid and x["tid"] != pid
        )
        returned = sum(s["count"] for s in report["sigbus"] if s["tid"] != pid)
        assert reported == returned == rounds
        _assert_same_exits(lines, pid, report)
    _assert_nothing_lost(lines)


def looping_in_top(
    machine: Machine, source: str, beside: Beside = contextlib.nullcontext, gap_us: int = 5_000
) -> None:
    """A `top` started while VMMs already loop shows that, and on which page.

    One VMM ignores SIGBUS. Another, if the kernel has guest_memfd, re-enters KVM_RUN in a loop.
    """
    end_following(machine)  # a running kvmtrace would compete for the CPUs
    looping = []
    for backing in ("anon", "gmem"):
        vmm = Vmm(machine, f"deaf-{backing}")
        if "error" in vmm.step(f"create v backing={backing}", may_fail=True):
            vmm.end()
            continue
        vmm.step("touch v +3")
        poison = vmm.step("poison v +3")
        vmm.step(f"loop v +3 1000000000 gap_us={gap_us} bg=1")
        looping.append((vmm, poison))
    with beside():
        seen = top(machine, source, interval=10)
        for vmm, _ in looping:
            vmm.job.kill()
    assert seen["host"]["source"] == source
    for vmm, poison in looping:
        (vm,) = [x for x in seen["vms"] if x["pid"] == vmm.pid]
        (incident,) = [
            incident
            for incident in seen["incidents"]
            if vmm.pid in {owner["vm"]["pid"] for owner in incident["owners"]}
        ]
        assert incident["pfn"] == poison["pfn"], incident
        assert incident["state"] == "looping", incident
        assert [owner["hva"] for owner in incident["owners"]] == [poison["hva"]]
        deliveries = incident["deliveries"]
        assert deliveries["sigbus"] == vm["sigbus"].get("AR", 0)
        assert deliveries["exits"] == vm["exits"].get("EHWPOISON", 0)
        assert deliveries["sigbus"] + deliveries["exits"] > 1


def parity(machine: Machine, _source: str = "both") -> None:
    """Both sources report the same of one workload, and what the VMM reports."""
    with following(machine, "bpf", "ftrace") as watches:
        _needs_exits(*watches)
        vmm = Vmm(machine, "parity")
        vmm.step("create h backing=anon")
        vmm.step("touch h +3")
        vmm.step("poison h +3")
        vmm.step("touch h +3")
        vmm.step("unmap h +5")
        vmm.step("touch h +5")
        vmm.step("loop h +5 500")
        gmem = "error" not in vmm.step("create g backing=gmem pages=32 base=0x400", may_fail=True)
        if gmem:
            vmm.step("touch g +3")
            vmm.step("poison g +3")
            vmm.step("touch g +3")
            vmm.step("loop g +3 500")
            vmm.step("close-gmem g")
            vmm.step("touch g +9")
        report = vmm.end()
        stories = [watch.until(vms_gone(vmm.pid, 2), "the VMs' end") for watch in watches]
    for source, lines in zip(SOURCES, stories, strict=True):
        _assert_same_exits(lines, vmm.pid, report, source)
        _assert_nothing_lost(lines)
    bpf, ftrace = (_reported_by_kind(lines, vmm.pid) for lines in stories)
    assert set(bpf) == set(ftrace)
    for kind in bpf:
        assert bpf[kind] == ftrace[kind], kind


def _reported_by_kind(lines: list[Line], pid: int) -> dict[str, list[tuple[object, ...]]]:
    """Reduce lines to what both sources have to agree on: {kind: sorted events}, without times."""
    found: dict[str, list[tuple[object, ...]]] = {}
    for line in lines:
        if (line.get("vm") or line.get("process") or {}).get("pid", pid) != pid:
            continue
        event: tuple[object, ...]
        if line["kind"] == "exit":
            event = (line["errno"], line["reason"], line["vcpu"], line.get("gpa"), line["cause"])
        elif line["kind"] == "poison":
            event = (line["pfn"], line["page_type"], line["result"])
        elif line["kind"] == "sigbus":
            event = (line["tid"], line["code"], line["hva"], line["lsb"])
        elif line["kind"] == "vm" and line["state"] == "gone":
            event = (line["vm"]["name"],)
        else:
            continue
        found.setdefault(line["kind"], []).append(event)
    # Equal exits may come in any number of lines; their counts have been compared already.
    found["exit"] = list(dict.fromkeys(found.get("exit", [])))
    return {kind: sorted(events, key=repr) for kind, events in found.items()}


@dataclass(frozen=True)
class Scenario:
    """``run(machine, source)`` for each of ``sources``; ``boot``: options of Machine.boot.

    ``is_late``: VMs run before kvmtrace starts, and ``run`` takes ``beside``.
    """

    run: Callable[..., None]
    boot: Mapping[str, Any] = field(default_factory=dict)
    sources: tuple[str, ...] = SOURCES
    is_late: bool = False

    @property
    def name(self) -> str:
        return self.run.__name__


SCENARIOS = (
    Scenario(gmem_poison),
    Scenario(efault),
    Scenario(unannotated),
    Scenario(no_crosstalk),
    Scenario(storm),
    Scenario(crowd),
    Scenario(churn),
    Scenario(stale_join),
    Scenario(hva_anon),
    Scenario(hva_thp),
    Scenario(hva_hugetlb),
    Scenario(hva_hugetlb1g, {"memory": "5G", "cmdline_extra": "hugepagesz=1G hugepages=2"}),
    Scenario(hva_early_kill),
    Scenario(hva_looping),
    Scenario(deaf_crowd),
    # These end the kvmtraces that are followed, so they come last.
    Scenario(looping_in_top, is_late=True),
    Scenario(under_way, is_late=True),
    Scenario(parity, sources=("both",)),
)
