"""Immutable copies of incidents, and what is judged of an incident at a time."""

from __future__ import annotations

from collections.abc import Mapping
from operator import attrgetter

from kvmtrace.correlate.incident import IncidentState
from kvmtrace.correlate.verdicts import Evidence, is_looping, judge, verdict_until
from kvmtrace.events import LAST_NS
from kvmtrace.facts import TimelineEntry
from kvmtrace.model import (
    Incident,
    IncidentStatus,
    Notification,
    Origin,
    Verdict,
    VerdictWord,
    VmIdentity,
)
from kvmtrace.quick import maker

Identities = Mapping[int, VmIdentity]
"""Who the VMs of an incident are, as far as known, by key."""

_SETTLED = (VerdictWord.HANDLED, VerdictWord.EXITED)

_TS = attrgetter("ts")

_make_incident = maker(Incident)
_make_notification = maker(Notification)


def is_settled(incident: IncidentState, now: int, who: Identities) -> bool:
    """Whether every VM that owns the page was notified of it and handled it."""
    verdicts, _ = _judged(incident, now, who, _notifications(incident))
    words = {verdict.vm: verdict.word for verdict in verdicts}
    return all(words.get(vm) in _SETTLED for vm in incident.holders | words.keys())


def freeze(
    incident: IncidentState,
    now: int,
    who: Identities,
    origin: Origin | None,
    undelivered: int,
) -> tuple[Incident, int]:
    """Return an immutable copy, and until when it is the same unless something happens."""
    notifications = _notifications(incident)
    verdicts, until = _judged(incident, now, who, notifications)
    owners = tuple(incident.owners.values())
    copy = _make_incident(
        id=incident.id,
        state=_state(incident, now, who, notifications),
        pfn=incident.pfn,
        page_type=incident.page_type,
        result=incident.result,
        page_class=incident.page_class,
        poisoned_ts=incident.poisoned_ts,
        owners=owners,
        released=tuple(filter(incident.is_released, owners)) if incident.released else (),
        exits=incident.exits,
        sigbus=incident.sigbus,
        sigbus_at_poison=incident.sigbus_at_poison,
        sigbus_to_others=incident.sigbus_to_others,
        first_delivery_ts=incident.first_delivery_ts,
        last_delivery_ts=incident.last_delivery_ts,
        undelivered=undelivered,
        before_start=incident.before_start,
        unpoisoned_ts=incident.unpoisoned_ts,
        size=incident.size,
        origin=origin,
        vm_identities=who,
        notifications=notifications,
        verdicts=verdicts,
        timeline=_timeline(incident),
        omitted=incident.omitted,
        page_shift=incident.page.bit_length() - 1,
        guest_memfd=incident.guest_memfd,
        rebooted_ts=incident.rebooted_ts,
        former_ids=tuple(incident.former_ids),
    )
    return copy, until


def _notifications(incident: IncidentState) -> tuple[Notification, ...]:
    """How often each vCPU was notified."""
    return tuple(
        _make_notification(
            vm,
            vcpu,
            delivery.exits,
            dict(delivery.sigbus),
            delivery.first_ts,
            delivery.last_ts,
            max(delivery.pages.values(), default=None),
        )
        for (vm, vcpu), delivery in incident.deliveries.items()
    )


def _state(
    incident: IncidentState, now: int, who: Identities, notifications: tuple[Notification, ...]
) -> IncidentStatus:
    """How far it is; after a loop it is ``delivered`` again (its verdict has the loop)."""
    if incident.over:
        return IncidentStatus.CLOSED
    gone = {key for key, one in who.items() if one.gone_ts is not None}
    if any(one.vm not in gone and is_looping(one, now) for one in notifications):
        return IncidentStatus.LOOPING
    if incident.first_delivery_ts is not None:
        return IncidentStatus.DELIVERED
    return IncidentStatus.LATENT if incident.holders else IncidentStatus.UNOWNED


def _judged(
    incident: IncidentState, now: int, who: Identities, notifications: tuple[Notification, ...]
) -> tuple[tuple[Verdict, ...], int]:
    """One verdict for each VM that was notified, and until when they are the same."""
    found, until = [], LAST_NS
    for vm in dict.fromkeys(one.vm for one in notifications):
        one = who.get(vm)
        released = incident.released
        evidence = Evidence(
            vm,
            now,
            tuple(one for one in notifications if one.vm == vm),
            tuple(x for (of, _), seen in incident.samples.items() if of == vm for x in seen),
            one.gone_ts if one else None,
            tuple(sorted(hva for of, hva in released if of == vm)) if released else (),
        )
        found.append(judge(evidence))
        until = min(until, verdict_until(evidence))
    return tuple(found), until


def _timeline(incident: IncidentState) -> tuple[TimelineEntry, ...]:
    entries = [entry.frozen() for entry in incident.entries.values()]
    for site in incident.error_sites:
        entries += [entry.frozen() for entry in site.entries.values()]
    entries.sort(key=_TS)
    return tuple(entries)
