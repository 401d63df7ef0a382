"""Words for the facts that an incident's timeline and its verdicts hold."""

from __future__ import annotations

from typing import assert_never

from kvmtrace import dimm_names, kvm
from kvmtrace.events import (
    ClockStep,
    Exit,
    Found,
    GmemRefusal,
    HwError,
    Owned,
    PageReplaced,
    Poison,
    Sigbus,
    SoftOffline,
    Unpoison,
    VcpuState,
)
from kvmtrace.facts import EntryKind, Finding, FindingKind, JoinedBy, TimelineEntry
from kvmtrace.linux import mce
from kvmtrace.views.format import shift_of, span_of

_SECOND = 1_000_000_000

_FOUND_BY = {
    "pagemap": "page table entry with the pfn (pagemap)",
    "mapping": "the same page of the same file, mapped",
    "guest_memfd": "the page's guest_memfd and its memslots",
    "fault": "guest_memfd refused this gfn, whose memslot leads to the page",
}

_STATES = {
    "running": "runs",
    "waiting": "waits in KVM_RUN",
    "outside": "sleeps outside KVM_RUN",
    "gone": "has ended",
}


def description(entry: TimelineEntry) -> str:
    """What happened, without the VM's name, count and time."""
    match entry.kind, entry.event:
        case EntryKind.OWNER, _ if entry.owner is not None:
            gfn, hva = entry.owner.gfn, entry.owner.hva
            place = f"gfn {gfn:#x}" if gfn is not None else "gfn not known"
            return f"owned: {place}" + _hva(hva)
        case EntryKind.MAPPED, _:
            return "mapped by VMs that do not own it"
        case EntryKind.NOTIFIED_AGAIN, _:
            return "notified again although the page is unpoisoned"
        case EntryKind.VM_GONE, _:
            return "the VM is gone"
        case EntryKind.REBOOT, _:
            return "the host was rebooted"
        case _, Poison(pfn=pfn, result=result, page_type=page_type):
            return f"pfn {pfn:#x} poisoned: {result}, {page_type}"
        case _, Found(pfn=pfn):
            return f"pfn {pfn:#x} was poisoned before kvmtrace started"
        case _, Exit() as exit_:
            gpa = f", gpa {exit_.gpa:#x}" if exit_.gpa is not None else ""
            outcome = kvm.outcome_name(exit_.errno, exit_.reason)
            return f"KVM_RUN on {_vcpu(exit_.vcpu, 'a vCPU')}: {outcome}{gpa}"
        case _, GmemRefusal(gfn=gfn):
            return f"guest_memfd refused gfn {gfn:#x} with EHWPOISON"
        case _, Sigbus() as signal:
            return _signal(signal, entry)
        case _, VcpuState(vcpu=vcpu, state=state):
            return f"{_vcpu(vcpu)} {_STATES.get(state, state)}"
        case _, PageReplaced(hva=hva):
            return _replaced(hva)
        case _, Unpoison(pfn=pfn):
            return f"pfn {pfn:#x} unpoisoned"
        case _, SoftOffline(errno=errno):
            return "soft offline" + (f", refused with {kvm.errno_name(errno)}" if errno else "")
        case _, HwError() as report:
            return _hardware_error(report)
        case _, ClockStep() as step:
            text = f"the wall clock was stepped by {shift_of(step.step_ns)}"
            if step.suspended_ns is not None:
                text += f"; the host was suspended for {span_of(step.suspended_ns)}"
            return text
    return "errors of other kinds"


def joined_by(entry: TimelineEntry) -> str | None:
    """By what the entry belongs to the incident; None where nothing had to be joined."""
    join = entry.joined_by
    if join is None:
        return None
    match join.by:
        case JoinedBy.LOOKUP:
            via = entry.event.via if isinstance(entry.event, Owned) else ""
            return _FOUND_BY.get(via, via)
        case JoinedBy.PAGE_TABLE:
            return "the page table entry at the address names the pfn"
        case JoinedBy.PAGE_TABLE_CHANGED:
            return "page table entry (pagemap)"
        case JoinedBy.PAGE_FLAGS:
            return "its page flags (/proc/kpageflags)"
        case JoinedBy.PFN:
            return "same pfn"
        case JoinedBy.VM:
            return "same VM; its gfn is unknown"
        case JoinedBy.GFN:
            return "same VM and gfn"
        case JoinedBy.NEAR_GFN:
            return f"gfn within the loss at gfn {join.at or 0:#x}"
        case JoinedBy.NEAR_HVA:
            return f"address within the loss at hva {join.at or 0:#x}"
        case JoinedBy.GMEM_THREAD:
            return _same_thread(entry)
        case JoinedBy.POISONING_THREAD:
            return "sent by the thread that poisoned the page"
        case JoinedBy.EARLIER_POISONING_THREAD:
            return "sent by the thread that had poisoned the page"
        case JoinedBy.CONSUMING_THREAD:
            return "sent by the thread that consumed the page"
        case JoinedBy.NOTIFIED_THREAD:
            tid = entry.event.tid if isinstance(entry.event, VcpuState) else None
            return f"/proc, the notified thread {tid}"
        case JoinedBy.PAGE_ADDRESS:
            return "address in the same page"
        case JoinedBy.ADDRESS:
            return f"address, exact to {join.at} bytes"
        case JoinedBy.CLOCK:
            return "the wall clock beside CLOCK_MONOTONIC"
    assert_never(join.by)


def _same_thread(entry: TimelineEntry) -> str:
    gmem = entry.event.gmem if isinstance(entry.event, Poison) else None
    if gmem is None:
        return "same thread as the poison"
    inode = f"inode {gmem.inode}, " if gmem.inode is not None else ""
    doubt = "" if gmem.complete else "; not all bindings could be seen"
    return f"same thread as the poison, guest_memfd {inode}index {gmem.index:#x}{doubt}"


def _signal(signal: Sigbus, entry: TimelineEntry) -> str:
    who = _vcpu(signal.vcpu, f"thread {signal.tid}")
    if not entry.vmm:
        who = f"{signal.comm or 'a process'} (pid {signal.pid}), which runs no VM"
    own = ", by its own poisoning" if entry.kind is EntryKind.OWN_SIGNAL else ""
    return f"SIGBUS {kvm.sigbus_code_name(signal.code)} to {who}{_hva(signal.hva)}{own}"


def _hardware_error(report: HwError) -> str:
    check = report.check
    if check is None:
        label = dimm_names.label(report.label)
        head = f"{report.severity or 'memory'} error by {report.via}"
        return head + (f": {label}" if label else "")
    head = f"{report.severity or 'memory'} error by machine check"
    bank, cpu, socket = check.bank, check.cpu, check.socket
    if bank == mce.FIRMWARE_BANK:
        return f"{head}: the kernel's record of what firmware reported"
    match mce.at(check.status, check.vendor, bank, check.ipid):
        case "memory":
            return f"{head}: memory controller of socket {socket} (bank {bank}, read by CPU {cpu})"
        case "consumer":
            return f"{head}: consumed by CPU {cpu}, socket {socket} (bank {bank})"
    return f"{head}: bank {bank}, CPU {cpu}, socket {socket}"


def finding_text(finding: Finding) -> str:
    """One fact that a verdict rests on."""
    thread = f"{_vcpu(finding.vcpu)} (thread {finding.tid})"
    cpu = "" if finding.cpu_ns is None else f", {_seconds(finding.cpu_ns)} of CPU time since"
    after = _seconds(finding.after_ns)
    match finding.kind:
        case FindingKind.VM_GONE:
            text = f"the VM was gone {after} after it was first notified"
            if finding.since_last_ns != finding.after_ns:
                text += f", {_seconds(finding.since_last_ns)} after the last time"
            return text
        case FindingKind.LOOPS:
            within = finding.within_ns
            pace = f", {_round((finding.count - 1) * _SECOND / within)} a second" if within else ""
            return _loop(finding) + pace
        case FindingKind.LOOPED:
            return _loop(finding)
        case FindingKind.LOOP_ENDED:
            return f"{_loop(finding)}, then no more"
        case FindingKind.THREAD_ENDED:
            return f"{thread} has ended, {after} after it was notified"
        case FindingKind.ASLEEP:
            return f"{thread} sleeps outside KVM_RUN, {after} after it was notified"
        case FindingKind.AWAKE_BETWEEN:
            return f"{thread} sleeps outside KVM_RUN in every sample, but ran in between{cpu}"
        case FindingKind.MENDED_BETWEEN:
            return f"{thread} sleeps outside KVM_RUN in every sample, and ran in between{cpu}"
        case FindingKind.RAN_ON:
            where = "in KVM_RUN" if finding.state == "waiting" else "running"
            return f"{thread} is {where} {after} later{cpu}"
        case FindingKind.TOO_EARLY:
            return f"{thread} was {finding.state} {after} later: too early to judge"
        case FindingKind.NOT_NOTIFIED_AGAIN:
            return "not notified of this page again since"
        case FindingKind.PAGE_REPLACED:
            return _replaced(finding.hva)
        case FindingKind.NO_VCPU_NOTIFIED:
            return "no vCPU was notified, only another thread of the VMM"
        case FindingKind.NO_SAMPLE:
            return "the state of the vCPU was not read after it was notified"
    assert_never(finding.kind)


def _loop(finding: Finding) -> str:
    text = f"{_vcpu(finding.vcpu)} was notified {finding.count} times"
    return text + (f" in {_seconds(finding.within_ns)}" if finding.within_ns else "")


def _replaced(hva: int | None) -> str:
    return f"hva {hva or 0:#x} has no longer that page"


def _hva(hva: int | None) -> str:
    return f", hva {hva:#x}" if hva is not None else ""


def _vcpu(vcpu: int | None, other: str = "a thread") -> str:
    return other if vcpu is None else f"vCPU {vcpu}"


def _seconds(nanoseconds: int) -> str:
    return f"{_round(max(0, nanoseconds) / _SECOND)} s"


def _round(number: float) -> str:
    return f"{number:.0f}" if number >= 100 else f"{number:.3g}"
