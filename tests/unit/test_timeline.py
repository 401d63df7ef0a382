"""Every kind of fact has words, and a hint of where it came from."""

from __future__ import annotations

import pytest

from kvmtrace.events import (
    ClockStep,
    Exit,
    GmemPage,
    HwError,
    Owned,
    Owner,
    PageReplaced,
    Poison,
    Sigbus,
    VcpuState,
)
from kvmtrace.facts import EntryKind, Finding, FindingKind, Join, JoinedBy, TimelineEntry
from kvmtrace.linux import mce
from kvmtrace.views.timeline import description, finding_text, joined_by
from tests.unit.fake import machine_check

S = 1_000_000_000
OWNED = Owned(0, 5, Owner(1, 8), "as never before")


@pytest.mark.parametrize("kind", FindingKind)
def test_every_finding_has_words(kind: FindingKind) -> None:
    text = finding_text(Finding(kind, 0, 70, "running", count=2, hva=0x1000))
    assert text
    assert "None" not in text


@pytest.mark.parametrize("by", JoinedBy)
def test_every_join_has_words(by: JoinedBy) -> None:
    assert joined_by(TimelineEntry(0, EntryKind.OWNER, OWNED, Join(by, 0x1000)))


def test_what_came_with_the_poison_needs_no_join() -> None:
    assert joined_by(TimelineEntry(0, EntryKind.POISON)) is None


@pytest.mark.parametrize(
    ("entry", "text"),
    [
        (
            TimelineEntry(0, EntryKind.OWNER, OWNED, owner=Owner(1, 8, 0x2000)),
            "owned: gfn 0x8, hva 0x2000",
        ),
        (TimelineEntry(0, EntryKind.OWNER, owner=Owner(1, None)), "owned: gfn not known"),
        (
            TimelineEntry(0, EntryKind.EXIT, Exit(0, 1, None, 133, 39, True, gpa=0x8000)),
            "KVM_RUN on a vCPU: EHWPOISON, gpa 0x8000",
        ),
        (
            TimelineEntry(0, EntryKind.OWN_SIGNAL, Sigbus(0, 7, 8, 4, 0x2000, comm="x"), vmm=False),
            "SIGBUS AR to x (pid 7), which runs no VM, hva 0x2000, by its own poisoning",
        ),
        (
            TimelineEntry(0, EntryKind.VCPU_STATE, VcpuState(0, 1, 70, "odd")),
            "a thread odd",
        ),
        (
            TimelineEntry(0, EntryKind.PAGE_REPLACED, PageReplaced(0, 1, 5, 0x2000)),
            "hva 0x2000 has no longer that page",
        ),
        (
            TimelineEntry(
                0, EntryKind.HARDWARE_ERROR, machine_check(0, None, None, 1, 2, 0, mce.UC)
            ),
            "recoverable error by machine check: bank 1, CPU 2, socket 0",
        ),
        (
            TimelineEntry(0, EntryKind.HARDWARE_ERROR, HwError(0, "GHES", label="A1")),
            "memory error by GHES: A1",
        ),
        (TimelineEntry(0, EntryKind.MORE_HARDWARE_ERRORS), "errors of other kinds"),
        (
            TimelineEntry(0, EntryKind.CLOCK_STEP, ClockStep(0, -S, 0, suspended_ns=2 * S)),
            "the wall clock was stepped by -1.0 s; the host was suspended for 2.0 s",
        ),
    ],
)
def test_what_happened(entry: TimelineEntry, text: str) -> None:
    assert description(entry) == text


def test_an_incomplete_walk_says_so() -> None:
    walk = GmemPage(None, 3, complete=False)
    poison = Poison(0, 5, "a", "b", tid=31, gmem=walk)
    entry = TimelineEntry(0, EntryKind.OWNER, poison, Join(JoinedBy.GMEM_THREAD), owner=Owner(1, 8))
    assert joined_by(entry) == (
        "same thread as the poison, guest_memfd index 0x3; not all bindings could be seen"
    )
