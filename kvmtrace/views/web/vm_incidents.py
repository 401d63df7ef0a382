"""Incidents by VM: how far each one is for that VM, and what the VM's VMM did.

A page that two VMs share can be looping for one of them while the other has not touched it. The
incident's own state is the worst of both, and an alert has to name the right VM.
"""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Iterable, Iterator, Mapping, Sequence
from types import MappingProxyType

from kvmtrace.judgement.urgency import has_page, is_gone
from kvmtrace.model import Incident, IncidentStatus, VerdictWord
from kvmtrace.views.web.vm_labels import VmSeries

# A page that is latent, but that guest_memfd refused to a guest without its VMM being notified. It
# has another urgency, so it is a word of its own here, as in tables.
UNDELIVERED = "undelivered"

# Exported as 0 for every VM: an alert can only be tested, and a panel only be drawn, with a series.
ZERO_STATES = (*IncidentStatus, UNDELIVERED)
ZERO_VERDICTS = tuple(VerdictWord)

# Most VMs have no incidents: they share these.
_NO_STATES: Mapping[str, int] = MappingProxyType(dict.fromkeys(map(str, ZERO_STATES), 0))
_NO_VERDICTS: Mapping[str, int] = MappingProxyType(dict.fromkeys(map(str, ZERO_VERDICTS), 0))

Counts = Mapping[str, int]
"""{state or verdict: incidents}, the zeros included."""


def by_label(
    series: Sequence[VmSeries], vms: Iterable[int], incidents: Iterable[Incident]
) -> Iterator[tuple[str, Counts, Counts]]:
    """Yield label, incidents by state and incidents by verdict for each of ``series``.

    ``vms``: keys of all VMs; those without series of their own are summed in the last one.
    """
    own = {one.vm.key for one in series if one.vm is not None}
    folded = [key for key in vms if key not in own]
    by_state, by_verdict = _counts(incidents)
    for one in series:
        keys = folded if one.vm is None else [one.vm.key]
        if one.vm is not None and one.vm.key not in by_state and one.vm.key not in by_verdict:
            yield one.label, _NO_STATES, _NO_VERDICTS
        else:
            states = _sum(by_state, keys, ZERO_STATES)
            yield one.label, states, _sum(by_verdict, keys, ZERO_VERDICTS)


def states(incident: Incident) -> dict[int, str]:
    """The state of the incident for each of its VMs, by key."""
    notified = {one.vm for one in incident.notifications}
    words = {one.vm: one.word for one in incident.verdicts}
    vms = dict.fromkeys([*(owner.vm for owner in incident.owners), *notified])
    return {vm: _state(incident, vm, notified, words.get(vm)) for vm in vms}


def verdicts(incident: Incident) -> dict[int, str]:
    """The verdict on each of its VMs that matters, by key.

    None on a VM that has another page in place of the poisoned one, unless it is stuck
    nevertheless: nothing is left to do for it.
    """
    judged = {one.vm: str(one.word) for one in incident.verdicts}
    return {
        vm: word for vm, word in judged.items() if is_gone(incident, vm) or has_page(incident, vm)
    }


def _state(incident: Incident, vm: int, notified: set[int], word: VerdictWord | None) -> str:
    if is_gone(incident, vm) or incident.state == IncidentStatus.CLOSED:
        return IncidentStatus.CLOSED
    if word == VerdictWord.LOOPING:
        return IncidentStatus.LOOPING
    has = has_page(incident, vm)
    # As urgency_of judges: a signal ahead of time does not help a guest that is refused the page.
    is_refused = incident.undelivered and not incident.exits
    if has and is_refused and word != VerdictWord.STOPPED:
        return UNDELIVERED
    if vm in notified:
        return IncidentStatus.DELIVERED
    if not notified and incident.first_delivery_ts is not None:
        return incident.state  # a process with several VMs was notified: one of them
    return IncidentStatus.LATENT if has else IncidentStatus.UNOWNED


_CountsByVm = Mapping[int, Counter[str]]


def _counts(incidents: Iterable[Incident]) -> tuple[_CountsByVm, _CountsByVm]:
    """Incidents by VM and state, and by VM and verdict."""
    by_state: defaultdict[int, Counter[str]] = defaultdict(Counter)
    by_verdict: defaultdict[int, Counter[str]] = defaultdict(Counter)
    for incident in incidents:
        for vm, state in states(incident).items():
            by_state[vm][state] += 1
        for vm, word in verdicts(incident).items():
            by_verdict[vm][word] += 1
    return by_state, by_verdict


def _sum(counts: _CountsByVm, keys: Iterable[int], zeros: Iterable[str]) -> dict[str, int]:
    total = dict.fromkeys(map(str, zeros), 0)
    for key in keys:
        for word, count in counts.get(key, {}).items():
            total[word] = total.get(word, 0) + count
    return total
