"""One line per event, as text and as JSON."""

from __future__ import annotations

import json
from collections.abc import Callable

from kvmtrace import dimm_names, kvm
from kvmtrace.events import (
    ClockStep,
    Event,
    Exit,
    Found,
    HwError,
    Lost,
    MachineCheck,
    Owned,
    Poison,
    Reboot,
    Sigbus,
    SoftOffline,
    Unpoison,
    VmGone,
    VmSeen,
)
from kvmtrace.linux import mce
from kvmtrace.model import CorrelatedEvent
from kvmtrace.views.format import (
    UNKNOWN,
    clip,
    date_of,
    day_of,
    dimm_of,
    hex_of,
    listed,
    pad,
    rfc3339_of,
    shift_of,
    size_of,
    span_of,
    stamp_of,
    zone_of,
)
from kvmtrace.views.json_output import event_line

_KIND = 6
_VM = 22
_WHAT = 22  # "EHWPOISON hwpoison", "EFAULT unannotated"

_ACCESS = {"r": "read", "w": "write", "x": "exec"}


_OF_PAGES = {Owned: "owner", SoftOffline: "soft_offline", Unpoison: "unpoison", Found: "found"}

LINE_KINDS = (
    "exit poison sigbus mce vm page owner found soft_offline unpoison lost clock reboot".split()
)
"""Words for kinds of lines: those of JSON, and "page" for the four that text calls so."""


def kinds_of(event: Event) -> tuple[str, ...]:
    """The words of ``LINE_KINDS`` for an event: JSON's, then that of text if it is another."""
    # Both ends of a VM are of kind "vm", all hardware errors "mce".
    if isinstance(event, (VmSeen, VmGone)):
        return ("vm",)
    if isinstance(event, HwError):
        return ("mce",)
    if of_page := _OF_PAGES.get(type(event)):
        return of_page, "page"
    return (event.kind,)


def json_text(correlated: CorrelatedEvent, *, before: bool = False) -> str | None:
    """The line of ``events --json``; None for an event that only serves the correlator.

    ``before``: mark it as what was there before the command was started.
    """
    line = event_line(correlated)
    if line is None:
        return None
    if before:
        line["before"] = True
    return json.dumps(line, ensure_ascii=False, separators=(",", ":"))


class EventText:
    """Lines of text of events in order, so that every time has its date and zone.

    ``dated``: each line has them (RFC 3339), for pipes and files. Else a line with date and zone
    stands before the first event, and where they change.
    """

    def __init__(self, *, dated: bool) -> None:
        self._dated = dated
        self._day = ""

    def lines(self, correlated: CorrelatedEvent) -> list[str]:
        """The event's line, with what has to stand before it; empty as ``event_text`` is None."""
        line = event_text(correlated, stamp=rfc3339_of if self._dated else stamp_of)
        if line is None:
            return []
        day = f"{day_of(correlated.wall)}, {zone_of(correlated.wall)}"
        if self._dated or day == self._day:
            return [line]
        self._day = day
        return [f"-- {day}", line]


def event_text(
    correlated: CorrelatedEvent,
    *,
    width: int | None = None,
    stamp: Callable[[int], str] = stamp_of,
) -> str | None:
    """One aligned line of text; None for an event that only serves the correlator.

    Time, kind, VM and what happened have columns. What else is known follows as "name value".
    ``width``: clip the line there; None: of any length. ``stamp``: prints the time.
    """
    event = correlated.event
    vm = _vm(correlated.vm)
    match event:
        case Exit():
            outcome = kvm.outcome_name(event.errno, event.reason)
            what = f"{outcome} {correlated.cause or '(cause unknown)'}"
            facts = _exit_facts(event)
        case Poison():
            owners = [f"{_vm(seen)} gfn {hex_of(owner.gfn)}" for owner, seen in correlated.owners]
            vm = _vm(correlated.owners[0][1]) if len(correlated.owners) == 1 else UNKNOWN
            what = event.result
            facts = [f"pfn {hex(event.pfn)}", event.page_type, f"owners {listed(owners, 'none')}"]
        case Sigbus():
            vm = vm if correlated.vm else _name_and_pid(event.comm, event.pid)
            what = "SI_KERNEL"
            if event.code != kvm.SI_KERNEL:
                what = f"BUS_MCEERR_{kvm.sigbus_code_name(event.code)}"
            facts = [f"tid {event.tid}", *([] if event.hva is None else [f"hva {event.hva:#x}"])]
            if event.lsb is not None:
                facts.append(size_of(1 << event.lsb))
            if event.vcpu is not None:
                facts.insert(0, f"vcpu {event.vcpu}")
            if event.gfn is not None:
                facts.append(f"gfn {hex(event.gfn)}")
            if event.count > 1:
                facts.append(f"x{event.count}")
        case HwError(check=MachineCheck() as check):
            what = f"bank {check.bank} cpu {check.cpu}"
            at = mce.at(check.status, check.vendor, check.bank, check.ipid)
            whose = {"memory": "memory of ", "consumer": "consumed on "}.get(at or "", "")
            facts = [
                f"{whose}socket {check.socket}",
                f"addr {hex_of(event.addr)}",
                f"pfn {hex_of(event.pfn)}",
                f"status {hex(check.status)}",
                check.fru or "",
                f"x{event.count}" if event.count > 1 else "",
            ]
        case HwError():
            what = f"{event.severity or 'memory'} error"
            label = dimm_names.label(event.label)
            facts = [
                dimm_of(label) if label else "",
                f"addr {hex_of(event.addr)}",
                f"pfn {hex_of(event.pfn)}",
                f"x{event.count}" if event.count != 1 else "",
                event.message or "",
                f"by {event.via}",
            ]
        case SoftOffline():
            refused = kvm.errno_name(event.errno)
            what = f"soft offline refused: {refused}" if event.errno else "soft-offlined"
            facts = [f"pfn {hex(event.pfn)}"]
        case Unpoison():
            what, facts = "unpoisoned", [f"pfn {hex(event.pfn)}"]
        case Found():
            what, facts = "poisoned before start", [f"pfn {hex(event.pfn)}"]
        case Owned() if correlated.owners:
            owner = correlated.owners[0][0]
            what, facts = "owner found", [f"pfn {hex(event.pfn)}", f"gfn {hex_of(owner.gfn)}"]
            if owner.hva is not None:
                facts.append(f"hva {owner.hva:#x}")
        case VmSeen():
            what = "seen"
            vm = _vm(event)
            facts = [
                event.vmm or "",
                f"uuid {event.uuid}" if event.uuid else "",
                event.unread or "",
            ]
        case VmGone():
            what, facts = "gone", []
        case Lost():
            what = f"{event.count} lost"
            facts = [f"at {event.where}"]
        case Reboot():
            what, facts = "host rebooted", []
        case ClockStep():
            what = f"stepped by {shift_of(event.step_ns)}"
            facts = [f"to {date_of(correlated.wall)}"]
            if event.suspended_ns is not None:
                facts.append(f"host suspended for {span_of(event.suspended_ns)}")
        case _:
            return None
    if correlated.incident:
        facts.append(f"incident {correlated.incident}")
    head = f"{stamp(correlated.wall)} {kinds_of(event)[-1]:<{_KIND}} {pad(vm, _VM)} {what:<{_WHAT}}"
    text = "  ".join([head, *filter(None, facts)]).rstrip()
    return text if width is None else clip(text, width)


def _vm(seen: VmSeen | None) -> str:
    """``name (pid)``; a long name is clipped, the pid is not."""
    if seen is None:
        return UNKNOWN
    # A label without a name has the pid already.
    return _name_and_pid(seen.label, seen.pid) if seen.name else seen.label


def _name_and_pid(name: str | None, pid: int) -> str:
    if not name:
        return f"pid {pid}"
    end = f" ({pid})"
    return clip(name, _VM - len(end)) + end


def _exit_facts(event: Exit) -> list[str]:
    facts = [f"vcpu {UNKNOWN if event.vcpu is None else event.vcpu}"]
    if event.reason is not None and event.reason != kvm.EXIT_MEMORY_FAULT:
        facts.append(f"reason {kvm.exit_reason_name(event.reason)}")
    if event.gpa is not None:
        facts.append(f"gpa {hex(event.gpa)}")
    if event.gfn is not None:
        facts.append(f"gfn {hex(event.gfn)}")
    if event.size is not None:
        facts.append(size_of(event.size))
    if event.flags is not None:
        facts.append(f"flags {kvm.flag_names(event.flags, event.errno)}")
    elif event.private is not None:
        facts.append("private" if event.private else "shared")
    if event.access:
        facts.append("+".join(_ACCESS.get(letter, letter) for letter in event.access))
    if event.count != 1:
        facts.append(f"x{event.count}")
    return facts
