"""A VM explained, or several of one name: with its exits, and whether it can be migrated."""

from __future__ import annotations

from collections.abc import Iterable, Iterator

from kvmtrace.judgement.migration import migration
from kvmtrace.judgement.urgency import Urgency, by_urgency, urgency_of
from kvmtrace.model import Incident, Snapshot, Vm, VmIdentity
from kvmtrace.views.explain import Showing, full_name, headed, paragraph
from kvmtrace.views.explain_incidents import healthy, incidents, not_known, over
from kvmtrace.views.format import Line, counted, listed, refusals_of, style_of
from kvmtrace.views.lookup import Target, known_vms
from kvmtrace.views.stamp import moment

_SHOWN = 30
_POSSIBLE = {True: "yes", False: "no", None: "not known, so better not"}
_CAUSES = {
    "hwpoison": "poisoned page",
    "conversion": "conversion between private and shared memory, normal in a confidential VM",
    "userfault": "page that the VMM had to provide, normal in demand paging",
    "backing": "failure of guest_memfd to give a page: gone, unbound or out of memory",
    "unannotated": "EFAULT of which KVM reports no address",
    "other": "other error",
}


def of_vm(target: Target, snapshot: Snapshot, showing: Showing) -> Iterator[Line]:
    (key,) = target.vms
    one = known_vms(snapshot)[key]
    is_gone = one.gone if isinstance(one, Vm) else one.gone_ts is not None
    here = by_urgency(one for one in target.incidents if urgency_of(one) != Urgency.CLOSED)
    past = by_urgency(one for one in target.incidents if urgency_of(one) == Urgency.CLOSED)
    can_migrate = [] if is_gone else list(_migration(key, snapshot, showing))
    if here or (past and is_gone):
        yield from incidents(here or past, snapshot, showing, target.reading, can_migrate)
        if here and past:
            yield from over(past, snapshot, showing)
        return
    text, in_doubt = f"{one.label} {_no_page(one)}", migration(key, snapshot).possible is None
    yield from healthy(text, snapshot, showing, target.reading, in_doubt=in_doubt)
    yield from can_migrate
    yield ()
    yield (("The VM", "head"),)
    for lead, fact in _facts(one, snapshot, showing):
        yield from paragraph(fact, showing.width, lead)
    if past:
        yield from over(past, snapshot, showing)
    yield from not_known(snapshot, showing)


def _no_page(one: Vm | VmIdentity) -> str:
    if isinstance(one, Vm) and one.poisoned_pages:
        # Those whose incidents had no room.
        return f"had {counted(one.poisoned_pages, 'poisoned page')} of which no more is known"
    return "has no poisoned page as far as is known"


def of_vms(target: Target, snapshot: Snapshot, showing: Showing) -> Iterator[Line]:
    """Several VMs that were named: which ones, and the incidents of all."""
    here = by_urgency(one for one in target.incidents if urgency_of(one) != Urgency.CLOSED)
    if here:
        after = _listed_vms(target, snapshot, showing)
        yield from incidents(here, snapshot, showing, target.reading, after)
        return
    count = len(target.vms)
    text = f"None of {count} VMs has a poisoned page as far as is known"
    yield from healthy(text, snapshot, showing, target.reading)
    yield from _listed_vms(target, snapshot, showing)
    if target.incidents:
        yield from over(by_urgency(target.incidents), snapshot, showing)
    yield from not_known(snapshot, showing)


def _listed_vms(target: Target, snapshot: Snapshot, showing: Showing) -> Iterator[Line]:
    """A paragraph for each VM; those with the worst incidents first."""
    yield ()
    yield ((f"{len(target.vms)} VMs go by that", "head"),)
    known = known_vms(snapshot)
    worst = {key: _worst(key, target.incidents) for key in target.vms}
    last = len(Urgency)
    ordered = sorted(target.vms, key=lambda key: (one.rank if (one := worst[key]) else last, key))
    for key in ordered[:_SHOWN]:
        urgency, one = worst[key], known[key]
        state = urgency.value if urgency else "no page"
        text = full(one)
        if isinstance(one, Vm) and not one.gone:
            text += f"; can be migrated: {_POSSIBLE[migration(key, snapshot).possible]}"
        style = style_of(urgency) if urgency else ""
        yield from headed(f"  {state:<11}", style, text, showing.width)
    if ordered[_SHOWN:]:
        yield from paragraph(f"and {len(ordered) - _SHOWN} more", showing.width)


def _worst(key: int, incidents: Iterable[Incident]) -> Urgency | None:
    found = [urgency_of(one) for one in incidents if key in one.vm_identities]
    return min(found, key=lambda urgency: urgency.rank, default=None)


def full(one: Vm | VmIdentity) -> str:
    if isinstance(one, VmIdentity):
        return full_name(one)
    return full_name(one.identity) + (", gone" if one.gone else "")


def _migration(key: int, snapshot: Snapshot, showing: Showing) -> Iterator[Line]:
    """Whether a VM can be migrated now."""
    found = migration(key, snapshot)
    text = f"{_POSSIBLE[found.possible].capitalize()}: {found.reason}."
    yield ()
    question = f"Can {known_vms(snapshot)[key].label} be migrated now?"
    yield from headed(question, "head", text, showing.width)


def _facts(one: Vm | VmIdentity, snapshot: Snapshot, showing: Showing) -> Iterator[tuple[str, str]]:
    """Indent and text of what is known of a VM without poisoned pages."""
    yield "  ", full(one)
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
        yield "  ", refusals_of(one.undelivered)
    if one.last_ts is not None:
        yield "  ", f"last exit or signal at {moment(one.last_ts, snapshot)}"
