"""Everything known of one incident, in order, for a terminal of 80 columns or as JSON."""

from __future__ import annotations

import datetime
import textwrap
from collections.abc import Iterator
from typing import Any

from kvmtrace import dimm_names
from kvmtrace.judgement.actions import named, next_steps
from kvmtrace.model import (
    EntryKind,
    ErrorHistory,
    Incident,
    IncidentStatus,
    Join,
    JoinedBy,
    Origin,
    Snapshot,
    TimelineEntry,
    VmIdentity,
)
from kvmtrace.views import advice, json_output, timeline
from kvmtrace.views.format import counted, dimm_of, hex_of, listed, shift_of, size_of, span_of
from kvmtrace.views.tables.rows import KERNEL_ITSELF

WIDTH = 80
_LABEL = 11
_TIME = 11
_SECOND = 1_000_000_000


TITLES = ("Verdict", "Not known", "Next")


def explain_text(incident: Incident, snapshot: Snapshot, width: int = WIDTH) -> str:
    """Everything known of an incident, as text."""
    return "\n".join(explain_lines(incident, snapshot, width))


def explain_lines(incident: Incident, snapshot: Snapshot, width: int = WIDTH) -> Iterator[str]:
    """The same, line by line; the first one is its title."""
    for part in _parts(named(incident, snapshot), snapshot):
        yield from _fold(part, width)


def as_object(incident: Incident, snapshot: Snapshot) -> dict[str, Any]:
    """The same as JSON: the incident of the contract and what explains it."""
    incident = named(incident, snapshot)
    return json_output.incident(incident, snapshot) | {
        "timeline": [
            json_output.known(
                ts=json_output.rfc3339(snapshot.wall(entry.ts)),
                what=timeline.description(entry),
                how=timeline.joined_by(entry),
                vm=None
                if entry.vm is None
                else json_output.vm_name(incident.vm_identities.get(entry.vm)),
                count=entry.count,
                last_ts=None
                if entry.last_ts is None
                else json_output.rfc3339(snapshot.wall(entry.last_ts)),
            )
            for entry in _timeline(incident, snapshot)
        ],
        "not_known": advice.not_known(incident, snapshot),
        "next": next_steps(incident, snapshot),
    }


_Part = tuple[str, str]  # a lead, and the text that is folded to the right of it


def _parts(incident: Incident, snapshot: Snapshot) -> Iterator[_Part]:
    words = [_state(incident)]
    if incident.verdict is not None and incident.verdict.value != incident.state.value:
        words.append(incident.verdict)
    yield "", f"Incident {incident.id}: {listed(words)}"
    for label, value in _facts(incident):
        yield f"  {label:<{_LABEL}}", value
    yield "", ""
    yield "", f"Timeline, from {_timeline_from(incident, snapshot)}"
    begin = _begin(incident)
    for entry in _timeline(incident, snapshot):
        yield f"  {_relative(entry.ts, begin):>{_TIME}}  ", _entry(entry, incident, begin)
        if how := timeline.joined_by(entry):
            yield " " * (_TIME + 4), f"by: {how}"
    if incident.verdicts:
        yield "", ""
        yield "", "Verdict"
        for one in incident.verdicts:
            yield "  ", f"{_name(incident.vm_identities.get(one.vm))}: {one.word}"
            for finding in one.evidence:
                yield "    - ", timeline.finding_text(finding)
    for title, lines in (
        ("Not known", advice.not_known(incident, snapshot)),
        ("Next", next_steps(incident, snapshot)),
    ):
        if lines:
            yield "", ""
            yield "", title
            for line in lines:
                yield "  - ", line


def _state(incident: Incident) -> str:
    if incident.host_at_risk and incident.state == IncidentStatus.UNOWNED:
        return "kernel"
    if incident.undelivered and incident.state == IncidentStatus.LATENT:
        return "latent, undelivered"
    return incident.state


def _facts(incident: Incident) -> Iterator[tuple[str, str]]:
    page = [f"pfn {hex_of(incident.pfn)}" if incident.pfn is not None else "pfn not known"]
    page += [part for part in (incident.page_type, incident.result) if part]
    yield "page", ", ".join(page)
    shared = len({owner.vm for owner in incident.owners})
    lost = f"{size_of(incident.size)} lost" if incident.size is not None else "size not known"
    yield "loss", lost + (f", shared by {shared} VMs" if shared > 1 else "")
    if incident.host_at_risk:
        yield "owner", f"{KERNEL_ITSELF}, which could not take the page out of use"
    for owner in incident.owners:
        hva = f", hva {hex_of(owner.hva)}" if owner.hva is not None else ""
        gfn = f"gfn {hex_of(owner.gfn)}" if owner.gfn is not None else "gfn not known"
        first, last = incident.lost_gfns(owner) or (0, 0)
        if first != last:
            gfn += f" (lost up to {first:#x}-{last:#x})"
        left = ", no longer there" if owner in incident.released else ""
        yield "owner", f"{_name(incident.vm_identities.get(owner.vm), full=True)}: {gfn}{hva}{left}"
    if incident.origin is not None:
        yield "origin", listed(origin_parts(incident.origin))
    signals: dict[str, int] = {}
    for notification in incident.notifications:
        for code, count in notification.sigbus.items():
            signals[code] = signals.get(code, 0) + count
    by = [f"{counted(incident.exits, 'exit')} of KVM_RUN"] if incident.exits else []
    by += [f"{count} SIGBUS {code}" for code, count in sorted(signals.items())]
    if others := incident.sigbus - sum(signals.values()):
        by.append(f"{others} SIGBUS to a process of which no VM, or several, are known")
    not_yet = "not since kvmtrace started" if incident.before_start else "not yet"
    yield "notified", f"by {listed(by)}" if by else not_yet
    if incident.sigbus_to_others:
        to = "a process" if incident.sigbus_to_others == 1 else "processes"
        yield "others", f"{counted(incident.sigbus_to_others, 'signal')} to {to} without a VM"
    if incident.undelivered:
        refusals = counted(incident.undelivered, "refusal")
        yield "undeliv.", f"{refusals} by guest_memfd of which KVM_RUN did not notify the VMM"


def origin_parts(origin: Origin) -> Iterator[str]:
    """What hardware reported of a page; the part that failed first."""
    if origin.label:
        yield dimm_of(origin.label)
    if origin.socket is not None:
        yield f"memory of socket {origin.socket}"
    if origin.node is not None:
        yield f"node {origin.node}"
    if origin.bank is not None:
        yield f"reported by bank {origin.bank} of CPU {origin.cpu}"
    if origin.consumer_cpu is not None:
        yield f"consumed by CPU {origin.consumer_cpu}, socket {origin.consumer_socket}"
    if origin.addr is not None:
        yield f"address {origin.addr:#x}"
    if origin.severity:
        yield origin.severity
    if origin.message:
        yield origin.message
    yield counted_errors(origin.history, "at this page")
    if origin.dimm is not None:
        yield counted_errors(origin.dimm, f"of {_this(origin.label)}")


def _this(label: str | None) -> str:
    kind = dimm_names.names(label or "")
    return {"dimm": "this DIMM", "candidates": "these DIMMs"}.get(kind, f"this {kind}")


def counted_errors(history: ErrorHistory, where: str) -> str:
    """``3 errors at this page within 2 s (2 corrected)``."""
    span = history.last_ts - history.first_ts
    within = f" within {span_of(span)}" if history.count > 1 and span > 0 else ""
    corrected = f" ({history.corrected} corrected)" if history.corrected else ""
    return f"{counted(history.count, 'error')} {where}{within}{corrected}"


def _entry(entry: TimelineEntry, incident: Incident, begin: int) -> str:
    who = f"{_name(incident.vm_identities.get(entry.vm))}: " if entry.vm is not None else ""
    again = ""
    if entry.count > 1:
        again = f" (x{entry.count}"
        if entry.last_ts is not None and entry.last_ts > entry.ts:
            again += f", last {_relative(entry.last_ts, begin)}"
        again += ")"
    return f"{who}{timeline.description(entry)}{again}"


def _begin(incident: Incident) -> int:
    if incident.poisoned_ts is not None:
        return incident.poisoned_ts
    return incident.timeline[0].ts if incident.timeline else 0


def _timeline(incident: Incident, snapshot: Snapshot) -> list[TimelineEntry]:
    """The timeline with the steps of the wall clock, which explain jumps in times of day."""
    entries = incident.timeline
    ends = [entry.last_ts or entry.ts for entry in entries]
    steps = [
        TimelineEntry(step.ts, EntryKind.CLOCK_STEP, step, Join(JoinedBy.CLOCK))
        for step in snapshot.steps
        if entries and entries[0].ts < step.ts < max(ends)
    ]
    return sorted([*entries, *steps], key=lambda entry: entry.ts) if steps else list(entries)


def _timeline_from(incident: Incident, snapshot: Snapshot) -> str:
    if not incident.timeline:
        return "nothing"
    what = "the poison" if incident.poisoned_ts is not None else "what was seen first"
    begin = snapshot.wall(_begin(incident))
    when = datetime.datetime.fromtimestamp(begin // _SECOND, datetime.UTC)
    return f"{what} at {when:%Y-%m-%d %H:%M:%S} UTC"


def _relative(ts: int, begin: int) -> str:
    return shift_of(ts - begin)


def _name(vm: VmIdentity | None, *, full: bool = False) -> str:
    if vm is None:
        return "a VM not known by name"
    if not full:
        return vm.label
    number = f"VMID {vm.vmid}" if vm.vmid else None
    facts = listed([f"pid {vm.pid}", *filter(None, [number, vm.vmm, vm.uuid])])
    gone = ", gone" if vm.gone_ts is not None else ""
    return f"{vm.name or 'no name'} ({facts}{gone})"


def _fold(part: _Part, width: int) -> list[str]:
    lead, text = part
    return textwrap.wrap(
        text,
        max(width, len(lead) + 20),
        initial_indent=lead,
        subsequent_indent=" " * (len(lead) + (2 if not lead else 0)),
        break_on_hyphens=False,
    ) or [lead.rstrip()]
