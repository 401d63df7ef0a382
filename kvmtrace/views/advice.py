"""What is not known of an incident and why, and the next step that the evidence supports."""

from __future__ import annotations

from kvmtrace import dimms
from kvmtrace.model import Incident, Snapshot
from kvmtrace.views.cells import counted, dimm_of, hex_of, listed


def not_known(incident: Incident, snapshot: Snapshot) -> list[str]:
    """What is missing from the picture, each with the reason."""
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
    if not incident.owners and incident.page_class in (None, "vm", "process"):
        missing.append("whose page it is: no VM with it was found")
    vague = sorted({owner.vm for owner in incident.owners if owner.gfn is None})
    if vague:
        missing.append(f"the gfn in {_names(incident, vague)}: no slot or access told it")
    if incident.size is None:
        missing.append("how much is lost: no mapping or signal told the size")
    if incident.first_delivery_ts is None and incident.owners:
        if incident.before_start:
            missing.append("who was told of it, and touched it, before kvmtrace started")
        elif off := _without(snapshot, "run", "sigbus", "sigbus_forced"):
            missing.append(f"whether the VMM was told by what is not watched{off}")
    for verdict in incident.verdicts:
        if verdict.word == "unknown":
            who = _names(incident, [verdict.vm])
            why = "it was told only just now" if verdict.early else verdict.evidence[0]
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
    """The kernel's account against ours."""
    kernel = snapshot.kernel
    if kernel is None or kernel.handled is None:
        return "the kernel does not count memory failures here"
    return f"the kernel handled {kernel.handled}, kvmtrace saw {kernel.seen}"


def next_steps(incident: Incident) -> list[str]:
    """What to do now, most urgent first."""
    steps = [*_for_host(incident), *_for_vms(incident), *_for_hardware(incident)]
    if not steps:
        steps.append(f"nothing: {_why_nothing(incident)}")
    return steps


def _for_host(incident: Incident) -> list[str]:
    """What nobody took out of use, and no VM is known to have."""
    verdict = f"{incident.page_type}: {incident.result}"
    if incident.host_at_risk:
        return [
            f"move the VMs away and reboot this host: the kernel uses the page, or may ({verdict}),"
            " and can run into it at any time"
        ]
    if incident.state == "closed" or incident.owners or incident.told:
        return []
    page = hex_of(incident.pfn)
    if incident.page_class == "process":
        return [
            f"see in the kernel's log which processes had page {page}: no VM is known to, and the"
            f" kernel could not take it out of use ({verdict})"
        ]
    if incident.page_class == "vm":
        return [f"find the VM: page {page} is guest memory (guest_memfd), of which VM is not known"]
    if incident.page_class is None:
        return [
            f'see in the kernel\'s log what became of page {page} ("recovery action"): its'
            " verdict was not seen, and if the kernel uses the page the host is at risk"
        ]
    return []


def _for_vms(incident: Incident) -> list[str]:
    if incident.state == "closed":
        return []
    words = {
        verdict.vm: "early" if verdict.early else verdict.word for verdict in incident.verdicts
    }
    steps = []
    for vm in dict.fromkeys([*(v for v in words), *(owner.vm for owner in incident.owners)]):
        party = incident.parties.get(vm)
        if party is not None and party.gone_ts is not None:
            continue
        if vm not in words and all(o in incident.released for o in incident.owners if o.vm == vm):
            continue
        who = _names(incident, [vm])
        gfns = [owner.gfn for owner in incident.owners if owner.vm == vm and owner.gfn is not None]
        where = f" (gfn {listed(map(hex_of, gfns))})" if gfns else ""
        match words.get(vm):
            case "looping":
                steps.append(f"restart {who}: its VMM enters the same page{where} again and again")
            case "stopped":
                steps.append(f"restart {who}: the vCPU that was told no longer runs")
            case "early":
                steps.append(f"ask again in some seconds: {who} was told only just now")
            case "unknown":
                steps.append(f"look at {who}: it was told, and what it did is not known")
            case None if incident.undelivered:
                steps.append(f"migrate {who}: its page{where} was asked for, and it was not told")
            case None if incident.first_delivery_ts is not None:
                steps.append(f"look at {who}: its process was told, and not for which of its VMs")
            case None if incident.before_start:
                steps.append(f"migrate {who}: its guest may touch the page{where}")
            case None:
                steps.append(f"migrate {who} before its guest touches the page{where}")
    if incident.undelivered and incident.told:
        times = counted(incident.undelivered, "time")
        steps.append(f"do not rely on the VMM: {times} the page was refused and it was not told")
    return steps


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
    match dimms.names(origin.label):
        case "candidates":
            among = listed(dimms.candidates(origin.label))
            return [
                f"find out which DIMM fails, one of {among}: {errors}, and EDAC cannot tell them"
                " apart; change their places, one at a time, and see where errors follow"
            ]
        case "rank":
            return [
                f"find the DIMM that holds rank {origin.label}: {errors}; the board's manual says"
                " which slot this controller, chip select (csrow) and channel are"
            ]
        case "channel":
            return [
                f"look for memory without a slot, {origin.label}: {errors}; it is in the package of"
                " the processor or on the board, and is replaced with it"
            ]
    return [f"replace {dimm_of(origin.label)}: {errors}"]


def _names_dimm(label: str | None) -> bool:
    return label is not None and dimms.names(label) == "dimm"


def _why_nothing(incident: Incident) -> str:
    if incident.unpoisoned_ts is not None and incident.state == "closed":
        return "the page is no longer poisoned"
    if incident.state == "closed":
        return "the VMs that held the page are gone"
    if incident.state == "unowned":
        if incident.owners:
            return "the VMs that held the page have another one in its place"
        return "the kernel took the page out of use, and no VM is known to hold it"
    return "the VMM coped, and the page is not touched any more"


def _names(incident: Incident, keys: list[int]) -> str:
    parties = [incident.parties.get(key) for key in keys]
    return listed(party.label if party else "a VM not known by name" for party in parties)


def _without(snapshot: Snapshot, *probes: str) -> str:
    off = [probe.name for probe in snapshot.probes if probe.name in probes and not probe.attached]
    return f" (not attached: {', '.join(off)})" if off else ""
