"""What `kvmtrace explain` prints: of what a person named, or of all that is open."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass

from kvmtrace import kvm
from kvmtrace.events import Host
from kvmtrace.judgement.actions import actions, named
from kvmtrace.judgement.migration import migration
from kvmtrace.judgement.urgency import Level, Urgency, by_urgency, urgency_of
from kvmtrace.model import Incident, Snapshot, SoftOfflinedPage, Vm, VmIdentity
from kvmtrace.views.advice import kernel_difference
from kvmtrace.views.answer import answer, word
from kvmtrace.views.explain import (
    Showing,
    counted_errors,
    full_name,
    headed,
    headline,
    listing,
    origin_parts,
    paragraph,
    sections,
)
from kvmtrace.views.format import (
    Line,
    age_of,
    cells,
    counted,
    dimm_of,
    fold,
    listed,
    size_of,
    style_of,
    time_in,
    zone_of,
)
from kvmtrace.views.lookup import Target, TargetKind, known_vms

# Whole stories of so many incidents; of the others a line each, up to so many.
_STORIES = 3
_LINES = 30
_IDS = 3
_OVER = 3

OK, UNCLEAR = "OK", "UNCLEAR"

_CAUSES = {
    "hwpoison": "poisoned page",
    "conversion": "conversion between private and shared memory, normal in a confidential VM",
    "userfault": "page that the VMM had to provide, normal in demand paging",
    "backing": "failure of guest_memfd to give a page: gone, unbound or out of memory",
    "unannotated": "EFAULT of which KVM reports no address",
    "other": "other error",
}


@dataclass(frozen=True, slots=True)
class Stamp:
    """What the whole screen is of. ``version``: of the kvmtrace that watched, None: not known.

    ``via``: where it was read from, if not from this host's kernel: ``recording sick.jsonl``.
    """

    version: str | None = None
    via: str | None = None

    def lines(self, snapshot: Snapshot, showing: Showing) -> list[str]:
        """Host, kernel, version, source; time and zone."""
        host = snapshot.host
        what = listed(_host_parts(host, self)) if host is not None else ""
        when = f"as of {_when(showing.end(snapshot), snapshot, showing)}"
        both = listed(filter(None, (what, when)))
        if cells(both) <= showing.width or not what:
            return [both]
        return [*fold(what, showing.width), when]


def _host_parts(host: Host, stamp: Stamp) -> list[str]:
    source = listed(filter(None, (host.source, stamp.via)))
    version = f"kvmtrace {stamp.version}" if stamp.version else "kvmtrace"
    return [host.name, f"Linux {host.kernel}", f"{version} ({source})"]


def of_all(snapshot: Snapshot, stamp: Stamp, showing: Showing) -> Iterator[Line]:
    """All that is open, worst first; or that nothing is."""
    found = by_urgency(one for one in snapshot.incidents if urgency_of(one) != Urgency.CLOSED)
    known = sum(one.host_at_risk for one in found)
    if snapshot.kernel_pages > known:
        pages = counted(snapshot.kernel_pages - known, "more poisoned page" if known else "poisoned page")
        text = f"The host can go down at any time: its kernel may use {pages}, forgotten since."
        yield from headed(word(Urgency.KERNEL), style_of(Urgency.KERNEL), text, showing.width)
    if found:
        yield from _incidents(found, snapshot, stamp, showing)
        return
    text = f"No poisoned page of a VM is known on {_host_name(snapshot)}, {_since(snapshot, showing)}."
    yield from _healthy(text, snapshot, stamp, showing)
    yield from _over(by_urgency(snapshot.incidents), snapshot, showing)
    yield from listing("Not known", blind_spots(snapshot), showing.width)


def of_target(
    target: Target, snapshot: Snapshot, stamp: Stamp, showing: Showing
) -> Iterator[Line]:
    """What is known of what was named."""
    found = by_urgency(target.incidents)
    match target.kind:
        case TargetKind.VM if len(target.vms) > 1:
            yield from _vms(target, snapshot, stamp, showing)
        case TargetKind.VM:
            yield from _vm(target, snapshot, stamp, showing)
        case TargetKind.DIMM:
            yield from _dimms(target, snapshot, stamp, showing)
        case _ if found:
            yield from _incidents(found, snapshot, stamp, showing, target.reading)
        case TargetKind.PAGE:
            yield from _page(target, snapshot, stamp, showing)
        case _:
            names = listed(known_vms(snapshot)[vm].label for vm in target.vms)
            text = f"{target.text} is not poisoned as far as kvmtrace knows"
            yield from _healthy(
                f"{text}, {_since(snapshot, showing)}.", snapshot, stamp, showing, target.reading
            )
            of_vm = [one for one in snapshot.incidents if set(target.vms) & set(one.vm_identities)]
            if of_vm := [one for one in of_vm if urgency_of(one) != Urgency.CLOSED]:
                yield ()
                yield ((f"Elsewhere in {names}", "head"),)
                yield from _lines(by_urgency(of_vm), snapshot, showing)
            yield from listing("Not known", blind_spots(snapshot), showing.width)


# -- incidents


def _incidents(
    found: Sequence[Incident],
    snapshot: Snapshot,
    stamp: Stamp,
    showing: Showing,
    reading: str | None = None,
    after: Iterable[Line] = (),
) -> Iterator[Line]:
    """The answers, the stamp, and the stories of the worst."""
    if len(found) == 1:
        yield from headline(found[0], snapshot, showing)
        yield from _stamp(snapshot, stamp, showing, reading)
        yield from sections(found[0], snapshot, showing, after)
        return
    now = [one for one in found if urgency_of(one).level == Level.NOW]
    told = (now or list(found))[: _STORIES if now else 1]
    yield from _lines(found, snapshot, showing)
    yield from _stamp(snapshot, stamp, showing, reading)
    yield from after
    for incident in told:
        yield ()
        yield (("-" * showing.width, "dim"),)
        yield from headline(incident, snapshot, showing)
        yield from sections(incident, snapshot, showing)
    if len(told) < len(found):
        yield ()
        others = f"The whole story of each other one: {_explain('ID', showing)}"
        yield from paragraph(others, showing.width, "", "dim")


def _explain(what: str, showing: Showing) -> str:
    return f"kvmtrace explain {what}{showing.command or ''}"


def _lines(found: Sequence[Incident], snapshot: Snapshot, showing: Showing) -> Iterator[Line]:
    """A paragraph for each incident: urgency, answer, what to do and id.

    Pages of no VM that need the same, often nothing, share one.
    """
    groups: dict[tuple[Urgency, str], list[Incident]] = {}
    for incident in found:
        urgency = urgency_of(incident)
        brief = actions(incident, snapshot)[0].brief
        key = brief if urgency == Urgency.UNOWNED else incident.id
        groups.setdefault((urgency, key), []).append(incident)
    for (urgency, _), some in list(groups.items())[:_LINES]:
        ids = listed(one.id for one in some[:_IDS]) + (", …" if some[_IDS:] else "")
        text = answer(named(some[0], snapshot), snapshot, showing.end(snapshot))
        if len(some) > 1:
            text = f"{len(some)} pages, the last one: {text}"
        brief = actions(some[0], snapshot)[0].brief
        text = f"{text} {brief[:1].upper()}{brief[1:]} ({ids})."
        yield from headed(f"{word(urgency):<11}", style_of(urgency), text, showing.width)
    if len(groups) > _LINES:
        more = f"and {len(groups) - _LINES} more: kvmtrace top --once lists them"
        yield from paragraph(more, showing.width, "", "dim")


# -- VMs


def _vm(target: Target, snapshot: Snapshot, stamp: Stamp, showing: Showing) -> Iterator[Line]:
    (key,) = target.vms
    one = known_vms(snapshot)[key]
    is_gone = one.gone if isinstance(one, Vm) else one.gone_ts is not None
    here = by_urgency(one for one in target.incidents if urgency_of(one) != Urgency.CLOSED)
    over = by_urgency(one for one in target.incidents if urgency_of(one) == Urgency.CLOSED)
    can_migrate = [] if is_gone else list(_migration([key], snapshot, showing))
    if here or (over and is_gone):
        yield from _incidents(here or over, snapshot, stamp, showing, target.reading, can_migrate)
        if here and over:
            yield from _over(over, snapshot, showing)
        return
    yield from _healthy(
        f"{one.label} {_no_page(one)}, {_since(snapshot, showing)}.",
        snapshot,
        stamp,
        showing,
        target.reading,
    )
    yield from can_migrate
    yield ()
    yield (("The VM", "head"),)
    for lead, fact in _facts(one, snapshot, showing):
        yield from paragraph(fact, showing.width, lead)
    if over:
        yield from _over(over, snapshot, showing)
    yield from listing("Not known", blind_spots(snapshot), showing.width)


def _no_page(one: Vm | VmIdentity) -> str:
    if isinstance(one, Vm) and one.poisoned_pages:
        # Those whose incidents had no room.
        return f"had {counted(one.poisoned_pages, 'poisoned page')} of which no more is known"
    return "has no poisoned page as far as kvmtrace knows"


def _over(over: Sequence[Incident], snapshot: Snapshot, showing: Showing) -> Iterator[Line]:
    """Incidents that are over, the last ones."""
    end = showing.end(snapshot)
    items = [
        f"{one.id}: {answer(named(one, snapshot), snapshot, end).removeprefix('It is over: ')}"
        for one in over[:_OVER]
    ]
    if over[_OVER:]:
        items.append(f"and {len(over) - _OVER} more")
    yield from listing("What is over", items, showing.width)


def _vms(target: Target, snapshot: Snapshot, stamp: Stamp, showing: Showing) -> Iterator[Line]:
    """Several VMs that were named: which ones, and the incidents of all."""
    here = by_urgency(one for one in target.incidents if urgency_of(one) != Urgency.CLOSED)
    if here:
        after = [*_listed_vms(target, snapshot, showing)]
        after += _migration(target.vms, snapshot, showing)
        yield from _incidents(here, snapshot, stamp, showing, target.reading, after)
        return
    count = len(target.vms)
    text = f"None of {count} VMs has a poisoned page as far as kvmtrace knows"
    text += f", {_since(snapshot, showing)}."
    yield from _healthy(text, snapshot, stamp, showing, target.reading)
    yield from _listed_vms(target, snapshot, showing)
    if target.incidents:
        yield from _over(by_urgency(target.incidents), snapshot, showing)
    yield from listing("Not known", blind_spots(snapshot), showing.width)


def _listed_vms(target: Target, snapshot: Snapshot, showing: Showing) -> Iterator[Line]:
    """A line for each VM; those with the worst incidents first."""
    yield ()
    yield ((f"{len(target.vms)} VMs go by that", "head"),)
    known = known_vms(snapshot)
    ranked = {key: _worst(key, target.incidents) for key in target.vms}
    for key in sorted(target.vms, key=lambda key: (ranked[key].rank if ranked[key] else 99, key)):
        urgency = ranked[key]
        state = f"{urgency.value}: " if urgency else "no poisoned page known: "
        style = style_of(urgency) if urgency else ""
        lines = fold(_full(known[key]), showing.width, f"  {state}", 4)
        yield ((f"  {state}", style), (lines[0][len(state) + 2 :], ""))
        yield from (((line, ""),) for line in lines[1:])


def _worst(key: int, incidents: Iterable[Incident]) -> Urgency | None:
    found = [urgency_of(one) for one in incidents if key in one.vm_identities]
    return min(found, key=lambda urgency: urgency.rank, default=None)


def _full(one: Vm | VmIdentity) -> str:
    if isinstance(one, VmIdentity):
        return full_name(one)
    return full_name(one.identity) + (", gone" if one.gone else "")


def _migration(keys: Sequence[int], snapshot: Snapshot, showing: Showing) -> Iterator[Line]:
    """Whether the live ones of these VMs can be migrated now."""
    for key in keys:
        vm = snapshot.vms.get(key)
        if vm is None or vm.gone:
            continue
        found = migration(key, snapshot)
        word = {True: "Yes", False: "No", None: "Not known"}[found.possible]
        yield ()
        question = f"Can {vm.label} be migrated now?"
        yield from headed(question, "head", f"{word}: {found.reason}.", showing.width)


def _facts(
    one: Vm | VmIdentity, snapshot: Snapshot, showing: Showing
) -> Iterator[tuple[str, str]]:
    """Indent and text of what is known of a VM without poisoned pages."""
    yield "  ", _full(one)
    if not isinstance(one, Vm):
        return
    if one.unread:
        yield "  ", f"not looked up: {one.unread}"
    if one.exits:
        total = sum(one.exits.values())
        yield "  ", f"{total:,} failed {'exit' if total == 1 else 'exits'} of KVM_RUN:"
        for (errno, cause), count in sorted(one.exits.items(), key=lambda entry: -entry[1]):
            yield "    ", f"{count:,} {errno}: {_CAUSES.get(cause or '', 'cause not known')}"
    else:
        yield "  ", "no failed exit of KVM_RUN"
    signals = [f"{count:,} SIGBUS {code}" for code, count in sorted(one.sigbus.items()) if count]
    yield "  ", listed(signals, "no SIGBUS")
    if one.undelivered:
        refusals = counted(one.undelivered, "refusal")
        yield "  ", f"{refusals} by guest_memfd, of which no exit notified it"
    if one.last_ts is not None:
        yield "  ", f"last exit or signal at {_when(one.last_ts, snapshot, showing)}"


# -- DIMMs


def _dimms(target: Target, snapshot: Snapshot, stamp: Stamp, showing: Showing) -> Iterator[Line]:
    here = by_urgency(one for one in target.incidents if urgency_of(one) != Urgency.CLOSED)
    over = by_urgency(one for one in target.incidents if urgency_of(one) == Urgency.CLOSED)
    errors: list[Line] = [(), (("Errors", "head"),)]
    for label in target.dimms:
        history = snapshot.dimms.get(label)
        text = counted_errors(history, "reported") if history else "no corrected error reported"
        errors += paragraph(f"{dimm_of(label)}: {text}", showing.width)
    if here:
        yield from _incidents(here, snapshot, stamp, showing, target.reading, errors)
    else:
        labels = listed(map(dimm_of, target.dimms))
        text = f"No VM has a poisoned page of {labels} as far as kvmtrace knows"
        text += f", {_since(snapshot, showing)}; errors of it were reported."
        yield from headed("WATCH", "note", text, showing.width)
        yield from _stamp(snapshot, stamp, showing, target.reading)
        yield from errors
        yield from listing("Not known", blind_spots(snapshot), showing.width)
    if over:
        yield from _over(over, snapshot, showing)


# -- pages


def _page(target: Target, snapshot: Snapshot, stamp: Stamp, showing: Showing) -> Iterator[Line]:
    """A page that is in no incident."""
    pfn = target.pfn or 0
    moved = [page for page in snapshot.soft_offlines if page.pfn == pfn]
    told = snapshot.reported.get(pfn)
    if moved:
        yield from headed("WATCH", "note", f"pfn {pfn:#x}: {_soft_offlined(moved[-1])}.", showing.width)
    elif told is not None:
        text = f"pfn {pfn:#x} is not poisoned as far as kvmtrace knows; it had errors."
        yield from headed("WATCH", "note", text, showing.width)
    else:
        text = f"pfn {pfn:#x} is not poisoned as far as kvmtrace knows"
        text += f", {_since(snapshot, showing)}."
        yield from _healthy(text, snapshot, stamp, showing, target.reading)
        yield from listing("Not known", blind_spots(snapshot), showing.width)
        return
    yield from _stamp(snapshot, stamp, showing, target.reading)
    facts = [
        f"{listed(origin_parts(page.origin))}, reported by {listed(page.origin.via)}"
        for page in moved
        if page.origin is not None
    ]
    if told is not None and not moved:
        label = f", {dimm_of(told.label)}" if told.label else ""
        facts.append(f"{counted_errors(told.history, 'at this page')}{label}")
    yield from listing("The page", facts, showing.width)
    yield from listing("Not known", blind_spots(snapshot), showing.width)


def _soft_offlined(page: SoftOfflinedPage) -> str:
    if page.errno:
        return f"soft offline was tried and refused with {kvm.errno_name(page.errno)}; still in use"
    return "soft-offlined; its contents were moved, no guest is harmed"


# -- what stands on every screen


def _healthy(
    text: str, snapshot: Snapshot, stamp: Stamp, showing: Showing, reading: str | None = None
) -> Iterator[Line]:
    is_clear = sees_poison(snapshot)
    yield from headed(OK if is_clear else UNCLEAR, "" if is_clear else "warn", text, showing.width)
    yield from _stamp(snapshot, stamp, showing, reading)


def sees_poison(snapshot: Snapshot) -> bool:
    """Whether a page that is poisoned would be known: nothing of that was missed."""
    if snapshot.kernel is not None and snapshot.kernel.missed:
        return False
    forgotten = any(vm.forgotten_pages for vm in snapshot.vms.values() if not vm.gone)
    return not forgotten and all(probe.attached for probe in snapshot.probes if probe.name == "poison")


def _stamp(
    snapshot: Snapshot, stamp: Stamp, showing: Showing, reading: str | None
) -> Iterator[Line]:
    for line in stamp.lines(snapshot, showing):
        yield ((line, "dim"),)
    if reading is not None:
        yield from paragraph(f"Read {reading}.", showing.width, "", "dim")


def _host_name(snapshot: Snapshot) -> str:
    return snapshot.host.name if snapshot.host is not None else "this host"


def _since(snapshot: Snapshot, showing: Showing) -> str:
    """``watching since 2026-09-21 14:13:20 UTC (97 min)``."""
    since = snapshot.since
    if since is None:
        return "watching since an unknown time"
    age = age_of(since, showing.end(snapshot), snapshot.steps)
    return f"watching since {_when(since, snapshot, showing)} ({age})"


def _when(ts: int, snapshot: Snapshot, showing: Showing) -> str:
    wall = snapshot.wall(ts)
    return f"{time_in(wall, showing.zone):%Y-%m-%d %H:%M:%S} {zone_of(wall, showing.zone)}"


def blind_spots(snapshot: Snapshot) -> list[str]:
    """Why something may be wrong with a host, or a page, of which nothing is known."""
    missing = []
    if off := [probe.name for probe in snapshot.probes if not probe.attached]:
        missing.append(f"what these probes would show, which are not attached: {listed(off)}")
    if lost := {where: count for where, count in snapshot.lost.items() if count}:
        counts = listed(f"{count:,} at {where}" for where, count in sorted(lost.items()))
        missing.append(f"what was lost on the way: {counts}")
    if snapshot.kernel is not None and snapshot.kernel.missed:
        missing.append(f"all of the memory failures: {kernel_difference(snapshot)}")
    corrupted = snapshot.host.hardware_corrupted_bytes if snapshot.host is not None else None
    if corrupted and not snapshot.incidents:
        missing.append(f"which pages HardwareCorrupted counts: {size_of(corrupted)}")
    return missing

