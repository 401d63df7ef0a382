"""What people are advised to do about a lost page, for every state of an incident.

What QEMU does when they do it is shown in the lab (tests/lab/qemu_guest.py).
"""

from __future__ import annotations

import itertools
import json
import re
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest

from dashboards import generate
from kvmtrace.correlate import Correlator
from kvmtrace.events import (
    Event,
    Exit,
    Found,
    GmemPage,
    GmemRefusal,
    HwError,
    Owned,
    Owner,
    PageReplaced,
    Poison,
    Sigbus,
    VcpuState,
    VmGone,
    VmSeen,
)
from kvmtrace.facts import Finding, FindingKind
from kvmtrace.judgement import commands
from kvmtrace.judgement.actions import next_steps
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
    VmIdentity,
)
from kvmtrace.views.explain import as_object, explain_text
from tests.unit.fake import SECOND, T0

PFN, GFN, HVA = 0x2F00F, 0x105, 0x7F0000105000
UUID = "c7a5fdbd-edaf-9455-926a-d65c16db1809"
QEMU = VmSeen(T0, 1, 900, "web-1", UUID, "qemu")
OTHER = VmSeen(T0, 1, 900, "web-1", UUID, "cloud-hypervisor")
OWNED = Owned(T0, PFN, Owner(1, GFN, HVA), "pagemap", 4096)
POISON = Poison(T0, PFN, "dirty LRU page", "Recovered", None, None, 31)
GMEM = replace(POISON, gmem=GmemPage(383, 8, (Owner(1, GFN, HVA),)))
SHARED = replace(OWNED, owner=Owner(2, GFN, HVA))
AO = Sigbus(T0 + 1, 900, 900, 5, HVA, 12, vm=1, pfn=PFN)
AR = Sigbus(T0 + 1, 900, 70, 4, HVA, 12, vm=1, vcpu=0, gfn=GFN, pfn=PFN)
EXIT = Exit(T0 + 1, 1, 0, 133, 39, True, 70, 0, GFN << 12, 4096, GFN, False, gmem=133)
LATER = VmSeen(T0 + 60 * SECOND, 9, 990, "bystander")

EACH_COMMAND = (
    commands.stop_and_start,
    commands.stop,
    commands.shut_down,
    commands.reset,
    commands.ways_to_reset,
)

WHERE = f"the lost page (gfn {GFN:#x})"
SHUT_DOWN = "shut web-1 down from inside the guest and start it again: "
STOP = "stop web-1 and start it again: "
DESTROY = "with libvirt, if persistent: virsh destroy web-1 && virsh start web-1"
RESET = (
    "or, where QEMU is 10.0 or newer, reboot the guest or reset the VM (monitor: system_reset; "
    "libvirt: virsh reset web-1): QEMU then puts another page in place, and can migrate the VM "
    "again"
)
NOT = "until then do not migrate, save, snapshot or dump web-1: "
NOT_QEMU = NOT + "QEMU refuses, or dies as it reads the lost page"
NOT_ANY = NOT + "each of these reads every page, the lost one too"


def looks(state: str, ran_ns: int = 0) -> list[VcpuState]:
    return [VcpuState(T0 + n * SECOND, 1, 70, state, 0, ran_ns) for n in (3, 4)]


def told(*events: Event) -> Incident:
    correlator = Correlator()
    for event in events:
        correlator.feed(event)
    (incident,) = correlator.snapshot().incidents
    return incident


RESETTABLE = [RESET, NOT_QEMU]
UNTOUCHED = f"{SHUT_DOWN}its guest has not touched {WHERE} yet"
CASES: dict[str, tuple[list[Event], list[str]]] = {
    "latent": ([QEMU, OWNED, POISON], [UNTOUCHED, *RESETTABLE]),
    "latent, a VMM that was not tried": ([OTHER, OWNED, POISON], [UNTOUCHED, NOT_ANY]),
    "latent, a page of a DAX file": (
        [QEMU, OWNED, replace(POISON, page_type="dax page")],
        [
            UNTOUCHED,
            "before that, clear or replace the DAX file or device that the page belongs to: started"
            " anew, it maps that again",
            NOT_ANY,
        ],
    ),
    "latent, a THP that could not be split": (
        [
            QEMU,
            replace(OWNED, size=2 << 20),
            replace(POISON, page_type="unsplit thp", result="Failed"),
        ],
        [UNTOUCHED, *RESETTABLE],
    ),
    "latent, guest_memfd": ([QEMU, GMEM], [UNTOUCHED, NOT_ANY]),
    "notified ahead": (
        [QEMU, OWNED, POISON, AO, LATER],
        [f"{SHUT_DOWN}its VMM was notified before its guest touched {WHERE}", *RESETTABLE],
    ),
    "before the start": (
        [QEMU, OWNED, Found(T0, PFN)],
        [f"{SHUT_DOWN}its guest may touch {WHERE} at any time", *RESETTABLE],
    ),
    "undelivered": (
        [QEMU, GMEM, GmemRefusal(T0 + 1, 1, GFN, 2), LATER],
        [f"{SHUT_DOWN}guest_memfd refused {WHERE} 2 times, and no VMM was notified", NOT_ANY],
    ),
    "looping": (
        [QEMU, GMEM, replace(EXIT, count=9)],
        [f"{STOP}its VMM goes back to {WHERE} again and again", DESTROY, NOT_ANY],
    ),
    "looping, ordinary memory": (
        [QEMU, OWNED, POISON, replace(AR, count=9)],
        [f"{STOP}its VMM goes back to {WHERE} again and again", DESTROY, NOT_QEMU],
    ),
    "stopped": (
        [QEMU, GMEM, EXIT, *looks("outside")],
        [f"{STOP}the vCPU that was notified of {WHERE} no longer runs", DESTROY, NOT_ANY],
    ),
    "stopped, a VMM that was not tried": (
        [OTHER, GMEM, EXIT, *looks("outside")],
        [f"{STOP}the vCPU that was notified of {WHERE} no longer runs", NOT_ANY],
    ),
    "early": (
        [QEMU, OWNED, POISON, AR],
        ["look at web-1 again in some seconds: its VMM was notified only just now", NOT_QEMU],
    ),
    "unknown": (
        [QEMU, OWNED, POISON, AR, LATER],
        [
            f"see whether web-1 still works: its VMM was notified of {WHERE}, and what it did is "
            "not known",
            "if it does, shut it down from inside the guest, if not, stop it; then start it again",
            f"if it does not, {DESTROY}",
            NOT_QEMU,
        ],
    ),
    "handled": (
        [QEMU, OWNED, POISON, AR, *looks("running", SECOND)],
        [
            f"at the next opportunity {SHUT_DOWN}it runs on, without {WHERE}",
            *RESETTABLE,
        ],
    ),
    "handled and replaced": (
        [QEMU, OWNED, POISON, AR, PageReplaced(T0 + 2, 1, PFN, HVA), *looks("running", SECOND)],
        ["nothing: another page was put in place of the lost one"],
    ),
    "replaced before anybody touched it": (
        [QEMU, OWNED, POISON, AO, PageReplaced(T0 + 2, 1, PFN, HVA), LATER],
        ["nothing: another page was put in place of the lost one"],
    ),
    "gone": (
        [QEMU, OWNED, POISON, VmGone(T0 + 2, 1)],
        ["nothing: the VMs that held the page are gone"],
    ),
    "a huge page": (
        [QEMU, replace(OWNED, size=2 << 20), replace(POISON, page_type="huge page")],
        [
            UNTOUCHED,
            RESET,
            "the host needs a free huge page for that (HugePages_Free in /proc/meminfo): without "
            "one, QEMU does not start, and after a reset it dies where the page was",
            NOT_QEMU,
        ],
    ),
    "of which of its VMs is not known": (
        [QEMU, VmSeen(T0, 2, 900, "web-2"), POISON, replace(AO, vm=None, pfn=PFN), LATER],
        [
            "see whether all VMs of the process that was notified still work",
            "until then do not migrate, save, snapshot or dump them: one has the lost page",
        ],
    ),
}


@pytest.mark.parametrize(("events", "steps"), CASES.values(), ids=CASES)
def test_what_to_do(events: list[Event], steps: list[str]) -> None:
    assert next_steps(told(*events)) == steps


KERNEL_PAGE = replace(POISON, page_type="reserved kernel page", result="Ignored")
AWAY = (
    "and reboot this host: the kernel uses the page, or may (reserved kernel page: Ignored), and "
    "can run into it at any time"
)


@pytest.mark.parametrize(
    ("events", "step"),
    [
        ([QEMU], f"move the VMs away {AWAY}"),
        (
            [QEMU, AR],
            "move away the VMs that were not notified, stop web-1 and start again on another host, "
            f"{AWAY}",
        ),
        (
            [QEMU, VmSeen(T0, 2, 900, "web-2"), replace(AO, vm=None)],
            "move away the VMs that were not notified, stop all VMs of the process that was "
            f"notified and start again on another host, {AWAY}",
        ),
        ([QEMU, AR, VmGone(T0 + 2, 1)], f"move the VMs away {AWAY}"),
    ],
)
def test_a_page_of_the_kernel_has_one_step(events: list[Event], step: str) -> None:
    """Not both to move VMs and not to: the kernel's verdict is that no VM has the page."""
    incident = told(QEMU, KERNEL_PAGE, *events[1:], LATER)
    assert next_steps(incident) == [step]


def test_vms_that_lost_pages_of_their_own_are_not_moved_off_a_host_at_risk() -> None:
    other = replace(OWNED, owner=Owner(2, GFN, HVA), pfn=PFN + 2)
    events = [QEMU, VmSeen(T0, 2, 901, "web-2"), VmSeen(T0, 3, 902, "web-3"), KERNEL_PAGE]
    events += [replace(OWNED, pfn=PFN + 1), replace(POISON, pfn=PFN + 1)]
    events += [other, replace(POISON, pfn=PFN + 2), PageReplaced(T0 + 2, 2, PFN + 2, HVA)]
    correlator = Correlator()
    for event in events:
        correlator.feed(event)
    snapshot = correlator.snapshot()
    risk = next(incident for incident in snapshot.incidents if incident.host_at_risk)
    assert as_object(risk, snapshot)["next"] == [
        f"move the VMs away {AWAY}",
        "do not migrate web-1: shut it down, other pages of its memory are lost",
    ]


def test_programs_learn_which_owners_are_gone() -> None:
    incident = told(QEMU, VmSeen(T0, 2, 901, "web-2"), OWNED, SHARED, POISON, VmGone(T0 + 2, 1))
    owners = as_object(incident, Snapshot())["owners"]
    assert [owner.get("gone") for owner in owners] == [True, None]
    assert "web-1 (pid 900, qemu" in explain_text(incident, Snapshot(), 100)


def test_proxmox_has_commands_of_its_own() -> None:
    party = VmIdentity(1, 900, "web-1", UUID, "qemu", vmid="8006")
    assert commands.stop_and_start(party).lines == ("qm stop 8006 && qm start 8006",)
    assert commands.reset(party).lines == ("qm reset 8006",)
    other = replace(party, vmid="8006; reboot")  # a recording's
    assert "reboot" not in str([one(other) for one in EACH_COMMAND])


def test_the_hardware_that_failed_is_no_place_to_start_it_again() -> None:
    error = HwError(T0, "GHES", "recoverable", PFN << 12, PFN, 64, 1, "DIMM A1")
    step, *_ = next_steps(told(QEMU, OWNED, error, POISON))
    assert step.startswith(
        "shut web-1 down from inside the guest and start it again, best on another host: "
    )
    step, *_ = next_steps(told(QEMU, OWNED, replace(error, severity="corrected"), POISON))
    assert step.startswith(SHUT_DOWN)


def test_vms_that_share_a_page_share_the_advice() -> None:
    vms = [VmSeen(T0, key, 900 + key, f"vm-{key}", UUID, "qemu") for key in range(1, 13)]
    owned = [Owned(T0, PFN, Owner(vm.vm, GFN + vm.vm, HVA), "pagemap") for vm in vms]
    some = next_steps(told(*vms[:3], *owned[:3], POISON))
    assert some == [
        "shut each of vm-1, vm-2, vm-3 down from inside the guest and start it again: its guest "
        "has not touched the lost page yet",
        RESET.replace("; libvirt: virsh reset web-1", ""),
        NOT_QEMU.replace("web-1", "vm-1, vm-2, vm-3"),
    ]
    many = next_steps(told(*vms, *owned, POISON))
    assert "vm-8 and 4 more down" in many[0]
    # Not those that are gone, and each as it is: one was notified.
    signal = replace(AR, pid=902, hva=HVA, vm=2, gfn=GFN + 2)
    mixed = next_steps(told(*vms[:3], *owned[:3], POISON, VmGone(T0, 1), signal))
    assert mixed[0].startswith("look at vm-2 again")
    assert any(step.startswith("shut vm-3 down from inside") for step in mixed)
    assert "vm-1" not in " ".join(mixed)


@pytest.mark.parametrize(
    ("name", "uuid", "expected"),
    [
        ("web-1", UUID, "web-1"),
        ("web-1", None, None),  # libvirt gives each VM a UUID
        ("web-1", "made-up", None),
        ("web; reboot", UUID, UUID),
        ("$(reboot)", UUID, UUID),
        ("-h", UUID, UUID),
        ("17", UUID, UUID),  # to virsh a VM's number
        ("w" * 128, UUID, UUID),
        ("wéb", UUID, UUID),
        (None, UUID, UUID),
    ],
)
def test_what_is_pasted_into_a_shell(
    name: str | None, uuid: str | None, expected: str | None
) -> None:
    party = VmIdentity(1, 900, name, uuid, "qemu")
    if expected is None:
        assert commands.stop_and_start(party).lines == ("kill 900",)
        assert commands.ways_to_reset(party) == "monitor: system_reset"
    else:
        assert commands.stop_and_start(party).lines == (
            f"virsh destroy {expected} && virsh start {expected}",
        )
        assert commands.ways_to_reset(party) == (
            f"monitor: system_reset; libvirt: virsh reset {expected}"
        )
    assert commands.stop_and_start(replace(party, vmm="crosvm")).lines == ("kill 900",)


def every_incident() -> Iterator[Incident]:
    """States, verdicts, VMMs and kinds of memory, in all combinations, possible or not."""
    owner = Owner(1, GFN, HVA)
    signals: tuple[dict[str, int], ...] = ({"AO": 1}, {"AR": 1}, {})
    origins = (None, Origin(("GHES",), ErrorHistory(1, 0, T0, T0), "recoverable", label="A1"))
    plain = Incident("1", IncidentStatus.LATENT, PFN, "page", "Recovered", T0, (owner,))
    for state, vmm, gmem, size, origin in itertools.product(
        IncidentStatus,
        ("qemu", "cloud-hypervisor", "firecracker", "crosvm", "unheard-of", None),
        (False, True),
        (None, 4096, 2 << 20),
        origins,
    ):
        party = VmIdentity(1, 900, "web-1", UUID, vmm)
        for owned, undelivered, before in itertools.product((False, True), (0, 2), (False, True)):
            found = replace(
                plain,
                state=state,
                owners=(owner,) if owned else (),
                undelivered=undelivered,
                before_start=before,
                size=size,
                vm_identities={1: party},
                guest_memfd=gmem,
                origin=origin,
            )
            yield found
            yield replace(found, first_delivery_ts=T0, sigbus=1)
            yield replace(found, first_delivery_ts=T0, sigbus=1, page_class=PageClass.KERNEL)
            for word, early, sent in itertools.product(VerdictWord, (False, True), signals):
                telling = Notification(1, None, int(not sent), sent, T0, T0)
                verdict = Verdict(1, word, (Finding(FindingKind.NO_SAMPLE),), early)
                notified = replace(
                    found, first_delivery_ts=T0, notifications=(telling,), verdicts=(verdict,)
                )
                yield notified
                yield replace(notified, page_class=PageClass.KERNEL)


READS = re.compile(r"\b(migrate|snapshot|dump|save|suspend)\b", re.IGNORECASE)
MOVES = re.compile(r"\b(move|evacuate)\b", re.IGNORECASE)


def harmful(text: str) -> list[str]:
    """Sentences that would have people read all of a VM's memory while a page of it is gone.

    VMs are moved away only from a host whose kernel has lost the page, to be rebooted then.
    """
    sentences = re.split(r"(?<=[.;])\s+", text)
    warned = re.compile(r"do not migrate|can migrate the VM again", re.IGNORECASE)
    reads = [one for one in sentences if READS.search(one) and not warned.search(one)]
    return reads + [one for one in sentences if MOVES.search(one) and "reboot" not in one.lower()]


def test_harm_is_seen() -> None:
    for text in (
        "migrate web-1 before its guest touches the page",
        "live-migrate it first",
        "Move or restart those VMs, and look for a failing DIMM.",
        "take a snapshot of web-1",
    ):
        assert harmful(text) == [text]


def test_no_state_is_advised_what_reads_the_lost_page() -> None:
    seen = set()
    for incident in every_incident():
        steps = next_steps(incident)
        assert steps
        seen |= set(steps)
        with_vm = [step for step in steps if step.startswith(("shut", "stop", "see whether web"))]
        assert not any("move" in one for one in steps) or not any(
            one.startswith("until then do not migrate") for one in steps
        )
        if with_vm:
            assert any(step.startswith("until then do not migrate") for step in steps), steps
        # A reset is for QEMU, and nothing is known of it with guest_memfd.
        if incident.guest_memfd or incident.vm_identities[1].vmm != "qemu":
            assert not any("reset" in step for step in steps)
    assert len(seen) > 20
    assert all(step[0].islower() and not step.endswith(".") for step in seen)
    assert [one for step in seen for one in harmful(step)] == []


@pytest.mark.parametrize(
    "name", ["README.md", "docs/runbook.md", "docs/using.md", "dashboards/alerts.yml", "dashboards"]
)
def test_no_other_place_advises_it(name: str) -> None:
    if name == "dashboards":
        board = json.loads(generate.render(generate.host_dashboard()))
        text = "\n".join(str(panel.get("description", "")) for panel in board["panels"])
    else:
        text = (Path(__file__).parents[2] / name).read_text(encoding="utf-8")
        if name.endswith(".md"):
            text = "\n".join(line for line in text.splitlines() if not line.startswith("|"))
    found = harmful(text)
    assert found == []
