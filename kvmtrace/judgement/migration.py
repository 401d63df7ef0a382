"""Whether a VM can be migrated now: migration reads every page of its memory."""

from __future__ import annotations

from dataclasses import dataclass

from kvmtrace.events import Sigbus
from kvmtrace.judgement import vmm_facts
from kvmtrace.judgement.urgency import has_page, is_vague
from kvmtrace.model import Incident, IncidentStatus, Snapshot, Vm
from kvmtrace.wording import counted, hex_of, some_of

_NAMES = 8


@dataclass(frozen=True, slots=True)
class Migration:
    """Whether a VM can be migrated now, None if that is not known; ``reason``: a sentence."""

    possible: bool | None
    reason: str


def migration(vm_key: int, snapshot: Snapshot) -> Migration:
    """Whether the VM with this key can be migrated now, as far as is known."""
    vm = snapshot.vms.get(vm_key)
    if vm is None:
        return Migration(None, "this VM is not remembered")
    if vm.gone:
        return Migration(False, "the VM is gone")
    lost = [incident for incident in snapshot.incidents if _is_lost_to(incident, vm_key)]
    if lost:
        return _with_lost_pages(vm, lost)
    if vm.forgotten_pages:
        pages = counted(vm.forgotten_pages, "page")
        return Migration(
            None, f"it lost {pages} of which no more is remembered: they may have been replaced"
        )
    if any(_may_be_of(incident, vm, snapshot) for incident in snapshot.incidents):
        return Migration(
            None,
            "its process was notified of a lost page, and it is not known for which of its VMs",
        )
    if vm.unread:
        return Migration(None, f"its process could not be read ({vm.unread})")
    if snapshot.lost:
        events = counted(sum(snapshot.lost.values()), "event")
        return Migration(True, f"no lost page of its memory is known, but kvmtrace lost {events}")
    return Migration(True, "no lost page of its memory is known")


def _with_lost_pages(vm: Vm, lost: list[Incident]) -> Migration:
    # If one lost page is of memory for which nothing was tried, nothing is known of the migration.
    facts = [
        vmm_facts.known(vm.vmm, guest_memfd=one.guest_memfd, page_type=one.page_type)
        for one in lost
    ]
    gfns = [
        hex_of(owner.gfn)
        for incident in lost
        for owner in incident.owners
        if owner.vm == vm.key and owner.gfn is not None and owner not in incident.released
    ]
    where = f" (gfn {some_of(gfns, _NAMES)})" if gfns else ""
    pages = f"{counted(len(lost), 'page')} of its memory {'is' if len(lost) == 1 else 'are'} lost"
    if all(fact.refuses for fact in facts):
        return Migration(False, f"{pages}{where}: {facts[0].reading}")
    return Migration(
        None,
        f"{pages}{where}, and migration reads every page: what becomes of it was not tried with"
        f" {vm.vmm or 'this VMM'} and this kind of memory",
    )


def _is_lost_to(incident: Incident, vm: int) -> bool:
    """Whether a VM has the page, or was notified of it, and has no other one in its place."""
    if incident.state == IncidentStatus.CLOSED:
        return False
    keys = {owner.vm for owner in incident.owners} | {one.vm for one in incident.notifications}
    return vm in keys and has_page(incident, vm)


def _may_be_of(incident: Incident, vm: Vm, snapshot: Snapshot) -> bool:
    """Whether a VM's process was notified of the page, and has several VMs."""
    if incident.state == IncidentStatus.CLOSED or not is_vague(incident):
        return False
    if sum(other.pid == vm.pid and not other.gone for other in snapshot.vms.values()) < 2:
        return False
    signalled = {entry.event.pid for entry in incident.timeline if isinstance(entry.event, Sigbus)}
    return vm.pid in signalled
