"""What is not known of an incident and why, and the next step that the evidence supports."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from enum import StrEnum, auto
from typing import assert_never

from kvmtrace import dimm_names, page_types
from kvmtrace.model import (
    Incident,
    IncidentStatus,
    PageClass,
    Snapshot,
    Verdict,
    VerdictWord,
)
from kvmtrace.views import vmm_advice
from kvmtrace.views.format import counted, dimm_of, hex_of, listed
from kvmtrace.views.timeline import finding_text
from kvmtrace.views.vmm_advice import Vmm

_NAMES = 8
_POSITIONS = {"rank": "that holds rank", "slot": "in slot", "channel": "on channel"}


def not_known(incident: Incident, snapshot: Snapshot) -> list[str]:
    """What is not known of an incident, each with the reason."""
    missing = []
    if incident.before_start:
        missing.append("when it was poisoned: before kvmtrace started")
    elif incident.poisoned_ts is None:
        missing.append("when and where: the poison itself was not seen, only what came of it")
    if incident.pfn is not None and incident.origin is None:
        missing.append(
            "where the error came from: no hardware report with this address was seen"
            + _without(snapshot, "mce", "mc_event", "extlog")
        )
    elif incident.origin is not None and not _names_dimm(incident.origin.label):
        missing.append("which DIMM: no report with this address named one")
    if not incident.owners and incident.page_class in (None, PageClass.VM, PageClass.PROCESS):
        missing.append("who owns the page: no VM that has it was found")
    vague = sorted({owner.vm for owner in incident.owners if owner.gfn is None})
    if vague:
        missing.append(f"the gfn in {_names(incident, vague)}: no memslot and no access shows it")
    if incident.size is None:
        missing.append("how much is lost: no mapping and no signal shows the size")
    if incident.first_delivery_ts is None and incident.owners:
        if incident.before_start:
            missing.append("who accessed it, and was notified, before kvmtrace started")
        elif off := _without(snapshot, "run", "sigbus", "sigbus_forced"):
            missing.append(f"whether the VMM was notified: not all notifications are watched{off}")
    for verdict in incident.verdicts:
        if verdict.word == VerdictWord.UNKNOWN:
            who = _names(incident, [verdict.vm])
            why = finding_text(verdict.evidence[0])
            if verdict.early:
                why = "it was notified only just now"
            missing.append(f"what {who} did about it: {why}")
    if incident.omitted:
        missing.append(f"{incident.omitted} entries of the timeline: there was no room for them")
    if snapshot.lost:
        lost = listed(f"{count} at {where}" for where, count in sorted(snapshot.lost.items()))
        missing.append(f"what was lost on the way: {lost}")
    if snapshot.kernel is not None and snapshot.kernel.missed:
        missing.append(kernel_difference(snapshot))
    return missing


def kernel_difference(snapshot: Snapshot) -> str:
    """Compare the kernel's count of memory failures with ours."""
    kernel = snapshot.kernel
    if kernel is None or kernel.handled is None:
        return "the kernel does not count memory failures here"
    return f"the kernel handled {kernel.handled}, kvmtrace saw {kernel.seen}"


def next_steps(incident: Incident, snapshot: Snapshot | None = None) -> list[str]:
    """What to do now, most urgent first. ``snapshot``: of the whole host."""
    host = _for_host(incident)
    if incident.host_at_risk and snapshot is not None:
        host += _not_moved(snapshot)
    steps = [*host, *_for_vms(incident), *_for_hardware(incident)]
    if not steps:
        steps.append(f"nothing: {_why_nothing(incident)}")
    return steps


def _for_host(incident: Incident) -> list[str]:
    """Steps for a page that is still in use, and that no VM is known to have."""
    verdict = f"{incident.page_type}: {incident.result}"
    if incident.host_at_risk:
        why = f"the kernel uses the page, or may ({verdict}), and can run into it at any time"
        if who := _notified(incident):
            return [
                f"move away the VMs that were not notified, stop {who} and start again on another"
                f" host, and reboot this host: {why}"
            ]
        return [f"move the VMs away and reboot this host: {why}"]
    if incident.state == IncidentStatus.CLOSED or incident.owners or incident.notifications:
        return []
    page = hex_of(incident.pfn)
    if incident.page_class == PageClass.PROCESS:
        return [
            f"see in the kernel's log which processes had page {page}: no VM is known to have it,"
            f" and the kernel could not take it out of use ({verdict})"
        ]
    if incident.page_class == PageClass.VM:
        return [f"find the VM that owns page {page}: it is guest memory (guest_memfd)"]
    if incident.page_class is None:
        return [
            f'see in the kernel\'s log what became of page {page} ("recovery action"): its'
            " verdict was not seen, and if the kernel uses the page the host is at risk"
        ]
    return []


def _not_moved(snapshot: Snapshot) -> Iterator[str]:
    """Warn of VMs that have lost other pages: migration reads these, and fails."""
    some = [vm.label for vm in snapshot.vms.values() if vm.poisoned_pages and not vm.gone]
    if some:
        who = listed(some[:_NAMES]) + (f" and {len(some) - _NAMES} more" if some[_NAMES:] else "")
        it = "it" if len(some) == 1 else "each of them"
        yield f"do not migrate {who}: shut {it} down, other pages of its memory are lost"


def _notified(incident: Incident) -> str:
    """Names of the live VMs that were notified of the page or may have it; "" if none."""
    keys = [one.vm for one in incident.notifications]
    keys += [verdict.vm for verdict in incident.verdicts]
    keys += [owner.vm for owner in incident.owners]
    here = [vm for vm in dict.fromkeys(keys) if not _is_gone(incident, vm)]
    who = [_names(incident, here)] if here else []
    if _is_vague(incident):
        who.append("all VMs of the process that was notified")
    return " and ".join(who)


class _How(StrEnum):
    WAIT = auto()  # and look again
    STOP = auto()  # and start
    CHECK = auto()  # whether it works
    SHUT_DOWN = auto()  # from inside the guest
    LATER = auto()  # the same, at the next opportunity


@dataclass(frozen=True, slots=True)
class _Need:
    """What a VM needs, and why."""

    how: _How
    why: str


def _for_vms(incident: Incident) -> list[str]:
    # The kernel's own page: the step for the host includes the VMs that were notified.
    if incident.state == IncidentStatus.CLOSED or incident.host_at_risk:
        return []
    verdicts = {verdict.vm: verdict for verdict in incident.verdicts}
    owners = [owner.vm for owner in incident.owners]
    if not verdicts and not owners and incident.first_delivery_ts is not None:
        return [
            "see whether all VMs of the process that was notified still work",
            "until then do not migrate, save, snapshot or dump them: one has the lost page",
        ]
    vms = [vm for vm in dict.fromkeys([*verdicts, *owners]) if _has_page(incident, vm)]
    needs: dict[tuple[_Need, Vmm], list[int]] = {}
    for vm in vms:
        # VMs that share the page have it at different gfns, which explain lists.
        page = _page(incident, vm) if len(vms) == 1 else "the lost page"
        identity = incident.vm_identities.get(vm)
        vmm = vmm_advice.known(
            identity.vmm if identity else None,
            guest_memfd=incident.guest_memfd,
            page_type=incident.page_type,
        )
        needs.setdefault((_need(incident, vm, verdicts.get(vm), page), vmm), []).append(vm)
    steps = [
        step for (need, vmm), some in needs.items() for step in _steps(incident, need, vmm, some)
    ]
    if incident.undelivered and incident.notifications:
        times = counted(incident.undelivered, "time")
        steps.append(f"do not rely on the VMM: {times} it was not notified of the lost page")
    return steps


def _has_page(incident: Incident, vm: int) -> bool:
    """Whether a VM still has the lost page, or is stuck on it although it no longer has."""
    if _is_gone(incident, vm):
        return False
    places = [owner for owner in incident.owners if owner.vm == vm]
    replaced = bool(places) and all(owner in incident.released for owner in places)
    words = {verdict.word for verdict in incident.verdicts if verdict.vm == vm}
    return not replaced or bool(words & {VerdictWord.LOOPING, VerdictWord.STOPPED})


def _is_gone(incident: Incident, vm: int) -> bool:
    identity = incident.vm_identities.get(vm)
    return identity is not None and identity.gone_ts is not None


def _page(incident: Incident, vm: int) -> str:
    gfns = [owner.gfn for owner in incident.owners if owner.vm == vm and owner.gfn is not None]
    return f"the lost page (gfn {listed(map(hex_of, gfns))})" if gfns else "the lost page"


def _is_vague(incident: Incident) -> bool:
    """Whether a process with several VMs was notified, and it is not known for which VM."""
    known = sum(count for one in incident.notifications for count in one.sigbus.values())
    return incident.first_delivery_ts is not None and incident.sigbus > known


def _need(incident: Incident, vm: int, verdict: Verdict | None, page: str) -> _Need:
    mine = [one for one in incident.notifications if one.vm == vm]
    ahead = all(set(one.sigbus) == {"AO"} and not one.exits for one in mine)
    match verdict.word if verdict else None:
        case VerdictWord.LOOPING:
            return _Need(_How.STOP, f"its VMM goes back to {page} again and again")
        case VerdictWord.STOPPED:
            return _Need(_How.STOP, f"the vCPU that was notified of {page} no longer runs")
        case VerdictWord.HANDLED:
            return _Need(_How.LATER, f"it runs on, without {page}")
        case VerdictWord.UNKNOWN:
            if ahead:
                return _Need(
                    _How.SHUT_DOWN, f"its VMM was notified before its guest touched {page}"
                )
            if verdict and verdict.early:
                return _Need(_How.WAIT, "its VMM was notified only just now")
            return _Need(
                _How.CHECK, f"its VMM was notified of {page}, and what it did is not known"
            )
        case VerdictWord.EXITED | None:
            return _need_without_verdict(incident, page)
        case other:
            assert_never(other)


def _need_without_verdict(incident: Incident, page: str) -> _Need:
    if incident.undelivered:
        times = counted(incident.undelivered, "time")
        why = f"guest_memfd refused {page} {times}, and no VMM was notified"
        return _Need(_How.SHUT_DOWN, why)
    if _is_vague(incident):
        why = "a process with several VMs was notified, and it is not known for which of them"
        return _Need(_How.CHECK, why)
    if incident.before_start:
        return _Need(_How.SHUT_DOWN, f"its guest may touch {page} at any time")
    return _Need(_How.SHUT_DOWN, f"its guest has not touched {page} yet")


def _steps(incident: Incident, need: _Need, vmm: Vmm, vms: list[int]) -> Iterator[str]:
    names = _names(incident, vms)
    who = names if len(vms) == 1 else f"each of {names}"
    start = "start it again"
    if incident.origin is not None and incident.origin.severity != "corrected":
        start += ", best on another host"
    match need.how:
        case _How.WAIT:
            yield f"look at {who} again in some seconds: {need.why}"
        case _How.STOP:
            yield f"stop {who} and {start}: {need.why}"
        case _How.CHECK:
            yield f"see whether {who} still works: {need.why}"
            yield f"if it does, shut it down from inside the guest, if not, stop it; then {start}"
        case _How.SHUT_DOWN | _How.LATER:
            when = "at the next opportunity " if need.how == _How.LATER else ""
            yield f"{when}shut {who} down from inside the guest and {start}: {need.why}"
    identity = incident.vm_identities.get(vms[0]) if len(vms) == 1 else None
    if need.how in (_How.STOP, _How.CHECK) and (command := vmm_advice.stop_and_start(identity)):
        yield f"if it does not, {command}" if need.how == _How.CHECK else command
    if page_types.is_of_a_device(incident.page_type or ""):
        yield f"before that, clear or replace {vmm_advice.DEVICE}: started anew, it maps that again"
    if need.how in (_How.SHUT_DOWN, _How.LATER) and vmm.replaces:
        yield f"or, {vmm.replaces.format(how=vmm_advice.reset(identity))}"
    is_huge = incident.size is not None and incident.size > 1 << incident.page_shift
    if incident.page_type is not None and not page_types.is_huge(incident.page_type):
        is_huge = False
    if is_huge and vmm.huge and need.how != _How.WAIT:
        yield vmm.huge
    yield f"until then do not migrate, save, snapshot or dump {names}: {vmm.reading}"


def _for_hardware(incident: Incident) -> list[str]:
    origin = incident.origin
    if origin is None:
        return []
    if not origin.label:
        if origin.addr is None or origin.severity == "corrected":
            return []
        where = "" if origin.socket is None else f" of socket {origin.socket}"
        return [f"find the DIMM{where} that holds address {origin.addr:#x}: no report named it"]
    errors = (
        f"{counted(origin.dimm.count if origin.dimm else origin.history.count, 'error')} reported"
    )
    if origin.severity == "corrected":
        return [f"watch {dimm_of(origin.label)}: {errors}, those of this page were corrected"]
    if origin.severity is None:  # firmware's and EDAC's "informational"
        return [f"watch {dimm_of(origin.label)}: {errors}, none that says it was not corrected"]
    match dimm_names.names(origin.label):
        case "candidates":
            among = listed(dimm_names.candidates(origin.label))
            return [
                f"find out which DIMM fails, one of {among}: {errors}, and EDAC does not"
                " distinguish them; change their places, one at a time, and see where errors follow"
            ]
        case kind if dimm_names.is_position(origin.label):
            return [
                f"find the DIMM {_POSITIONS[kind]} {origin.label}: {errors}; the board's manual"
                " says where controllers, channels, slots and chip selects (csrow) are"
            ]
        case "channel":
            return [
                f"look for memory without a slot, {origin.label}: {errors}; it is in the package of"
                " the processor or on the board, and is replaced with it"
            ]
    return [f"replace {dimm_of(origin.label)}: {errors}"]


def _names_dimm(label: str | None) -> bool:
    return label is not None and dimm_names.names(label) == "dimm"


def _why_nothing(incident: Incident) -> str:
    if incident.unpoisoned_ts is not None and incident.state == IncidentStatus.CLOSED:
        return "the page is no longer poisoned"
    if incident.state == IncidentStatus.CLOSED:
        return "the VMs that held the page are gone"
    if incident.state == IncidentStatus.UNOWNED:
        if incident.owners:
            return "the VMs that held the page have another one in its place"
        return "the kernel took the page out of use, and no VM is known to hold it"
    if incident.released:
        return "another page was put in place of the lost one"
    return "the VMs that were notified are gone"


def _names(incident: Incident, keys: list[int]) -> str:
    vm_identities = [incident.vm_identities.get(key) for key in keys[:_NAMES]]
    names = listed(
        identity.label if identity else "a VM not known by name" for identity in vm_identities
    )
    return names if len(keys) <= _NAMES else f"{names} and {len(keys) - _NAMES} more"


def _without(snapshot: Snapshot, *probes: str) -> str:
    off = [probe.name for probe in snapshot.probes if probe.name in probes and not probe.attached]
    return f" (not attached: {', '.join(off)})" if off else ""
