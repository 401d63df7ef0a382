"""What to do about an incident, as data: by VMM, kind of memory, verdict and page class.

Only what was tried (``vmm_facts``), or holds for every VMM. Nothing here has people read all of a
VM's memory while a page of it is gone.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from enum import StrEnum, auto
from typing import assert_never

from kvmtrace import page_types
from kvmtrace.judgement import commands, vmm_facts
from kvmtrace.judgement.action import Action, ActionKind, host_action
from kvmtrace.judgement.commands import Commands
from kvmtrace.judgement.hardware import for_hardware
from kvmtrace.judgement.urgency import has_page, is_gone, is_vague
from kvmtrace.judgement.vmm_facts import Vmm
from kvmtrace.model import (
    Incident,
    IncidentStatus,
    PageClass,
    Snapshot,
    Verdict,
    VerdictWord,
    VmIdentity,
)
from kvmtrace.wording import counted, hex_of, listed, some_of

_NAMES = 8
_READING = "do not migrate, save, snapshot or dump"
_DEVICE = "the DAX file or device that the page belongs to"


def actions(incident: Incident, snapshot: Snapshot | None = None) -> tuple[Action, ...]:
    """What to do about an incident, most urgent first; never empty.

    ``snapshot``: of the whole host, for names and for VMs that have lost other pages.
    """
    if snapshot is not None:
        incident = named(incident, snapshot)
    found = (
        *_for_host(incident, snapshot),
        *_for_vms(incident),
        *for_hardware(incident),
    )
    return found or (_nothing(incident),)


def steps(found: Iterable[Action]) -> list[list[Action]]:
    """Actions by step: those with one text."""
    by_text: dict[str, list[Action]] = {}
    for action in found:
        by_text.setdefault(action.text, []).append(action)
    return list(by_text.values())


def next_steps(incident: Incident, snapshot: Snapshot | None = None) -> list[str]:
    """The same as sentences."""
    return sentences(actions(incident, snapshot))


def sentences(found: Sequence[Action]) -> list[str]:
    """Actions as sentences, each once; what not to do follows the last action that it is for."""
    steps: dict[str, None] = {}
    last = {never: n for n, action in enumerate(found) for never in action.never}
    texts = [action.text for action in found]
    for n, action in enumerate(found):
        steps[action.text] = None
        is_to_stop = action.kind == ActionKind.STOP_AND_START
        # One command does not stop several VMs, nor is it all of a step that has more.
        if is_to_stop and action.how and texts.count(action.text) == 1:
            steps[f"{action.how}: {'; '.join(action.commands)}"] = None
        for never in action.never:
            if last[never] == n:
                steps[f"until then {never}" if never.startswith(_READING) else never] = None
    return list(steps)


def named(incident: Incident, snapshot: Snapshot) -> Incident:
    """Return a copy with the names of all owners that are known."""
    known = {
        key: snapshot.vms[key].identity
        for owner in incident.owners
        if (key := owner.vm) in snapshot.vms and key not in incident.vm_identities
    }
    if not known:
        return incident
    return dataclasses.replace(incident, vm_identities={**incident.vm_identities, **known})


# -- the host


def _for_host(incident: Incident, snapshot: Snapshot | None) -> Iterator[Action]:
    """Actions for a page that is still in use, and that no VM is known to have."""
    verdict = f"{incident.page_type}: {incident.result}"
    if incident.host_at_risk:
        why = f"the kernel uses the page, or may ({verdict}), and can run into it at any time"
        yield from _leave_host(incident, why)
        if snapshot is not None:
            yield from _not_moved(snapshot)
        return
    if incident.state == IncidentStatus.CLOSED or incident.owners or incident.notifications:
        return
    page = hex_of(incident.pfn)
    log = (f"journalctl -k | grep 'Memory failure: {page}'",) if incident.pfn is not None else ()
    if incident.page_class == PageClass.PROCESS:
        do = f"see in the kernel's log which processes had page {page}"
        why = f"no VM is known to have it, and the kernel could not take it out of use ({verdict})"
        yield host_action(ActionKind.READ_LOG, do, "see who had it: kernel's log", why, log)
    elif incident.page_class == PageClass.VM:
        do, why = f"find the VM that owns page {page}", "it is guest memory (guest_memfd)"
        yield host_action(ActionKind.FIND_OWNER, do, "find the VM that owns it", why)
    elif incident.page_class is None:
        do = f'see in the kernel\'s log what became of page {page} ("recovery action")'
        why = "its verdict was not seen, and if the kernel uses the page the host is at risk"
        yield host_action(ActionKind.READ_LOG, do, "see the kernel's log", why, log)


def _leave_host(incident: Incident, why: str) -> Iterator[Action]:
    """Actions for a page of the kernel: one step, which includes VMs that were notified."""
    here = _notified(incident)
    who = [names(incident, here)] if here else []
    if is_vague(incident):
        who.append("all VMs of the process that was notified")
    text = f"move the VMs away and reboot this host: {why}"
    if who:
        text = (
            f"move away the VMs that were not notified, stop {' and '.join(who)} and start again"
            f" on another host, and reboot this host: {why}"
        )
    yield Action(ActionKind.MOVE_AWAY, None, text, "move the VMs away, then reboot", why)
    for vm in here:
        one = incident.vm_identities.get(vm)
        stop = commands.stop(one)
        kind, brief = ActionKind.STOP_AND_START, "stop it, start it elsewhere"
        yield Action(kind, one, text, brief, why, stop.lines, how=stop.how)
    yield Action(ActionKind.REBOOT_HOST, None, text, "reboot this host", why, ("systemctl reboot",))


def _not_moved(snapshot: Snapshot) -> Iterator[Action]:
    """Exclude VMs that have lost other pages: migration reads these, and fails."""
    some = [vm for vm in snapshot.vms.values() if vm.poisoned_pages and not vm.gone]
    who = some_of([vm.label for vm in some], _NAMES)
    it = "it" if len(some) == 1 else "each of them"
    why = "other pages of its memory are lost"
    for vm in some:
        yield Action(
            ActionKind.SHUT_DOWN,
            vm.identity,
            f"do not migrate {who}: shut {it} down, {why}",
            "shut it down, do not migrate",
            why,
            commands.shut_down(vm.identity).lines[:1],
        )


def _notified(incident: Incident) -> list[int]:
    """The live VMs that were notified of the page or may have it."""
    keys = [one.vm for one in incident.notifications]
    keys += [verdict.vm for verdict in incident.verdicts]
    keys += [owner.vm for owner in incident.owners]
    return [vm for vm in dict.fromkeys(keys) if not is_gone(incident, vm)]


# -- VMs


class _How(StrEnum):
    """What a VM needs, most urgent first."""

    STOP = auto()  # and start
    WAIT = auto()  # and look again
    CHECK = auto()  # whether it works
    SHUT_DOWN = auto()  # from inside the guest
    LATER = auto()  # the same, at the next opportunity


_ORDER = {how: at for at, how in enumerate(_How)}


@dataclass(frozen=True, slots=True)
class _Need:
    """What a VM needs, and why."""

    how: _How
    why: str


def _for_vms(incident: Incident) -> Sequence[Action]:
    # The kernel's own page: the step for the host includes the VMs that were notified.
    if incident.state == IncidentStatus.CLOSED or incident.host_at_risk:
        return ()
    verdicts = {verdict.vm: verdict for verdict in incident.verdicts}
    owners = [owner.vm for owner in incident.owners]
    if not verdicts and not owners and incident.first_delivery_ts is not None:
        return (_check_process(),)
    vms = [vm for vm in dict.fromkeys([*verdicts, *owners]) if has_page(incident, vm)]
    needs: dict[tuple[_Need, Vmm], list[int]] = {}
    for vm in vms:
        # VMs that share the page have it at different gfns, which explain lists.
        page = _page(incident, vm) if len(vms) == 1 else "the lost page"
        identity = incident.vm_identities.get(vm)
        vmm = vmm_facts.known(
            identity.vmm if identity else None,
            guest_memfd=incident.guest_memfd,
            page_type=incident.page_type,
        )
        needs.setdefault((_need(incident, vm, verdicts.get(vm), page), vmm), []).append(vm)
    # dict and sort keep the order of VMs with the same need.
    ordered = sorted(needs.items(), key=lambda one: _ORDER[one[0][0].how])
    found = [one for (need, vmm), some in ordered for one in _vm_actions(incident, need, vmm, some)]
    if found and incident.undelivered and incident.notifications:
        times = counted(incident.undelivered, "time")
        rely = f"do not rely on the VMM: {times} it was not notified of the lost page"
        found[-1] = dataclasses.replace(found[-1], never=(*found[-1].never, rely))
    return found


def _check_process() -> Action:
    return Action(
        ActionKind.CHECK,
        None,
        "see whether all VMs of the process that was notified still work",
        "see whether its VMs still work",
        "it has several VMs, and it is not known which of them was notified",
        never=(f"{_READING} them: one has the lost page",),
    )


def _page(incident: Incident, vm: int) -> str:
    gfns = [owner.gfn for owner in incident.owners if owner.vm == vm and owner.gfn is not None]
    return f"the lost page (gfn {listed(map(hex_of, gfns))})" if gfns else "the lost page"


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
    if is_vague(incident):
        why = "a process with several VMs was notified, and it is not known for which of them"
        return _Need(_How.CHECK, why)
    if incident.before_start:
        return _Need(_How.SHUT_DOWN, f"its guest may touch {page} at any time")
    return _Need(_How.SHUT_DOWN, f"its guest has not touched {page} yet")


def _vm_actions(incident: Incident, need: _Need, vmm: Vmm, vms: list[int]) -> Iterator[Action]:
    """What VMs of one need have in common, and after that each one's commands."""
    never = (f"{_READING} {names(incident, vms)}: {vmm.reading}",)
    for action in _shared(incident, need, vmm, vms):
        of_host = action.kind in (ActionKind.CLEAR_DEVICE, ActionKind.FREE_HUGE_PAGE)
        for vm in [None] if of_host else vms:
            one = None if vm is None else incident.vm_identities.get(vm)
            given = _commands(action.kind, one)
            only_if = "if it does not, " if need.how == _How.CHECK and given.how else ""
            yield dataclasses.replace(
                action,
                vm=one,
                commands=given.lines or action.commands,
                how=only_if + given.how,
                never=never,
            )


def _commands(kind: ActionKind, vm: VmIdentity | None) -> Commands:
    match kind:
        case ActionKind.STOP_AND_START:
            return commands.stop_and_start(vm)
        case ActionKind.SHUT_DOWN:
            return commands.shut_down(vm)
        case ActionKind.RESET:
            return commands.reset(vm)
    return Commands()


def _shared(incident: Incident, need: _Need, vmm: Vmm, vms: list[int]) -> Iterator[Action]:
    """The actions of VMs of one need, without what differs between them."""
    why = need.why
    who = names(incident, vms) if len(vms) == 1 else f"each of {names(incident, vms)}"
    start = "start it again"
    if incident.origin is not None and incident.origin.severity != "corrected":
        start += ", best on another host"

    def action(kind: ActionKind, text: str, brief: str) -> Action:
        return Action(kind, None, text, brief, why)

    can_reset = need.how in (_How.SHUT_DOWN, _How.LATER) and vmm.replaces is not None
    match need.how:
        case _How.STOP:
            text = f"stop {who} and {start}: {why}"
            yield action(ActionKind.STOP_AND_START, text, "stop and start the VM")
        case _How.WAIT:
            text = f"look at {who} again in some seconds: {why}"
            yield action(ActionKind.WAIT, text, "look again in 10 s")
        case _How.CHECK:
            text = f"see whether {who} still works: {why}"
            yield action(ActionKind.CHECK, text, "see whether it still works")
            text = f"if it does, shut it down from inside the guest, if not, stop it; then {start}"
            yield action(ActionKind.STOP_AND_START, text, "if not, stop and start it")
        case _How.SHUT_DOWN:
            text = f"shut {who} down from inside the guest and {start}: {why}"
            brief = "shut down, or reset (QEMU 10+)" if can_reset else "shut down from the guest"
            yield action(ActionKind.SHUT_DOWN, text, brief)
        case _How.LATER:
            text = (
                f"at the next opportunity shut {who} down from inside the guest and {start}: {why}"
            )
            yield action(ActionKind.SHUT_DOWN, text, "shut down at next opportunity")
        case other:
            assert_never(other)
    if page_types.is_of_a_device(incident.page_type or ""):
        text = f"before that, clear or replace {_DEVICE}: started anew, it maps that again"
        yield action(ActionKind.CLEAR_DEVICE, text, "first clear the DAX device")
    if can_reset and vmm.replaces:
        one = incident.vm_identities.get(vms[0]) if len(vms) == 1 else None
        text = f"or, {vmm.replaces.format(how=commands.ways_to_reset(one))}"
        yield action(ActionKind.RESET, text, "reset, then it can be migrated")
    is_huge = incident.size is not None and incident.size > 1 << incident.page_shift
    if incident.page_type is not None and not page_types.is_huge(incident.page_type):
        is_huge = False
    if is_huge and vmm.huge and need.how != _How.WAIT:
        free = ("grep HugePages_Free /proc/meminfo",)
        yield dataclasses.replace(
            action(ActionKind.FREE_HUGE_PAGE, vmm.huge, "have a free huge page first"),
            commands=free,
        )


def names(incident: Incident, keys: Sequence[int]) -> str:
    """The names of some VMs of an incident: the first ones, and how many more there are."""
    known = map(incident.vm_identities.get, keys)
    return some_of([one.label if one else "a VM not known by name" for one in known], _NAMES)


# -- nothing


def _nothing(incident: Incident) -> Action:
    brief, why = _why_nothing(incident)
    return Action(ActionKind.NOTHING, None, f"nothing: {why}", f"nothing: {brief}", why)


def _why_nothing(incident: Incident) -> tuple[str, str]:
    """Why nothing is to be done: briefly and as a sentence."""
    if incident.unpoisoned_ts is not None and incident.state == IncidentStatus.CLOSED:
        return "no longer poisoned", "the page is no longer poisoned"
    if incident.rebooted_ts is not None:
        return "the host was rebooted", "the host was rebooted since"
    if incident.state == IncidentStatus.CLOSED:
        return "its VMs are gone", "the VMs that held the page are gone"
    if incident.state == IncidentStatus.UNOWNED:
        if incident.owners:
            return "it was replaced", "the VMs that held the page have another one in its place"
        free = (incident.page_type or "").startswith("free")
        return (
            "the page was free" if free else "it is out of use",
            "the kernel took the page out of use, and no VM is known to hold it",
        )
    if incident.released:
        return "it was replaced", "another page was put in place of the lost one"
    return "its VMs are gone", "the VMs that were notified are gone"
