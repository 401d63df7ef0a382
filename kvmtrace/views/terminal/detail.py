"""The pane below a table: the selected row in a few lines, what to do first."""

from __future__ import annotations

import textwrap
from collections.abc import Iterator

from kvmtrace.judgement.actions import actions, steps
from kvmtrace.model import Incident, Snapshot, Vm, VmIdentity
from kvmtrace.views import timeline
from kvmtrace.views.explain import origin_parts
from kvmtrace.views.format import (
    UNKNOWN,
    Line,
    age_of,
    cells,
    clip,
    counted,
    hex_of,
    listed,
    plain,
    refusals_of,
    shift_of,
    size_of,
    span_of,
    stamp_of,
)
from kvmtrace.views.tables.dimms import DimmRow
from kvmtrace.views.tables.events import EventRow
from kvmtrace.views.tables.probes import ProbeRow
from kvmtrace.views.tables.rows import IncidentRow, VmRow, owners_name
from kvmtrace.views.terminal.ui_state import AnyRow, UiState

_LEAD = 9
_TIMELINE = 6


def lines(state: UiState, row: AnyRow, width: int) -> list[Line]:
    """A title and some lines, each of at most ``width`` cells."""
    shown = state.snapshot
    match row:
        case IncidentRow():
            title, body = _incident_title(row), _incident(row.incident, shown)
        case VmRow():
            title, body = row.vm.label, _vm(row.vm, state)
        case DimmRow():
            title, body = row.name, _dimm(row)
        case EventRow():
            title, body = "event", iter([("", row.text, "")])
        case ProbeRow():
            title, body = row.id, _probe(row)
    rule = f"── {clip(title, width - 8)} "
    found: list[Line] = [((rule + "─" * max(0, width - cells(rule)), "dim"),)]
    for lead, text, style in body:
        line: Line = ((f"{lead:<{_LEAD}}", "dim"), (text, style))
        found += wrapped(line, width)
    return found


def wrapped(line: Line, width: int) -> list[Line]:
    """A line wrapped under its second span; one of more than two spans loses its styles."""
    text = plain(line)
    if cells(text) <= width:
        return [line]
    lead = cells(line[0][0]) if len(line) > 1 else len(text) - len(text.lstrip())
    if len(line) == 2 and lead < width // 2:
        (first, lead_style), (rest, style) = line
        parts = textwrap.wrap(rest, max(width - lead, 1))
        leads = [first, *[" " * lead] * (len(parts) - 1)]
        return [((one, lead_style), (part, style)) for one, part in zip(leads, parts, strict=True)]
    under = lead if len(line) > 1 else lead + 2
    parts = textwrap.wrap(
        text.strip(),
        max(width, 1),
        initial_indent=text[: len(text) - len(text.lstrip())],
        subsequent_indent=" " * (under if under < width // 2 else 2),
    )
    style = line[0][1] if len(line) == 1 else ""
    return [((part, style),) for part in parts]


_Facts = Iterator[tuple[str, str, str]]  # lead, text, style


def _incident_title(row: IncidentRow) -> str:
    incident = row.incident
    who = listed((_named(one) for one in incident.vm_identities.values()), "")
    return f"{incident.id}  {who}".rstrip()


def _named(vm: VmIdentity) -> str:
    facts = listed(filter(None, [f"pid {vm.pid}" if vm.name else "", vm.vmm or ""]), "")
    gone = ", gone" if vm.gone_ts is not None else ""
    return f"{vm.label} ({facts}{gone})" if facts or gone else vm.label


def _incident(incident: Incident, snapshot: Snapshot) -> _Facts:
    warned: set[str] = set()
    for number, step in enumerate(steps(actions(incident, snapshot)), 1):
        yield f"{'Do' if number == 1 else '':<6}{number}. ", step[0].text, ""
        # Of several VMs with one step each has its command.
        for action in step:
            for command in action.commands:
                yield "", command, "title"
            if action.commands and action.how:
                yield "", f"({action.how})", "dim"
        for never in dict.fromkeys(never for action in step for never in action.never):
            if never not in warned:
                yield "", never, "warn"
            warned.add(never)
    yield from _page_facts(incident, snapshot)
    yield from _happened(incident, snapshot)
    if incident.origin is not None:
        yield "hardware", listed(origin_parts(incident.origin)), ""


def _page_facts(incident: Incident, snapshot: Snapshot) -> _Facts:
    pfn = f"pfn {hex_of(incident.pfn)}" if incident.pfn is not None else "pfn not known"
    size = f"{size_of(incident.size)} lost" if incident.size is not None else ""
    yield "page", listed(filter(None, [pfn, incident.page_type, incident.result, size])), ""
    for owner in incident.owners[:4]:
        facts = [f"gfn {hex_of(owner.gfn)}" if owner.gfn is not None else "gfn not known"]
        if owner.gfn is not None:
            facts.append(f"gpa {hex_of(owner.gfn << snapshot.page_shift)}")
        if owner.hva is not None:
            facts.append(f"hva {hex_of(owner.hva)}")
        name = owners_name(incident, snapshot.vms, owner.vm)
        yield "guest", f"{name}: {listed(facts)}", ""


def _happened(incident: Incident, snapshot: Snapshot) -> _Facts:
    entries = sorted(incident.timeline, key=lambda entry: entry.ts)
    begin = incident.poisoned_ts
    left_out = len(entries) - _TIMELINE
    for entry in entries[:_TIMELINE]:
        when = stamp_of(snapshot.wall(entry.ts))
        if begin is not None and entry.ts > begin:
            when = shift_of(entry.ts - begin)
        times = f", {entry.count:,} times" if entry.count > 1 else ""
        yield f"{when:>12}  ", f"{timeline.description(entry)}{times}", ""
    if left_out > 0:
        yield "", f"… and {left_out} more: enter", "dim"


def _vm(vm: Vm, state: UiState) -> _Facts:
    identity = [f"pid {vm.pid}", vm.vmm or "", f"VMID {vm.vmid}" if vm.vmid else "", vm.uuid or ""]
    yield "VM", listed(filter(None, identity)) + (", gone" if vm.gone else ""), ""
    if vm.unread:
        yield "", f"not looked up: {vm.unread}", "warn"
    exits = sorted(vm.exits.items(), key=lambda entry: -entry[1])
    named = [f"{count:,} {errno} {cause or '(cause unknown)'}" for (errno, cause), count in exits]
    yield "exits", listed(named, "none"), ""
    signals = (f"{count:,} {code}" for code, count in sorted(vm.sigbus.items()))
    yield "SIGBUS", listed(signals, "none"), ""
    if vm.undelivered:
        yield "", refusals_of(vm.undelivered), "warn"
    for row in state.incidents.rows:
        if any(owner.vm == vm.key for owner in row.incident.owners):
            yield "incident", f"{row.id}  {row.urgency}: {row.action.brief}", ""


def _dimm(row: DimmRow) -> _Facts:
    history = row.history
    within = span_of(history.last_ts - history.first_ts)
    last = age_of(history.last_ts, row.now, row.steps)
    yield (
        "errors",
        f"{counted(history.count, 'error')} within {within}, {history.corrected} of them corrected;"
        f" the last {last} ago",
        "",
    )
    for incident in row.open_incidents:
        yield "incident", f"{incident.id}  pfn {hex_of(incident.pfn)}", ""
    yield "VMs", listed(row.vms, "none known"), ""


def _probe(row: ProbeRow) -> _Facts:
    yield ("attached" if row.probe.attached else "missing"), row.where, ""
    yield "shows", row.without or UNKNOWN, ""
    if row.runs is not None:
        yield "runs", f"{row.runs:,}", ""
