"""An incident explained, the answer first, for 80 columns; and the same as JSON."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Iterator
from typing import Any

from kvmtrace import dimm_names
from kvmtrace.facts import EntryKind, Join, JoinedBy, TimelineEntry
from kvmtrace.judgement.action import Action
from kvmtrace.judgement.actions import actions, named, next_steps, steps
from kvmtrace.judgement.urgency import Urgency, urgency_of
from kvmtrace.model import ErrorHistory, Incident, Origin, Snapshot, VmIdentity
from kvmtrace.views import json_output, not_known, timeline
from kvmtrace.views.answer import answer, word
from kvmtrace.views.format import (
    Line,
    cells,
    clock_of,
    counted,
    day_of,
    dimm_of,
    fold,
    hex_of,
    listed,
    plain,
    refusals_of,
    size_of,
    span_of,
    style_of,
    zone_of,
)
from kvmtrace.views.stamp import Stamp
from kvmtrace.views.tables.rows import KERNEL_ITSELF

WIDTH = 80

_SECOND = 1_000_000_000
# Times this close to the one before are shown as the difference.
_CLOSE_NS = 10 * _SECOND
_AT_ONCE = f"+{span_of(0)}"
_TIME = len("23:59:59")
_MARGIN = 13
_COMMAND = " " * 9


@dataclasses.dataclass(frozen=True, slots=True)
class Showing:
    """How an incident is shown.

    ``now``: the time that ages are counted to; None: the snapshot's last event. ``stamp``: of the
    whole screen. ``evidence``: with what each statement rests on. ``command``: what commands that
    are shown need besides a target (``" --from sick.jsonl"``); None: none is shown. ``bundle``: the
    command that makes a bundle.
    """

    width: int = WIDTH
    now: int | None = None
    stamp: Stamp = dataclasses.field(default_factory=Stamp)
    evidence: bool = True
    command: str | None = None
    bundle: str | None = None

    def end(self, snapshot: Snapshot) -> int:
        """The time that ages are counted to."""
        return self.now if self.now is not None else snapshot.last_ts or 0


def explain_text(incident: Incident, snapshot: Snapshot, width: int = WIDTH) -> str:
    """Everything known of an incident, as text."""
    return "\n".join(map(plain, story(incident, snapshot, Showing(width))))


def story(incident: Incident, snapshot: Snapshot, showing: Showing) -> Iterator[Line]:
    """The same, with styles; the first line begins with the incident's urgency."""
    incident = named(incident, snapshot)
    yield from headline(incident, snapshot, showing)
    yield from sections(incident, snapshot, showing)


def headline(incident: Incident, snapshot: Snapshot, showing: Showing) -> list[Line]:
    """The urgency and the answer."""
    urgency = urgency_of(incident)
    text = answer(named(incident, snapshot), snapshot, showing.end(snapshot))
    return headed(word(urgency), style_of(urgency), text, showing.width)


def headed(head: str, style: str, text: str, width: int) -> list[Line]:
    """A head in its style, and text that is folded to the right of it; below it if it is long."""
    if len(head) <= _MARGIN:
        lines = fold(text, width, f"{head}  ")
    else:
        lines = fold(f"{head} {text}", width, under=2)
    if not lines[0].startswith(head):  # a head that takes several lines
        return [((line, ""),) for line in lines]
    return [((head, style), (lines[0][len(head) :], "")), *(((line, ""),) for line in lines[1:])]


def sections(
    incident: Incident, snapshot: Snapshot, showing: Showing, after_do: Iterable[Line] = ()
) -> Iterator[Line]:
    """All but the answer, an empty line before each section; ``after_do``: what follows Do."""
    incident = named(incident, snapshot)
    yield from _do(incident, snapshot, showing)
    yield from after_do
    yield from _what_happened(incident, snapshot, showing)
    yield from _the_page(incident, showing)
    yield from _how_we_know(incident, showing)
    yield from listing("Not known", not_known.not_known(incident, snapshot), showing.width)


def as_object(incident: Incident, snapshot: Snapshot, now: int | None = None) -> dict[str, Any]:
    """The same as JSON: the incident of the contract and what explains it."""
    incident = named(incident, snapshot)
    return json_output.incident(incident, snapshot) | {
        "answer": answer(incident, snapshot, Showing(now=now).end(snapshot)),
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
        "not_known": not_known.not_known(incident, snapshot),
        "next": next_steps(incident, snapshot),
    }


def listing(title: str, items: list[str], width: int) -> Iterator[Line]:
    """A section with an item in each paragraph; nothing without items."""
    if items:
        yield ()
        yield ((title, "head"),)
        for item in items:
            yield from paragraph(item, width, "  - ")


def paragraph(text: str, width: int, lead: str = "  ", style: str = "") -> Iterator[Line]:
    """Folded text."""
    for line in fold(text, width, lead):
        yield ((line, style),)


# -- sections


def _do(incident: Incident, snapshot: Snapshot, showing: Showing) -> Iterator[Line]:
    todo = steps(actions(incident, snapshot))
    is_over = urgency_of(incident) == Urgency.CLOSED
    bundle = None if is_over else showing.bundle
    yield ()
    yield (("Do", "head"),)
    said: set[str] = set()
    for number, parts in enumerate(todo, 1):
        lead = f"  {number}. " if len(todo) > 1 or bundle else "  "
        yield from paragraph(sentence(parts[0].text), showing.width, lead)
        yield from _commands(parts)
        for line in dict.fromkeys(never for part in parts for never in part.never):
            if line not in said:
                yield from paragraph(sentence(line), showing.width, " " * len(lead), "warn")
                said.add(line)
    if bundle:
        yield from paragraph("For the ticket:", showing.width, f"  {len(todo) + 1}. ")
        yield ((_COMMAND, ""), (bundle, "title"))


def _commands(parts: list[Action]) -> Iterator[Line]:
    """Commands, each whole on a line of its own, as they are copied from here."""
    several = len({part.vm for part in parts if part.commands}) > 1
    shown = ""
    for part in parts:
        whose = _name(part.vm) if several and part.vm is not None else ""
        head = listed(filter(None, (whose, part.how)), "")
        if part.commands and head and head != shown:
            yield ((f"       {head}:", "dim"),)
            shown = head
        for command in part.commands:
            yield ((_COMMAND, ""), (command, "title"))


def sentence(text: str) -> str:
    """The text with a capital at its begin and a full stop."""
    end = "" if text.endswith((".", "!", "?")) else "."
    return text[:1].upper() + text[1:] + end


def _what_happened(incident: Incident, snapshot: Snapshot, showing: Showing) -> Iterator[Line]:
    entries = _timeline(incident, snapshot)
    if not entries:
        return
    first = snapshot.wall(entries[0].ts)
    date = day_of(first)
    yield ()
    yield (("What happened", "head"), (f" ({date}, {zone_of(first)})", "dim"))
    several = len(incident.vm_identities) > 1
    anchor: TimelineEntry | None = None
    for entry in entries:
        when = snapshot.wall(entry.ts)
        if day_of(when) != date:
            date, anchor = day_of(when), None
            yield ((f"  {date}", "dim"),)
        is_close = anchor is not None and entry.ts - anchor.ts < _CLOSE_NS
        if anchor is None or not is_close or entry.kind == EntryKind.CLOCK_STEP:
            shown, anchor = clock_of(when), entry
        else:
            shown = f"+{span_of(entry.ts - anchor.ts)}"
            shown = "" if shown == _AT_ONCE else shown
        text = _entry(entry, incident, snapshot, showing, several=several)
        lines = fold(text, showing.width, f"  {shown:>{_TIME}}  ")
        yield ((lines[0][: _TIME + 2], "dim"), (lines[0][_TIME + 2 :], ""))
        yield from (((line, ""),) for line in lines[1:])
        if showing.evidence and (how := timeline.joined_by(entry)):
            yield from paragraph(f"by: {how}", showing.width, " " * (_TIME + 4), "dim")


def _entry(
    entry: TimelineEntry, incident: Incident, snapshot: Snapshot, showing: Showing, *, several: bool
) -> str:
    who = _name(incident.vm_identities.get(entry.vm)) if entry.vm is not None else ""
    text = f"{who}: {timeline.description(entry)}" if who else timeline.description(entry)
    if entry.count <= 1:
        return text
    again = f", {entry.count:,} times"
    last, now = entry.last_ts, showing.end(snapshot)
    if last is None or last <= entry.ts:
        return text + again
    if last - entry.ts < _CLOSE_NS:
        return f"{text}{again} within {span_of(last - entry.ts)}"
    if now - last < _CLOSE_NS and urgency_of(incident) == Urgency.LOOPING:
        return f"{text}{again} until now"
    begin, end = snapshot.wall(entry.ts), snapshot.wall(last)
    date = "" if day_of(begin) == day_of(end) else f"{day_of(end)} "
    return f"{text}{again} until {date}{clock_of(end)}"


def _the_page(incident: Incident, showing: Showing) -> Iterator[Line]:
    yield ()
    ids = listed([incident.id, *incident.former_ids])
    yield (("The page", "head"), (f" (incident {ids})", "dim"))
    for fact in _facts(incident):
        yield from paragraph(fact, showing.width)


def _facts(incident: Incident) -> Iterator[str]:
    page = [f"pfn {hex_of(incident.pfn)}" if incident.pfn is not None else "pfn not known"]
    page.append(f"{size_of(incident.size)} lost" if incident.size is not None else "size not known")
    page += [part for part in (incident.page_type, incident.result) if part]
    yield listed(page)
    if incident.host_at_risk:
        yield f"used by {KERNEL_ITSELF}, which could not take it out of use"
    shared = len({owner.vm for owner in incident.owners})
    if shared > 1:
        yield f"shared by {shared} VMs:"
    for owner in incident.owners:
        gfn = f"gfn {hex_of(owner.gfn)}" if owner.gfn is not None else "unknown gfn"
        first, last = incident.lost_gfns(owner) or (0, 0)
        if first != last:
            gfn += f" (lost up to {first:#x}-{last:#x})"
        hva = f", hva {hex_of(owner.hva)}" if owner.hva is not None else ""
        left = ", no longer there" if owner in incident.released else ""
        yield f"{gfn} of {full_name(incident.vm_identities.get(owner.vm))}{hva}{left}"
    if incident.origin is not None:
        parts = list(origin_parts(incident.origin))
        counts = 1 if incident.origin.dimm is None else 2
        if parts[:-counts]:
            yield f"error: {listed(parts[:-counts])}"
        yield listed(parts[-counts:])
    yield from _notified(incident)


def _notified(incident: Incident) -> Iterator[str]:
    signals: dict[str, int] = {}
    for notification in incident.notifications:
        for code, count in notification.sigbus.items():
            signals[code] = signals.get(code, 0) + count
    exits = "1 exit" if incident.exits == 1 else f"{incident.exits:,} exits"
    by = [f"{exits} of KVM_RUN"] if incident.exits else []
    by += [f"{count:,} SIGBUS {code}" for code, count in sorted(signals.items())]
    if others := incident.sigbus - sum(signals.values()):
        by.append(f"{others} SIGBUS to a process of which no VM, or several, are known")
    if by:
        yield f"VMM notified by {listed(by)}"
    elif incident.owners:
        since = "since kvmtrace started" if incident.before_start else "yet"
        yield f"VMM not notified {since}"
    if incident.sigbus_to_others:
        to = "a process" if incident.sigbus_to_others == 1 else "processes"
        yield f"{counted(incident.sigbus_to_others, 'signal')} to {to} without a VM"
    if incident.undelivered:
        yield refusals_of(incident.undelivered)


def _how_we_know(incident: Incident, showing: Showing) -> Iterator[Line]:
    if not showing.evidence:
        if showing.command is not None:
            command = f"kvmtrace explain {incident.id}{showing.command} --evidence"
            yield ()
            if len("How we know") + 2 + cells(command) > showing.width:
                yield (("How we know", "head"),)
                yield ((f"  {command}", ""),)
            else:
                yield (("How we know", "head"), (f"  {command}", ""))
        return
    if incident.verdicts:
        yield ()
        yield (("How we know", "head"),)
    for one in incident.verdicts:
        who = _name(incident.vm_identities.get(one.vm))
        yield from paragraph(f"{who}: {one.word}", showing.width)
        for finding in one.evidence:
            yield from paragraph(timeline.finding_text(finding), showing.width, "    - ")


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


def _timeline(incident: Incident, snapshot: Snapshot) -> list[TimelineEntry]:
    """The timeline with the steps of the wall clock, which explain jumps in times of day."""
    entries = incident.timeline
    ends = [entry.last_ts or entry.ts for entry in entries]
    clock_steps = [
        TimelineEntry(step.ts, EntryKind.CLOCK_STEP, step, Join(JoinedBy.CLOCK))
        for step in snapshot.steps
        if entries and entries[0].ts < step.ts < max(ends)
    ]
    return sorted([*entries, *clock_steps], key=lambda entry: entry.ts)


def _name(vm: VmIdentity | None) -> str:
    return "a VM not known by name" if vm is None else vm.label


def full_name(vm: VmIdentity | None) -> str:
    """A VM's name, and what else identifies it."""
    if vm is None:
        return _name(vm)
    number = f"VMID {vm.vmid}" if vm.vmid else None
    facts = listed([f"pid {vm.pid}", *filter(None, [number, vm.vmm, vm.uuid])])
    gone = ", gone" if vm.gone_ts is not None else ""
    return f"{vm.name or 'no name'} ({facts}{gone})"
