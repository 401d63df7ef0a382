"""The answer in one sentence: which VM is in which trouble, and for how long."""

from __future__ import annotations

from typing import assert_never

from kvmtrace.judgement.urgency import Urgency, has_page, urgency_of
from kvmtrace.model import Incident, Notification, PageClass, Snapshot, VerdictWord
from kvmtrace.views.format import age_of

_NAMES = 2
_VERDICTS = {
    Urgency.LOOPING: VerdictWord.LOOPING,
    Urgency.STOPPED: VerdictWord.STOPPED,
    Urgency.UNCLEAR: VerdictWord.UNKNOWN,
    Urgency.HANDLED: VerdictWord.HANDLED,
}


def word(urgency: Urgency) -> str:
    """The urgency as the first word of an answer: ``LOOPING``."""
    return urgency.value.upper()


def answer(incident: Incident, snapshot: Snapshot, now: int) -> str:
    """Who, what, and for how long at ``now``: a sentence, without the urgency's word."""
    urgency = urgency_of(incident)
    vms = concerned(incident, urgency)
    who = _names(incident, vms, snapshot)
    several = len(vms) > 1
    has = "have" if several else "has"
    poisoned = "that was poisoned " + _ago(incident, now, snapshot)
    match urgency:
        case Urgency.LOOPING:
            since = _age(_notified(incident, vms), now, snapshot)
            return f"{who} {has} been stuck on a poisoned page for {since}."
        case Urgency.STOPPED:
            since = _age(_notified(incident, vms), now, snapshot)
            a_vcpu = "vCPUs" if several else "a vCPU"
            return f"{who} {has} been hit by a poisoned page: {a_vcpu} stopped {since} ago."
        case Urgency.UNDELIVERED:
            times = "once" if incident.undelivered == 1 else f"{incident.undelivered:,} times"
            were = "were" if several else "was"
            return f"{who} {were} refused a poisoned page {times}, and no VMM was notified."
        case Urgency.KERNEL:
            return f"The host can go down at any time: its kernel may use a page {poisoned}."
        case Urgency.UNCLEAR:
            since = _age(_notified(incident, vms), now, snapshot)
            were = "were" if several else "was"
            ahead = ", before any guest touched it" if _is_ahead(incident, vms) else ""
            return (
                f"{who} {were} notified of a poisoned page {since} ago{ahead};"
                " what it did is not known."
            )
        case Urgency.LATENT if incident.before_start:
            return f"{who} {has} a page {poisoned}; no access to it was seen since."
        case Urgency.LATENT:
            since = _age(begin(incident), now, snapshot)
            return f"{who} {has} had a poisoned page for {since}, not touched by its guest yet."
        case Urgency.UNOWNED:
            was = poisoned.removeprefix("that ")
            return f"A page {was}; {_without_owner(incident)}no VM is known to have it."
        case Urgency.HANDLED if vms:
            run = "run" if several else "runs"
            return f"{who} {run} on without a page {poisoned}."
        case Urgency.HANDLED:
            return f"No VM has the page any more {poisoned}."
        case Urgency.CLOSED if incident.unpoisoned_ts is not None:
            return f"It is over: a page {poisoned} no longer is."
        case Urgency.CLOSED if incident.rebooted_ts is not None:
            whose = f"{who} had" if vms else "there was"
            return f"It is over: {whose} a page {poisoned}, and the host was rebooted since."
        case Urgency.CLOSED:
            gone = "are gone" if several else "is gone"
            return f"It is over: {who}, which had a page {poisoned}, {gone}."
    assert_never(urgency)


def begin(incident: Incident) -> int | None:
    """When an incident began, as far as is known."""
    if incident.poisoned_ts is None and incident.timeline:
        return incident.timeline[0].ts
    return incident.poisoned_ts if incident.poisoned_ts is not None else incident.first_delivery_ts


def concerned(incident: Incident, urgency: Urgency) -> list[int]:
    """Keys of the VMs for which the incident is that urgent; empty if none is known."""
    notified = [one.vm for one in incident.notifications]
    owners = [owner.vm for owner in incident.owners]
    verdicts = {verdict.vm: verdict.word for verdict in incident.verdicts}
    everybody = list(dict.fromkeys([*verdicts, *notified, *owners]))
    there = [vm for vm in everybody if has_page(incident, vm)]
    match urgency:
        case Urgency.CLOSED:
            return everybody
        case Urgency.LOOPING | Urgency.STOPPED | Urgency.UNCLEAR | Urgency.HANDLED:
            judged = [vm for vm in there if verdicts.get(vm) == _VERDICTS[urgency]]
            return judged if judged or urgency == Urgency.HANDLED else there
        case Urgency.UNDELIVERED | Urgency.LATENT:
            return [vm for vm in there if vm not in verdicts] or there
        case Urgency.KERNEL | Urgency.UNOWNED:
            return there
    assert_never(urgency)


def _names(incident: Incident, vms: list[int], snapshot: Snapshot) -> str:
    if not vms:
        return "A VM of a process with several" if incident.sigbus else "A VM not known"
    known = [incident.vm_identities.get(vm) or snapshot.vms.get(vm) for vm in vms]
    names = sorted({vm.label for vm in known if vm is not None})
    # Of one name there may be several.
    if not names:
        return "A VM not known by name" if len(vms) == 1 else f"{len(vms)} VMs not known by name"
    if len(vms) == len(names) <= _NAMES:
        return " and ".join(names)
    return f"{names[0]} and {_more(len(vms) - 1)}"


def _more(count: int) -> str:
    return "another VM" if count == 1 else f"{count} more VMs"


def _notified(incident: Incident, vms: list[int]) -> int | None:
    """When the first of these VMs was first notified."""
    first = [one.first_ts for one in _notifications(incident, vms)]
    return min(first, default=incident.first_delivery_ts)


def _notifications(incident: Incident, vms: list[int]) -> list[Notification]:
    return [one for one in incident.notifications if one.vm in vms]


def _is_ahead(incident: Incident, vms: list[int]) -> bool:
    mine = _notifications(incident, vms)
    return bool(mine) and all(set(one.sigbus) == {"AO"} and not one.exits for one in mine)


def _without_owner(incident: Incident) -> str:
    match incident.page_class:
        case PageClass.HANDLED:
            return "the kernel took it out of use, and "
        case PageClass.PROCESS:
            return "a process or a file has it, and "
        case PageClass.VM:
            return "it is guest memory, and "
    return ""


def _ago(incident: Incident, now: int, snapshot: Snapshot) -> str:
    if incident.before_start:
        return "before kvmtrace started"
    return f"{_age(begin(incident), now, snapshot)} ago"


def _age(ts: int | None, now: int, snapshot: Snapshot) -> str:
    if ts is None:
        return "an unknown time"
    age = age_of(ts, now, snapshot.steps)
    return "a moment" if age == "0 s" else age
