"""How urgent incidents are, what to do as data, and which VMs can be migrated."""

from __future__ import annotations

import itertools
import shlex
from collections.abc import Iterator, Mapping
from dataclasses import replace
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from kvmtrace.events import Owner, Sigbus
from kvmtrace.facts import EntryKind, Finding, FindingKind, TimelineEntry
from kvmtrace.judgement.action import MOST_CELLS, Action, ActionKind
from kvmtrace.judgement.actions import actions, next_steps
from kvmtrace.judgement.migration import migration
from kvmtrace.judgement.urgency import Level, Urgency, by_urgency, host_urgency, urgency_of
from kvmtrace.model import (
    ErrorHistory,
    Incident,
    IncidentStatus,
    Notification,
    Origin,
    PageClass,
    Snapshot,
    Verdict,
    VerdictWord,
    Vm,
    VmIdentity,
)
from kvmtrace.sanitize import clean
from kvmtrace.views.format import cells
from tests.unit import snapshots

T0 = snapshots.NOW
UUID = "c7a5fdbd-edaf-9455-926a-d65c16db1809"
PLAIN = VmIdentity(1, 900, "web-1", None, "crosvm")
LIBVIRT = VmIdentity(1, 900, "web-1", UUID, "qemu")
PROXMOX = VmIdentity(1, 900, "web-1", UUID, "qemu", vmid="8006")
QEMU = VmIdentity(1, 900, "web-1", None, "qemu")
UNIT = replace(QEMU, unit=r"vm@web\x2d1.service")
CLOUD = replace(PLAIN, vmm="cloud-hypervisor", api_socket="/run/ch/web 1.sock")
FIRECRACKER = replace(PLAIN, vmm="firecracker", api_socket="/srv/jailer/fc/1/root/fc.sock")
OWNER = Owner(1, 0x105, 0x7F0000105000)
OTHER = Owner(2, 0x205, 0x7F0000205000)
LRU = "dirty LRU page"


def judged(
    *words: VerdictWord, vm: VmIdentity = PLAIN, early: bool = False, **fields: Any
) -> Incident:
    """An incident of VM 1, 2, …, each with a verdict."""
    vms = [replace(vm, key=key) for key in range(1, len(words) + 1)]
    verdicts = [
        Verdict(one.key, word, (Finding(FindingKind.NO_SAMPLE),), early)
        for one, word in zip(vms, words, strict=True)
    ]
    told = [Notification(one.key, 0, 0, {"AR": 1}, T0, T0) for one in vms]
    plain = Incident(
        "2f00f-1",
        IncidentStatus.DELIVERED if words else IncidentStatus.LATENT,
        0x2F00F,
        LRU,
        "Recovered",
        T0,
        tuple(replace(OWNER, vm=one.key) for one in vms) or (OWNER,),
        sigbus=len(words),
        first_delivery_ts=T0 if words else None,
        vm_identities={one.key: one for one in vms or [vm]},
        notifications=tuple(told),
        verdicts=tuple(verdicts),
        page_class=PageClass.VM,
    )
    return replace(plain, **fields)


def ownerless(**fields: Any) -> Incident:
    plain = judged(state=IncidentStatus.UNOWNED, owners=(), vm_identities={})
    return replace(plain, page_type="free buddy page", page_class=PageClass.HANDLED, **fields)


KERNEL = ownerless()
KERNEL = replace(KERNEL, page_type="reserved kernel page", result="Ignored")
KERNEL = replace(KERNEL, page_class=PageClass.KERNEL)
GONE = {1: replace(PLAIN, gone_ts=T0)}
W = VerdictWord

URGENCIES: dict[str, tuple[Incident, Urgency]] = {
    "looping": (judged(W.LOOPING, state=IncidentStatus.LOOPING), Urgency.LOOPING),
    "looping, and another VM handled it": (judged(W.HANDLED, W.LOOPING), Urgency.LOOPING),
    "stopped": (judged(W.STOPPED), Urgency.STOPPED),
    "the worst VM counts": (judged(W.HANDLED, W.UNKNOWN, W.STOPPED), Urgency.STOPPED),
    "stopped, although the page was replaced": (
        judged(W.STOPPED, released=(OWNER,)),
        Urgency.STOPPED,
    ),
    "undelivered": (judged(undelivered=2), Urgency.UNDELIVERED),
    "refused, and an exit notified the VMM": (
        judged(W.UNKNOWN, undelivered=2, exits=1),
        Urgency.UNCLEAR,
    ),
    "refused, and the VM is gone": (judged(undelivered=2, vm_identities=GONE), Urgency.HANDLED),
    "the kernel's": (KERNEL, Urgency.KERNEL),
    "the kernel's, and a VM is stuck": (
        judged(W.LOOPING, page_class=PageClass.KERNEL),
        Urgency.LOOPING,
    ),
    "the kernel's, of which a VM was notified": (
        judged(W.UNKNOWN, page_class=PageClass.KERNEL),
        Urgency.KERNEL,
    ),
    "the kernel's, unpoisoned": (
        replace(KERNEL, state=IncidentStatus.CLOSED),
        Urgency.CLOSED,
    ),
    "unclear": (judged(W.UNKNOWN), Urgency.UNCLEAR),
    "unclear, and its VM is gone": (judged(W.UNKNOWN, vm_identities=GONE), Urgency.HANDLED),
    "unclear, and another page is in place": (
        judged(W.UNKNOWN, released=(OWNER,)),
        Urgency.HANDLED,
    ),
    "which VM of a process": (ownerless(first_delivery_ts=T0, sigbus=1), Urgency.UNCLEAR),
    "delivered, nothing else known": (judged(state=IncidentStatus.DELIVERED), Urgency.UNCLEAR),
    "latent": (judged(), Urgency.LATENT),
    "handled by one, not touched by the other": (
        judged(W.HANDLED, owners=(OWNER, OTHER)),
        Urgency.LATENT,
    ),
    "unowned": (ownerless(), Urgency.UNOWNED),
    "handled": (judged(W.HANDLED), Urgency.HANDLED),
    "exited": (judged(W.EXITED, vm_identities=GONE), Urgency.HANDLED),
    "closed": (judged(W.EXITED, state=IncidentStatus.CLOSED), Urgency.CLOSED),
}


@pytest.mark.parametrize(("incident", "urgency"), URGENCIES.values(), ids=URGENCIES)
def test_urgency(incident: Incident, urgency: Urgency) -> None:
    assert urgency_of(incident) == urgency


def test_every_urgency_is_staged_and_has_its_place() -> None:
    assert {urgency for _, urgency in URGENCIES.values()} == set(Urgency)
    assert [urgency.rank for urgency in Urgency] == list(range(len(Urgency)))
    levels = [list(Level).index(urgency.level) for urgency in Urgency]
    assert levels == sorted(levels)
    assert Urgency.LOOPING.level == Level.NOW
    assert Urgency.CLOSED.level == Level.OVER


def test_the_worst_comes_first_and_then_the_newest() -> None:
    stage = [incident for incident, _ in URGENCIES.values()]
    later = replace(judged(), id="later", poisoned_ts=T0 + 1)
    ordered = by_urgency([*reversed(stage), later])
    ranks = [urgency_of(incident).rank for incident in ordered]
    assert ranks == sorted(ranks)
    latent = [one for one in ordered if urgency_of(one) == Urgency.LATENT]
    assert latent[0].id == "later"


def test_a_host_is_as_urgent_as_its_worst_open_incident() -> None:
    assert host_urgency(Snapshot()) is None
    over = URGENCIES["closed"][0]
    assert host_urgency(Snapshot(incidents=(over,))) is None
    assert host_urgency(Snapshot(incidents=(over, judged(), KERNEL))) == Urgency.KERNEL
    # The incident of the kernel's page had no room.
    assert host_urgency(Snapshot(incidents=(judged(),), kernel_pages=1)) == Urgency.KERNEL


K = ActionKind
VIRSH = "virsh destroy web-1 && virsh start web-1"
POWER = "curl --unix-socket '/run/ch/web 1.sock' -X PUT http://localhost/api/v1/vm.power-button"
CTRL_ALT_DEL = (
    "curl --unix-socket /srv/jailer/fc/1/root/fc.sock -X PUT http://localhost/actions"
    """ -H 'Content-Type: application/json' -d '{"action_type": "SendCtrlAltDel"}'"""
)
DAX: Mapping[str, Any] = {"page_type": "dax page"}
HUGE: Mapping[str, Any] = {"page_type": "huge page", "size": 2 << 20}
DIMM = Origin(("GHES",), ErrorHistory(37, 36, T0, T0), "recoverable", label="DIMM A1")
FREE = "grep HugePages_Free /proc/meminfo"
LOG = "journalctl -k | grep 'Memory failure: 0x2f00f'"

# VMM x memory x verdict x page class: the kinds, the first commands, and the first brief
ACTIONS: dict[str, tuple[Incident, list[ActionKind], tuple[str, ...], str]] = {
    "looping, kill is all that is known": (
        judged(W.LOOPING),
        [K.STOP_AND_START],
        ("kill 900",),
        "stop and start the VM",
    ),
    "looping, libvirt": (
        judged(W.LOOPING, vm=LIBVIRT),
        [K.STOP_AND_START],
        (VIRSH,),
        "stop and start the VM",
    ),
    "stopped, Proxmox VE": (
        judged(W.STOPPED, vm=PROXMOX),
        [K.STOP_AND_START],
        ("qm stop 8006 && qm start 8006",),
        "stop and start the VM",
    ),
    "stopped, a unit": (
        judged(W.STOPPED, vm=UNIT),
        [K.STOP_AND_START],
        (r"systemctl restart 'vm@web\x2d1.service'",),
        "stop and start the VM",
    ),
    "stopped, Cloud Hypervisor": (
        judged(W.STOPPED, vm=CLOUD),
        [K.STOP_AND_START],
        ("kill 900",),
        "stop and start the VM",
    ),
    "looping on a huge page of QEMU": (
        judged(W.LOOPING, vm=LIBVIRT, **HUGE),
        [K.STOP_AND_START, K.FREE_HUGE_PAGE],
        (VIRSH,),
        "stop and start the VM",
    ),
    "only just notified": (
        judged(W.UNKNOWN, early=True, vm=LIBVIRT),
        [K.WAIT],
        (),
        "look again in 10 s",
    ),
    "unclear": (
        judged(W.UNKNOWN, vm=LIBVIRT),
        [K.CHECK, K.STOP_AND_START],
        (),
        "see whether it still works",
    ),
    "undelivered": (
        judged(undelivered=2, guest_memfd=True, vm=LIBVIRT),
        [K.SHUT_DOWN],
        ("virsh shutdown web-1", "virsh start web-1"),
        "shut down from the guest",
    ),
    "latent, QEMU": (
        judged(vm=QEMU),
        [K.SHUT_DOWN, K.RESET],
        (),
        "shut down, or reset (QEMU 10+)",
    ),
    "latent, QEMU with guest_memfd": (
        judged(vm=QEMU, guest_memfd=True),
        [K.SHUT_DOWN],
        (),
        "shut down from the guest",
    ),
    "latent, DAX": (
        judged(vm=QEMU, **DAX),
        [K.SHUT_DOWN, K.CLEAR_DEVICE],
        (),
        "shut down from the guest",
    ),
    "latent, hugetlb": (
        judged(vm=LIBVIRT, **HUGE),
        [K.SHUT_DOWN, K.RESET, K.FREE_HUGE_PAGE],
        ("virsh shutdown web-1", "virsh start web-1"),
        "shut down, or reset (QEMU 10+)",
    ),
    "latent, hugetlb of a VMM that was not tried": (
        judged(**HUGE),
        [K.SHUT_DOWN],
        (),
        "shut down from the guest",
    ),
    "latent, Cloud Hypervisor": (
        judged(vm=CLOUD),
        [K.SHUT_DOWN],
        (POWER,),
        "shut down from the guest",
    ),
    "latent, Cloud Hypervisor in a unit": (
        judged(vm=replace(CLOUD, unit="ch@web-1.service")),
        [K.SHUT_DOWN],
        (POWER, "tail --pid=900 -f /dev/null && systemctl start ch@web-1.service"),
        "shut down from the guest",
    ),
    "latent, Firecracker": (
        judged(vm=FIRECRACKER),
        [K.SHUT_DOWN],
        (CTRL_ALT_DEL,),
        "shut down from the guest",
    ),
    "latent, Proxmox VE": (
        judged(vm=PROXMOX),
        [K.SHUT_DOWN, K.RESET],
        ("qm shutdown 8006 && qm start 8006",),
        "shut down, or reset (QEMU 10+)",
    ),
    "handled": (
        judged(W.HANDLED, vm=LIBVIRT),
        [K.SHUT_DOWN, K.RESET],
        ("virsh shutdown web-1", "virsh start web-1"),
        "shut down at next opportunity",
    ),
    "handled and replaced": (
        judged(W.HANDLED, vm=LIBVIRT, released=(OWNER,)),
        [K.NOTHING],
        (),
        "nothing: it was replaced",
    ),
    "two VMs, of which one is stuck": (
        judged(W.HANDLED, W.LOOPING),
        [K.STOP_AND_START, K.SHUT_DOWN],
        ("kill 900",),
        "stop and start the VM",
    ),
    "with a DIMM": (
        judged(W.LOOPING, origin=DIMM),
        [K.STOP_AND_START, K.REPLACE_DIMM],
        ("kill 900",),
        "stop and start the VM",
    ),
    "the kernel's": (
        KERNEL,
        [K.MOVE_AWAY, K.REBOOT_HOST],
        (),
        "move the VMs away, then reboot",
    ),
    "the kernel's, of which a VM was notified": (
        judged(W.UNKNOWN, vm=LIBVIRT, page_class=PageClass.KERNEL),
        [K.MOVE_AWAY, K.STOP_AND_START, K.REBOOT_HOST],
        (),
        "move the VMs away, then reboot",
    ),
    "a process has it": (
        replace(ownerless(), page_class=PageClass.PROCESS),
        [K.READ_LOG],
        (LOG,),
        "see who had it: kernel's log",
    ),
    "no verdict of the kernel": (
        replace(ownerless(), page_class=None),
        [K.READ_LOG],
        (LOG,),
        "see the kernel's log",
    ),
    "guest memory of no VM": (
        replace(ownerless(), page_class=PageClass.VM),
        [K.FIND_OWNER],
        (),
        "find the VM that owns it",
    ),
    "free": (ownerless(), [K.NOTHING], (), "nothing: the page was free"),
    "free, with a DIMM": (
        ownerless(origin=DIMM),
        [K.REPLACE_DIMM],
        (),
        "replace the DIMM",
    ),
    "which VM of a process": (
        ownerless(first_delivery_ts=T0, sigbus=1),
        [K.CHECK],
        (),
        "see whether its VMs still work",
    ),
    "closed": (URGENCIES["closed"][0], [K.NOTHING], (), "nothing: its VMs are gone"),
}


@pytest.mark.parametrize(("incident", "kinds", "commands", "brief"), ACTIONS.values(), ids=ACTIONS)
def test_actions(
    incident: Incident, kinds: list[ActionKind], commands: tuple[str, ...], brief: str
) -> None:
    found = actions(incident)
    assert [one.kind for one in found] == kinds
    assert found[0].commands == commands
    assert found[0].brief == brief


def test_actions_of_vms_that_share_a_page_are_one_step() -> None:
    incident = judged(W.LOOPING, W.LOOPING, vm=LIBVIRT)
    incident = replace(incident, vm_identities={1: LIBVIRT, 2: replace(LIBVIRT, key=2, name="db")})
    found = actions(incident)
    assert [(one.vm.key if one.vm else None, one.commands) for one in found] == [
        (1, (VIRSH,)),
        (2, ("virsh destroy db && virsh start db",)),
    ]
    assert len({one.text for one in found}) == 1
    assert len(next_steps(incident)) == 2  # the step, and what not to do


def test_on_which_condition_commands_work() -> None:
    (stop,) = actions(judged(W.LOOPING, vm=LIBVIRT))
    assert stop.how == "with libvirt, if persistent"
    check, stop = actions(judged(W.UNKNOWN, vm=LIBVIRT))
    assert (check.how, stop.how) == ("", "if it does not, with libvirt, if persistent")
    (stop,) = actions(judged(W.LOOPING, vm=UNIT))
    assert next_steps(judged(W.LOOPING, vm=UNIT))[1] == f"{stop.how}: {stop.commands[0]}"


def every_incident(vm: VmIdentity) -> Iterator[Incident]:
    """States, verdicts, kinds of memory and page classes, in all combinations, possible or not."""
    for state, page_class, memory, released in itertools.product(
        IncidentStatus, (*PageClass, None), ({}, DAX, HUGE, {"guest_memfd": True}), (False, True)
    ):
        fields: dict[str, Any] = {"state": state, "page_class": page_class, **memory}
        fields["released"] = (OWNER,) if released else ()
        told = state in (IncidentStatus.DELIVERED, IncidentStatus.LOOPING)
        fields["first_delivery_ts"] = T0 if told else None
        yield judged(vm=vm, **fields)
        yield judged(vm=vm, undelivered=2, **fields)
        yield replace(judged(vm=vm, **fields), owners=())
        for word in VerdictWord:
            yield judged(word, vm=vm, origin=DIMM, **fields)
            yield judged(word, vm=vm, early=True, **fields)
            yield judged(word, VerdictWord.HANDLED, vm=vm, **fields)


# Words that read all of a VM's memory, in any command.
READ = {"migrate", "save", "snapshot", "dump", "managedsave", "vm.snapshot", "suspend"}


def assert_sound(incident: Incident, found: tuple[Action, ...]) -> None:
    assert found
    assert all(isinstance(one.text, str) and one.text and one.reason for one in found)
    assert [one.brief for one in found if cells(one.brief) > MOST_CELLS or not one.brief] == []
    for one in found:
        for command in one.commands:
            words = shlex.split(command)  # raises ValueError for an open quote
            assert not READ & set(words), command
    stuck = incident.state != IncidentStatus.CLOSED and not incident.host_at_risk
    for one in found:
        if one.vm is not None and stuck:
            assert any(never.startswith("do not migrate") for never in one.never), one


def test_actions_are_sound_in_every_state() -> None:
    kinds = set()
    for vm in (PLAIN, LIBVIRT, PROXMOX, UNIT, CLOUD, FIRECRACKER):
        for incident in every_incident(vm):
            found = actions(incident)
            assert_sound(incident, found)
            kinds |= {one.kind for one in found}
            worst = urgency_of(incident)
            stuck = incident.verdict in (VerdictWord.LOOPING, VerdictWord.STOPPED)
            if stuck and worst in (Urgency.LOOPING, Urgency.STOPPED):
                assert K.STOP_AND_START in {one.kind for one in found}
            # A loop has a verdict.
            if found[0].kind == K.NOTHING and incident.state != IncidentStatus.LOOPING:
                assert worst.level in (Level.WATCH, Level.OVER), incident
    assert kinds == set(K) - {K.FIND_DIMM, K.WATCH_DIMM}


SHELL = ["; reboot", "$(reboot)", "`reboot`", "a b", "-h", "'", '"', "|| reboot", "\\", "&", "\n"]
hostile = st.one_of(st.text(max_size=40), st.lists(st.sampled_from(SHELL), max_size=4).map("".join))


vms = st.builds(
    VmIdentity,
    key=st.just(1),
    pid=st.just(900),
    name=hostile.map(clean),
    uuid=st.one_of(st.none(), st.just(UUID), hostile),
    vmm=st.sampled_from(["qemu", "cloud-hypervisor", "firecracker", "crosvm"]),
    gone_ts=st.none(),
    vmid=st.one_of(st.none(), st.just("8006"), hostile),
    unit=st.one_of(st.none(), hostile, hostile.map(lambda text: f"vm@{text}.service")),
    api_socket=st.one_of(st.none(), hostile, hostile.map(lambda text: f"/run/{text}")),
)


@given(vm=vms, word=st.sampled_from(VerdictWord))
def test_commands_are_safe_to_paste(vm: VmIdentity, word: VerdictWord) -> None:
    """What a tenant can name is one word of a command, of those that are known, or is not in it."""
    for incident in (judged(word, vm=vm), judged(vm=vm), replace(KERNEL, owners=(OWNER,))):
        found = actions(replace(incident, vm_identities={1: vm}))
        assert_sound(incident, found)
        for command in (line for one in found for line in one.commands):
            lexer = shlex.shlex(command, posix=True, punctuation_chars=True)
            lexer.whitespace_split = True
            for words in _simple_commands(list(lexer)):
                assert _is_known(words, vm), words


def _simple_commands(words: list[str]) -> Iterator[list[str]]:
    """Split words of a shell at "&&" and "|"."""
    one: list[str] = []
    for word in words:
        if word in ("&&", "|"):
            yield one
            one = []
        else:
            one.append(word)
    yield one


def _is_known(words: list[str], vm: VmIdentity) -> bool:
    match words:
        case ["virsh", "destroy" | "start" | "shutdown" | "reset", word]:
            return not word.startswith("-") and word.replace("-", "").replace(".", "").isascii()
        case ["qm", "stop" | "start" | "shutdown" | "reset", word]:
            return word.isdecimal()
        case ["systemctl", "restart" | "start" | "stop", word]:
            return word == vm.unit and not word.startswith("-")
        case ["curl", "--unix-socket", word, "-X", "PUT", url, *_]:
            return word == vm.api_socket and url.startswith("http://localhost/")
        case ["kill", "900"] | ["tail", "--pid=900", "-f", "/dev/null"]:
            return True
        case ["systemctl", "reboot"] | ["journalctl", "-k"]:
            return True
    return words[0] == "grep"


def world(incident: Incident | None, **fields: Any) -> Snapshot:
    vm = Vm(1, 900, "web-1", UUID, "qemu", {}, {}, 0, None, gone=False)
    incidents = () if incident is None else (incident,)
    return Snapshot(vms={1: replace(vm, **fields)}, incidents=incidents)


def test_a_vm_without_lost_pages_can_be_migrated_as_far_as_is_known() -> None:
    assert migration(1, world(None)).possible is True
    for over in ("closed", "handled"):
        incident = replace(URGENCIES[over][0], released=(OWNER,))
        assert migration(1, world(incident)).possible is True
    # The page of another VM, and the kernel's.
    assert migration(1, world(replace(judged(), owners=(OTHER,)))).possible is True
    assert migration(1, world(KERNEL)).possible is True
    lossy = replace(world(None), lost={"ring buffer": 3})
    assert migration(1, lossy).possible is True
    assert "lost 3 events" in migration(1, lossy).reason


def test_a_vm_with_a_lost_page_is_not_migrated() -> None:
    for incident in (judged(), judged(W.LOOPING), judged(W.HANDLED), judged(undelivered=1)):
        answer = migration(1, world(incident))
        assert answer.possible is False
        assert "QEMU refuses" in answer.reason
        assert "0x105" in answer.reason
        # Nothing was tried with these.
        assert migration(1, world(incident, vmm="crosvm")).possible is None
        assert migration(1, world(replace(incident, guest_memfd=True))).possible is None


def test_what_is_not_known_of_a_migration() -> None:
    assert migration(7, world(None)).possible is None
    assert migration(1, world(None, forgotten_pages=2)).possible is None
    assert migration(1, world(None, unread="it hangs")).possible is None
    assert migration(1, world(None, gone=True)).possible is False
    told = TimelineEntry(T0, EntryKind.SIGNAL, Sigbus(T0, 900, 900, 5, 0x1000, 12))
    vague = ownerless(first_delivery_ts=T0, sigbus=1, timeline=(told,))
    assert migration(1, world(vague)).possible is True  # its process has no other VM
    both = world(vague)
    both = replace(both, vms={**both.vms, 2: replace(both.vms[1], key=2)})
    assert migration(1, both).possible is None
