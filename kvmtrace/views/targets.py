"""What a person means: PFN, GPA@VM, VM or INCIDENT, looked up in a snapshot."""

from __future__ import annotations

from kvmtrace import kvm
from kvmtrace.errors import UsageError
from kvmtrace.identity import clean
from kvmtrace.model import Incident, Party, Snapshot, SoftOffline, Vm
from kvmtrace.views.cells import listed
from kvmtrace.views.explain import origin_parts

FORMS = "PFN (0x103275), GPA@VM (0x8000@web-1), a VM's name, pid or uuid, or an incident's id"


def find(snapshot: Snapshot, target: str) -> list[Incident]:
    """The incidents that ``target`` names, oldest first; empty for a VM or page without any.

    Raises UsageError where nothing here goes by that name, or two things do.
    """
    for incident in snapshot.incidents:
        if incident.id == target:
            return [incident]
    place, at, vm = target.partition("@")  # a VM's name may hold more of them
    number = _number(place)
    if at and number is not None and vm:
        return _at_place(snapshot, number >> snapshot.page_shift, vm)
    pfn = _number(target)
    of_page = [] if pfn is None else [i for i in snapshot.incidents if _covers(i, pfn)]
    of_vm = [i for i in snapshot.incidents if any(_is(p, target) for p in i.parties.values())]
    known_vm = of_vm or any(_is(one, target) for one in snapshot.vms.values())
    if of_page and known_vm:
        raise UsageError(
            f"{target} is a page and a process",
            f"name the page {hex(pfn or 0)}, or the VM by its name",
        )
    if of_page or known_vm:
        return of_page or of_vm
    if pfn is not None and any(page.pfn == pfn for page in snapshot.soft_offlines):
        return []
    raise _unknown(snapshot, target)


def about_nothing(snapshot: Snapshot, target: str) -> str:
    """A VM or a page that is in no incident."""
    pfn = _number(target)
    for page in snapshot.soft_offlines:
        if page.pfn == pfn:
            return _soft_offlined(page)
    return f"{clean(target)}: no poisoned page is known there"


def _soft_offlined(page: SoftOffline) -> str:
    if page.errno:
        what = f"soft offline was tried and refused with {kvm.errno_name(page.errno)}; still in use"
    else:
        what = "soft-offlined; its contents were moved, no guest is harmed"
    lines = [f"pfn {page.pfn:#x}: {what}"]
    if page.origin is not None:
        via = listed(page.origin.via)
        lines.append(f"  origin  {listed(origin_parts(page.origin))}, reported by {via}")
    return "\n".join(lines)


def _at_place(snapshot: Snapshot, gfn: int, vm: str) -> list[Incident]:
    found = []
    for incident in snapshot.incidents:
        keys = {key for key, party in incident.parties.items() if _is(party, vm)}
        ranges = [incident.lost_gfns(owner) for owner in incident.owners if owner.vm in keys]
        if any(lost and lost[0] <= gfn <= lost[1] for lost in ranges):
            found.append(incident)
    if not found and not any(_is(one, vm) for one in snapshot.vms.values()):
        raise _unknown(snapshot, vm)
    return found


def _covers(incident: Incident, pfn: int) -> bool:
    pages = max(1, (incident.size or 0) >> incident.page_shift)
    return incident.pfn is not None and incident.pfn // pages == pfn // pages


def _is(one: Party | Vm, name: str) -> bool:
    return name in (one.name, one.uuid, one.vmid, one.label, str(one.pid))


def _number(text: str) -> int | None:
    try:
        number = int(text, 16) if text[:2].lower() == "0x" else int(text)
    except ValueError:
        return None
    return number if number >= 0 else None


def _unknown(snapshot: Snapshot, target: str) -> UsageError:
    there = [incident.id for incident in snapshot.incidents]
    there += [vm.label for vm in snapshot.vms.values()]
    listed = ", ".join(there[:8]) + (", …" if len(there) > 8 else "")
    return UsageError(
        f"nothing here goes by {clean(target)!r}", f"there are: {listed}" if there else FORMS
    )
