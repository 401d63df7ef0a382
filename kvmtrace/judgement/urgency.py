"""How urgent an incident is: one judgement, by which every view sorts and colours.

The state shows how far an incident is, a verdict what one VMM did. The urgency is both together,
of the VM that is worst off.
"""

from __future__ import annotations

from collections.abc import Iterable
from enum import StrEnum

from kvmtrace.model import Incident, IncidentStatus, Snapshot, VerdictWord


class Level(StrEnum):
    """What the colours mean."""

    NOW = "now"  # red: somebody must act now
    SOON = "soon"  # yellow
    WATCH = "watch"  # cyan
    OVER = "over"  # dim


class Urgency(StrEnum):
    """The urgency of an incident, the worst first."""

    LOOPING = "looping"  # a VMM is notified again and again, now
    STOPPED = "stopped"  # a vCPU that was notified no longer runs
    UNDELIVERED = "undelivered"  # guest_memfd refused the page, and no exit notified the VMM
    KERNEL = "kernel"  # the kernel uses the page, or may
    UNCLEAR = "unclear"  # a VMM was notified, and what it did is not known
    LATENT = "latent"  # a VM has the page, and its VMM was not notified
    UNOWNED = "unowned"  # no VM is known to have the page
    HANDLED = "handled"  # each VMM that was notified dealt with it, or no VM has the page any more
    CLOSED = "closed"  # the page is no longer poisoned, or its VMs are gone

    @property
    def rank(self) -> int:
        """The place in this order, 0 for the worst."""
        return _RANKS[self]

    @property
    def level(self) -> Level:
        """How soon somebody must act."""
        return _LEVELS[self]


_RANKS = {urgency: rank for rank, urgency in enumerate(Urgency)}
_LEVELS = {
    Urgency.LOOPING: Level.NOW,
    Urgency.STOPPED: Level.NOW,
    Urgency.UNDELIVERED: Level.NOW,
    Urgency.KERNEL: Level.NOW,
    Urgency.UNCLEAR: Level.SOON,
    Urgency.LATENT: Level.SOON,
    Urgency.UNOWNED: Level.WATCH,
    # Not over: the VM lacks a page until it is reset or started again.
    Urgency.HANDLED: Level.WATCH,
    Urgency.CLOSED: Level.OVER,
}


def urgency_of(incident: Incident) -> Urgency:
    """The urgency of an incident, by its state and all verdicts."""
    if incident.state == IncidentStatus.CLOSED:
        return Urgency.CLOSED
    verdicts = {one.vm: one.word for one in incident.verdicts if has_page(incident, one.vm)}
    owners = {owner.vm for owner in incident.owners if has_page(incident, owner.vm)}
    words = set(verdicts.values())
    if incident.state == IncidentStatus.LOOPING or VerdictWord.LOOPING in words:
        return Urgency.LOOPING
    if VerdictWord.STOPPED in words:
        return Urgency.STOPPED
    if incident.undelivered and not incident.exits and (owners or not incident.owners):
        return Urgency.UNDELIVERED
    if incident.host_at_risk:
        return Urgency.KERNEL
    if VerdictWord.UNKNOWN in words or (_is_unjudged(incident) and (owners or not incident.owners)):
        return Urgency.UNCLEAR
    if owners - verdicts.keys():
        return Urgency.LATENT
    return Urgency.UNOWNED if incident.state == IncidentStatus.UNOWNED else Urgency.HANDLED


def by_urgency(incidents: Iterable[Incident]) -> list[Incident]:
    """Incidents, the worst first, and the newest first among those of one urgency."""
    # By its begin, not by the last delivery: rows must not move at every delivery.
    return sorted(
        incidents,
        key=lambda one: (urgency_of(one).rank, -(one.poisoned_ts or one.first_delivery_ts or 0)),
    )


def host_urgency(snapshot: Snapshot) -> Urgency | None:
    """The worst urgency of a host's open incidents; None if none is open.

    The kernel's pages count although their incidents had no room.
    """
    found = {urgency_of(incident) for incident in snapshot.incidents} - {Urgency.CLOSED}
    if snapshot.kernel_pages:
        found.add(Urgency.KERNEL)
    return min(found, key=lambda urgency: urgency.rank, default=None)


def is_gone(incident: Incident, vm: int) -> bool:
    """Whether a VM of an incident, by key, has ended."""
    identity = incident.vm_identities.get(vm)
    return identity is not None and identity.gone_ts is not None


def has_page(incident: Incident, vm: int) -> bool:
    """Whether a VM still has the lost page, or is stuck on it although it no longer has."""
    if is_gone(incident, vm):
        return False
    places = [owner for owner in incident.owners if owner.vm == vm]
    replaced = bool(places) and all(owner in incident.released for owner in places)
    words = {verdict.word for verdict in incident.verdicts if verdict.vm == vm}
    return not replaced or bool(words & {VerdictWord.LOOPING, VerdictWord.STOPPED})


def is_vague(incident: Incident) -> bool:
    """Whether a process with several VMs was notified, and it is not known for which VM."""
    known = sum(count for one in incident.notifications for count in one.sigbus.values())
    return incident.first_delivery_ts is not None and incident.sigbus > known


def _is_unjudged(incident: Incident) -> bool:
    """Whether somebody was notified for whom there is no verdict."""
    notified = incident.state == IncidentStatus.DELIVERED
    return is_vague(incident) or (notified and not incident.verdicts)
