"""Look up what a person names in a snapshot: an incident, page, guest address, VM or DIMM."""

from __future__ import annotations

import difflib
import re
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from enum import StrEnum, auto

from kvmtrace import dimm_names
from kvmtrace.errors import UsageError
from kvmtrace.model import Incident, Snapshot, Vm, VmIdentity
from kvmtrace.sanitize import clean
from kvmtrace.views.format import dimm_of, listed
from kvmtrace.wording import some_of

FORMS = (
    "an incident's id, PFN (0x103275), ADDRESS@VM (0x8000@web-1), a VM's name, pid or uuid, or a"
    " DIMM's label"
)

# Physical addresses have at most 52 bits (x86-64 and arm64), page numbers 12 fewer.
_ADDRESS_BITS = 52
_SHOWN = 8
_PART_OF_UUID = 4


class TargetKind(StrEnum):
    """What a person named."""

    INCIDENT = auto()
    PAGE = auto()
    ADDRESS = auto()  # of a guest
    VM = auto()
    DIMM = auto()


@dataclass(frozen=True, slots=True)
class Target:
    """What was named, and the incidents that it leads to: none if it is not known to be poisoned.

    ``vms``: the VMs that were named, by key. ``dimms``: labels. ``pfn``: of a page.
    ``reading``: how the text was understood, where it could have been understood otherwise.
    """

    kind: TargetKind
    text: str
    incidents: tuple[Incident, ...] = ()
    vms: tuple[int, ...] = ()
    dimms: tuple[str, ...] = ()
    pfn: int | None = None
    reading: str | None = None


def find(snapshot: Snapshot, target: str) -> Target:
    """Return what ``target`` names; a page of which nothing was reported is named, too.

    Raises UsageError if nothing has that name, or things of different kinds do.
    """
    text = target.strip()
    attempts: tuple[Callable[[Snapshot, str], Target | None], ...] = (
        _incident,
        _by_name,
        _beginning,
        _part,
        _other_page,
    )
    for attempt in attempts:
        if text and (found := attempt(snapshot, text)) is not None:
            return found
    raise _unknown(snapshot, target)


def known_vms(snapshot: Snapshot) -> Mapping[int, VmIdentity | Vm]:
    """Return the VMs by key, including those that only an incident remembers."""
    known: dict[int, VmIdentity | Vm] = {}
    for incident in snapshot.incidents:
        known |= incident.vm_identities
    return known | dict(snapshot.vms)


# -- attempts, in order


def _incident(snapshot: Snapshot, text: str) -> Target | None:
    found = snapshot.incident(text.lower())
    if found is None:
        return None
    reading = None if found.id == text.lower() else f"as {found.id}: of the same page"
    return Target(TargetKind.INCIDENT, clean(text), (found,), reading=reading)


def _by_name(snapshot: Snapshot, text: str) -> Target | None:
    """Whole names, numbers of poisoned pages, and ADDRESS@VM."""
    keys = _called(snapshot, text)
    # A VM's name may contain "@", too.
    place, at, vm = text.partition("@")
    number = _number(place)
    if at and number is not None and vm:
        if not keys:
            return _at_address(snapshot, number, vm)
        if _called(snapshot, vm):
            raise UsageError(
                f"{clean(text)} is a VM and an address in another", "name the VM by its pid"
            )
    pfn = _number(text)
    page = None if pfn is None else _page(snapshot, text, pfn)
    if page is not None and page.incidents and keys:
        other = hex(pfn or 0) if text != hex(pfn or 0) else str(pfn)
        raise UsageError(
            f"{text} is a page and a process", f"name {_other_names(snapshot, keys, other)}"
        )
    dimms = [label for label in _dimms(snapshot) if text.lower() in _names_of_dimm(label)]
    if keys and dimms:
        raise UsageError(
            f"{clean(text)} is a DIMM and a VM",
            f"name {_other_names(snapshot, keys, repr(f'DIMM {dimms[0]}'))}",
        )
    if page is not None and page.incidents:
        return page
    if keys:
        return _vms(snapshot, text, keys)
    return _dimm(snapshot, text, dimms) if dimms else page


def _page(snapshot: Snapshot, text: str, number: int) -> Target | None:
    """A page with that pfn, else at that physical address, if anything was reported of it."""
    readings = (
        (number, None),
        (
            number >> snapshot.page_shift,
            f"as a physical address: it is in pfn {number >> snapshot.page_shift:#x}",
        ),
    )
    for pfn, reading in readings:
        found = tuple(one for one in snapshot.incidents if _covers(one, pfn))
        is_known = pfn in snapshot.reported or any(
            page.pfn == pfn for page in snapshot.soft_offlines
        )
        # Small numbers are no addresses of memory that anybody asks for.
        if (found or is_known) and (reading is None or pfn):
            return Target(TargetKind.PAGE, clean(text), found, pfn=pfn, reading=reading)
    return None


def _at_address(snapshot: Snapshot, number: int, vm: str) -> Target:
    keys = _called(snapshot, vm) or _part_of_vm(snapshot, vm)
    if not keys:
        raise _unknown(snapshot, vm, is_vm=True)
    names = listed(_labels(snapshot, keys))
    shift = snapshot.page_shift
    as_gpa = f"gpa {number:#x} (gfn {number >> shift:#x})"
    as_gfn = f"gfn {number:#x} (gpa {number << shift:#x})"
    by_gpa = _at_gfn(snapshot, number >> shift, keys)
    by_gfn = [one for one in _at_gfn(snapshot, number, keys) if one not in by_gpa]
    found = (*by_gpa, *by_gfn)
    if by_gpa and by_gfn:
        first, second = listed(one.id for one in by_gpa), listed(one.id for one in by_gfn)
        reading = f"as {as_gpa} of {names}: {first}; and as {as_gfn}: {second}"
    elif found:
        reading = f"as {as_gpa if by_gpa else as_gfn} of {names}"
    else:
        reading = f"both as {as_gpa} and as {as_gfn} of {names}"
    text = f"{number:#x}@{clean(vm)}"
    return Target(TargetKind.ADDRESS, text, found, tuple(sorted(keys)), reading=reading)


def _at_gfn(snapshot: Snapshot, gfn: int, keys: set[int]) -> list[Incident]:
    found = []
    for incident in snapshot.incidents:
        ranges = [incident.lost_gfns(owner) for owner in incident.owners if owner.vm in keys]
        if any(lost and lost[0] <= gfn <= lost[1] for lost in ranges):
            found.append(incident)
    return found


def _beginning(snapshot: Snapshot, text: str) -> Target | None:
    """The beginning of an incident's id; of digits alone, its whole page number."""
    begin = f"{text}-" if text.isdecimal() else text.lower()
    found = [
        one
        for one in snapshot.incidents
        if any(key.startswith(begin) for key in (one.id, *one.former_ids))
    ]
    if not found:
        return None
    # "db" may begin the incident db2311-1, and is a part of db-1.
    if not text.isdecimal() and (keys := _part_of_vm(snapshot, text)):
        vms = some_of(_labels(snapshot, keys), _SHOWN)
        ids = some_of([one.id for one in found], _SHOWN)
        raise UsageError(
            f"{clean(text)} is the beginning of {ids}, and a part of {vms}", "type more of it"
        )
    reading = f"as the beginning of {some_of([one.id for one in found], _SHOWN)}"
    if text.isdecimal():
        reading += _no_page(int(text))
    return Target(TargetKind.INCIDENT, clean(text), tuple(found), reading=reading)


def _part(snapshot: Snapshot, text: str) -> Target | None:
    if keys := _part_of_vm(snapshot, text):
        also = _no_page(int(text)) if text.isdecimal() else ""
        reading = f"as a part of {some_of(_labels(snapshot, keys), _SHOWN)}{also}"
        return _vms(snapshot, text, keys, reading)
    if _number(text) is None:
        labels = [label for label in _dimms(snapshot) if text.lower() in label.lower()]
        if labels:
            return _dimm(snapshot, text, labels, f"as a part of {some_of(labels, _SHOWN)}")
    return None


def _other_page(snapshot: Snapshot, text: str) -> Target | None:
    """A page of which nothing was reported."""
    number = _number(text)
    if number is None or number >> _ADDRESS_BITS:
        return None
    shift = snapshot.page_shift
    pfn, reading = number, f"as a pfn (physical address >> {shift})"
    if number >> (_ADDRESS_BITS - shift):
        pfn, reading = number >> shift, "as a physical address"
    return Target(TargetKind.PAGE, clean(text), pfn=pfn, reading=reading)


# -- VMs


def _vms(snapshot: Snapshot, text: str, keys: set[int], reading: str | None = None) -> Target:
    found = tuple(one for one in snapshot.incidents if keys & one.vm_identities.keys())
    vms = tuple(sorted(keys))
    return Target(TargetKind.VM, clean(text), found, vms, reading=reading)


def _called(snapshot: Snapshot, name: str) -> set[int]:
    """Keys of the VMs with that name; if there is none, with that uuid, number or pid."""
    names = {name, clean(name)}
    by: dict[int, set[int]] = {}
    for key, vm in known_vms(snapshot).items():
        for rank, own in enumerate(_names(vm)):
            if names & set(own) or (rank == 1 and name.lower() in own):
                by.setdefault(rank, set()).add(key)
    return by[min(by)] if by else set()


def _part_of_vm(snapshot: Snapshot, text: str) -> set[int]:
    """Keys of the VMs whose name has that part, or whose uuid begins with it.

    Digits have to be a whole number in the name: 17 is in node-17, not in node-1717.
    """
    part = clean(text).casefold()
    if not part:
        return set()
    pattern = re.escape(part)
    if part.isdecimal():
        pattern = rf"(?<!\d){pattern}(?!\d)"
    found = set()
    for key, vm in known_vms(snapshot).items():
        is_uuid = len(part) >= _PART_OF_UUID and (vm.uuid or "").startswith(part)
        named = vm.name is not None and re.search(pattern, vm.label.casefold())
        if named or (is_uuid and not part.isdecimal()):
            found.add(key)
    return found


def _names(vm: VmIdentity | Vm) -> tuple[tuple[str | None, ...], ...]:
    """Names of a VM in order of preference."""
    return (vm.name, vm.label), (vm.uuid,), (vm.vmid,), (str(vm.pid), f"pid {vm.pid}")


def _labels(snapshot: Snapshot, keys: Iterable[int]) -> list[str]:
    known = known_vms(snapshot)
    return list(dict.fromkeys(known[key].label for key in sorted(keys)))


def _other_names(snapshot: Snapshot, keys: set[int], page: str) -> str:
    pids = [f"'pid {vm.pid}'" for key, vm in known_vms(snapshot).items() if key in keys]
    what = "" if page.startswith("'") else "the page "
    return f"{what}{page}, or the VM {listed(pids)}"


# -- DIMMs


def _dimm(snapshot: Snapshot, text: str, labels: list[str], reading: str | None = None) -> Target:
    found = tuple(
        one for one in snapshot.incidents if one.origin is not None and one.origin.label in labels
    )
    return Target(TargetKind.DIMM, clean(text), found, dimms=tuple(labels), reading=reading)


def _dimms(snapshot: Snapshot) -> list[str]:
    """Labels of DIMMs with errors, and of those of incidents."""
    labels = [one.origin.label for one in snapshot.incidents if one.origin is not None]
    return list(dict.fromkeys([*snapshot.dimms, *filter(None, labels)]))


def _names_of_dimm(label: str) -> set[str]:
    names = {label, dimm_of(label)}
    if dimm_names.names(label) == "candidates":
        for one in dimm_names.candidates(label):
            names |= {one, dimm_of(one)}
    return {name.lower() for name in names}


# -- pages


def _covers(incident: Incident, pfn: int) -> bool:
    pages = max(1, (incident.size or 0) >> incident.page_shift)
    return incident.pfn is not None and incident.pfn // pages == pfn // pages


def _no_page(pfn: int) -> str:
    return f"; pfn {pfn:#x} is not known to be poisoned"


def _number(text: str) -> int | None:
    try:
        number = int(text, 16) if text[:2].lower() == "0x" else int(text)
    except ValueError:
        return None
    return number if 0 <= number < 1 << 64 else None


# -- what is not found


def _unknown(snapshot: Snapshot, target: str, *, is_vm: bool = False) -> UsageError:
    vms = list(dict.fromkeys(vm.label for vm in snapshot.vms.values()))
    there = [*([] if is_vm else [one.id for one in snapshot.incidents]), *vms]
    hints = []
    if near := _near(target, [*there, *([] if is_vm else _dimms(snapshot))]):
        hints.append(f"near it: {listed(near)}")
    place, at, vm = target.partition("@")
    if at and not is_vm and _called(snapshot, vm):
        hints.append(f"before the @ stands a number, {clean(place)!r} is none")
    elif _number(target) is not None and not is_vm:
        hints.append(f"physical addresses have {_ADDRESS_BITS} bits")
    hints.append(f"there are: {some_of(there, _SHOWN)}" if there else FORMS)
    what = "no VM here goes by" if is_vm else "nothing here goes by"
    return UsageError(f"{what} {clean(target)!r}", "; ".join(hints))


def _near(target: str, names: list[str]) -> list[str]:
    lower = {name.casefold(): name for name in names}
    near = difflib.get_close_matches(clean(target).casefold(), lower, n=3, cutoff=0.6)
    return [lower[name] for name in near]
