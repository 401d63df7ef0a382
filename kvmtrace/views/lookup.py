"""Look up what a person names in a snapshot: PFN, GPA@VM, VM or INCIDENT."""

from __future__ import annotations

from kvmtrace import kvm
from kvmtrace.errors import UsageError
from kvmtrace.model import Incident, Reported, Snapshot, SoftOfflinedPage, Vm, VmIdentity
from kvmtrace.sanitize import clean
from kvmtrace.views.explain import counted_errors, origin_parts
from kvmtrace.views.format import dimm_of, listed

FORMS = "PFN (0x103275), GPA@VM (0x8000@web-1), a VM's name, pid or uuid, or an incident's id"


def find(snapshot: Snapshot, target: str) -> list[Incident]:
    """Return the incidents that ``target`` names, oldest first; empty for a VM or page without any.

    Raises UsageError if nothing has that name, or two things do.
    """
    for incident in snapshot.incidents:
        if incident.id == target:
            return [incident]
    keys = _called(snapshot, target)
    # A VM's name may contain "@", too.
    place, at, vm = target.partition("@")
    number = _number(place)
    if at and number is not None and vm:
        if not keys:
            return _at_place(snapshot, number >> snapshot.page_shift, vm)
        if _called(snapshot, vm):
            raise UsageError(
                f"{clean(target)} is a VM and an address in another", "name the VM by its pid"
            )
    pfn = _number(target)
    of_page = [] if pfn is None else [i for i in snapshot.incidents if _covers(i, pfn)]
    of_vm = [i for i in snapshot.incidents if keys & i.vm_identities.keys()]
    if of_page and keys:
        page = hex(pfn or 0) if target != hex(pfn or 0) else str(pfn)
        raise UsageError(
            f"{target} is a page and a process", f"name {_other_names(snapshot, keys, page)}"
        )
    if of_page or keys:
        return of_page or of_vm
    if soft_offlined(snapshot, target) or reported(snapshot, target):
        return []
    raise _unknown(snapshot, target)


def about_nothing(snapshot: Snapshot, target: str) -> str:
    """Text about a VM or a page that is in no incident."""
    pages = [_soft_offlined(page) for page in soft_offlined(snapshot, target)]
    pages = pages or [_reported(*one) for one in reported(snapshot, target)]
    return "\n".join(pages) or f"{clean(target)}: no poisoned page is known there"


def soft_offlined(snapshot: Snapshot, target: str) -> list[SoftOfflinedPage]:
    """Return what is known of a soft offline of the page with this PFN."""
    pfn = _number(target)
    return [page for page in snapshot.soft_offlines if page.pfn == pfn]


def reported(snapshot: Snapshot, target: str) -> list[tuple[int, Reported]]:
    """Return what hardware reported of the page with this PFN."""
    pfn = _number(target)
    return [(pfn, one) for one in [snapshot.reported.get(pfn)] if one] if pfn is not None else []


def _reported(pfn: int, page: Reported) -> str:
    dimm = f", {dimm_of(page.label)}" if page.label else ""
    errors = counted_errors(page.history, "at this page")
    return f"pfn {pfn:#x}: not known to be poisoned, so in no incident; {errors}{dimm}"


def _soft_offlined(page: SoftOfflinedPage) -> str:
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
    keys = _called(snapshot, vm)
    if not keys:
        raise _unknown(snapshot, vm, is_vm=True)
    found = []
    for incident in snapshot.incidents:
        ranges = [incident.lost_gfns(owner) for owner in incident.owners if owner.vm in keys]
        if any(lost and lost[0] <= gfn <= lost[1] for lost in ranges):
            found.append(incident)
    return found


def _known(snapshot: Snapshot) -> dict[int, VmIdentity | Vm]:
    """The VMs by key, including those that only an incident remembers."""
    known: dict[int, VmIdentity | Vm] = {}
    for incident in snapshot.incidents:
        known |= incident.vm_identities
    return known | dict(snapshot.vms)


def _called(snapshot: Snapshot, name: str) -> set[int]:
    """Keys of the VMs with that name; if there is none, with that uuid, number or pid."""
    names = {name, clean(name)}
    by: dict[int, set[int]] = {}
    for key, vm in _known(snapshot).items():
        for rank, own in enumerate(_names(vm)):
            if names & set(own) or (rank == 1 and name.lower() in own):
                by.setdefault(rank, set()).add(key)
    return by[min(by)] if by else set()


def _names(vm: VmIdentity | Vm) -> tuple[tuple[str | None, ...], ...]:
    """Names of a VM in order of preference."""
    return (vm.name, vm.label), (vm.uuid,), (vm.vmid,), (str(vm.pid), f"pid {vm.pid}")


def _other_names(snapshot: Snapshot, keys: set[int], page: str) -> str:
    pids = [f"'pid {vm.pid}'" for key, vm in _known(snapshot).items() if key in keys]
    return f"the page {page}, or the VM {listed(pids)}"


def _covers(incident: Incident, pfn: int) -> bool:
    pages = max(1, (incident.size or 0) >> incident.page_shift)
    return incident.pfn is not None and incident.pfn // pages == pfn // pages


def _number(text: str) -> int | None:
    try:
        number = int(text, 16) if text[:2].lower() == "0x" else int(text)
    except ValueError:
        return None
    return number if number >= 0 else None


def _unknown(snapshot: Snapshot, target: str, *, is_vm: bool = False) -> UsageError:
    there = [incident.id for incident in snapshot.incidents]
    there += [vm.label for vm in snapshot.vms.values()]
    hints = []
    if not is_vm and _number(target) is not None:
        hints.append(f"a number is a pfn (physical address >> {snapshot.page_shift})")
        pages = dict.fromkeys(f"{page.pfn:#x}" for page in snapshot.soft_offlines)
        if pages:
            hints.append(f"soft-offlined: {_some(list(pages))}")
        if snapshot.dimms:
            hints.append("corrected errors are kept by DIMM, and for the pages that had the latest")
    hints.append(f"there are: {_some(there)}" if there else FORMS)
    return UsageError(f"nothing here goes by {clean(target)!r}", "; ".join(hints))


def _some(names: list[str]) -> str:
    return ", ".join(names[:8]) + (", …" if len(names) > 8 else "")
