"""What is not known of an incident, and why."""

from __future__ import annotations

from kvmtrace import dimm_names
from kvmtrace.judgement.actions import names
from kvmtrace.model import Incident, PageClass, Snapshot, VerdictWord
from kvmtrace.views.timeline import finding_text
from kvmtrace.wording import listed


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
        missing.append(f"the gfn in {names(incident, vague)}: no memslot and no access shows it")
    if incident.size is None:
        missing.append("how much is lost: no mapping and no signal shows the size")
    if incident.first_delivery_ts is None and incident.owners:
        if incident.before_start:
            missing.append("who accessed it, and was notified, before kvmtrace started")
        elif off := _without(snapshot, "run", "sigbus", "sigbus_forced"):
            missing.append(f"whether the VMM was notified: not all notifications are watched{off}")
    for verdict in incident.verdicts:
        if verdict.word == VerdictWord.UNKNOWN:
            who = names(incident, [verdict.vm])
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


def _names_dimm(label: str | None) -> bool:
    return label is not None and dimm_names.names(label) == "dimm"


def _without(snapshot: Snapshot, *probes: str) -> str:
    off = [probe.name for probe in snapshot.probes if probe.name in probes and not probe.attached]
    return f" (not attached: {', '.join(off)})" if off else ""
