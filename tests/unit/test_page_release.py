"""A poisoned page that a VMM replaced, by its page table."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from kvmtrace.correlate import Correlator
from kvmtrace.enrich.page_release import CHECK_NS, PageReleaseWatch
from kvmtrace.enrich.pipeline import EnrichedSource
from kvmtrace.events import (
    Event,
    Owned,
    Owner,
    PageReplaced,
    Poison,
    Sigbus,
    Unpoison,
    VcpuState,
    VmGone,
    VmSeen,
)
from kvmtrace.facts import Finding, FindingKind
from kvmtrace.judgement.actions import next_steps
from kvmtrace.linux.proc_reader import ProcReader
from kvmtrace.model import Snapshot
from tests.unit.fake import SECOND, T0, FakeSource
from tests.unit.test_owners import ANON, PRESENT, proc_with

PFN, HVA, PID = 0x104CAA, 0x13000, 7
MAPS = "00013000-00014000 rw-p 00000000 00:00 0\n"
BEGIN: tuple[Event, ...] = (VmSeen(T0, 1, PID, "web"), Owned(T0, PFN, Owner(1, 8, HVA), "pagemap"))


class World:
    """One process, one page, one clock."""

    def __init__(self, path: Path, *events: Event, entry: int = ANON) -> None:
        self.path = path
        self.now = T0
        self.entry(entry)
        self.source = EnrichedSource(
            FakeSource(events), [PageReleaseWatch(str(path))], lambda: self.now
        )

    def entry(self, value: int) -> None:
        proc_with(self.path, PID, {HVA: value}, MAPS)

    def later(self) -> list[Event]:
        self.now += CHECK_NS
        return self.source.poll(0)


def test_a_page_that_is_replaced(tmp_path: Path) -> None:
    world = World(tmp_path, *BEGIN)
    assert world.source.poll(0) == list(BEGIN)
    assert world.later() == []
    world.entry(PRESENT)
    assert world.later() == [PageReplaced(world.now, 1, PFN, HVA)]
    assert world.later() == []


def test_a_signal_names_the_place_too(tmp_path: Path) -> None:
    told = Sigbus(T0, PID, 70, 4, HVA + 0x10, vm=1, pfn=PFN)
    world = World(tmp_path, BEGIN[0], told)
    world.source.poll(0)
    world.entry(0)
    assert world.later() == [PageReplaced(world.now, 1, PFN, HVA)]


def test_a_process_is_read_once_however_many_pages_it_has(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    many = 50
    places = [(PFN + n, HVA + n * 0x1000) for n in range(many)]
    entries = {hva: pfn << 5 | 24 | 1 << 62 for pfn, hva in places}
    maps = f"{HVA:08x}-{HVA + many * 0x1000:08x} rw-p 00000000 00:00 0\n"
    proc_with(tmp_path, PID, entries, maps)
    events = [BEGIN[0], *(Owned(T0, pfn, Owner(1, 8, hva), "pagemap") for pfn, hva in places)]
    now = [T0]
    source = EnrichedSource(FakeSource(events), [PageReleaseWatch(str(tmp_path))], lambda: now[0])
    calls: list[int] = []
    call = ProcReader.call

    def counted(reader: ProcReader, pid: int, *arguments: Any) -> Any:
        calls.append(pid)
        return call(reader, pid, *arguments)

    monkeypatch.setattr(ProcReader, "call", counted)
    source.poll(0)
    assert len(calls) == 1 + 1  # to begin with, and at once
    proc_with(tmp_path, PID, entries | {HVA: PRESENT}, maps)
    now[0] += CHECK_NS
    assert source.poll(0) == [PageReplaced(now[0], 1, PFN, HVA)]
    assert len(calls) == 3


def test_a_page_that_was_not_there_is_not_replaced(tmp_path: Path) -> None:
    """Owners by the same page of a file have no such entry."""
    world = World(tmp_path, *BEGIN, entry=PRESENT)
    world.source.poll(0)
    assert world.later() == []


def test_a_page_table_that_cannot_be_read_is_no_release(tmp_path: Path) -> None:
    world = World(tmp_path, *BEGIN)
    world.source.poll(0)
    pagemap = tmp_path / str(PID) / "pagemap"
    kept = pagemap.read_bytes()
    pagemap.unlink()
    assert world.later() == []
    pagemap.write_bytes(kept)
    assert world.later() == []
    world.entry(PRESENT)  # and it is still followed
    assert world.later() == [PageReplaced(world.now, 1, PFN, HVA)]


def test_a_process_that_exits_releases_nothing(tmp_path: Path) -> None:
    """A zombie, or one whose memory is being taken down: its maps are empty."""
    world = World(tmp_path, *BEGIN)
    world.source.poll(0)
    world.entry(0)
    (tmp_path / str(PID) / "maps").write_text("")
    assert world.later() == []


def test_guest_memfd_is_the_vms_whatever_is_mapped(tmp_path: Path) -> None:
    world = World(tmp_path, *BEGIN)
    maps = "00013000-00014000 rw-s 00002000 00:10 1466 anon_inode:[kvm-gmem]\n"
    (tmp_path / str(PID) / "maps").write_text(maps)
    world.source.poll(0)
    world.entry(0)
    assert world.later() == []


def test_a_vm_that_is_notified_again_still_has_the_page() -> None:
    correlator = Correlator()
    again = Sigbus(T0 + SECOND, PID, 70, 4, HVA, vm=1, pfn=PFN)
    for event in (*BEGIN, Poison(T0, PFN, "page", "Recovered"), PageReplaced(T0, 1, PFN, HVA)):
        correlator.feed(event)
    assert correlator.snapshot().vms[1].poisoned_pages == 0
    correlator.feed(again)
    assert correlator.snapshot().vms[1].poisoned_pages == 1


def test_an_end_is_no_release(tmp_path: Path) -> None:
    for number, end in enumerate((VmGone(T0, 1), Unpoison(T0, PFN), None)):
        world = World(tmp_path / str(number), *BEGIN, *([end] if end else []))
        world.source.poll(0)
        world.entry(PRESENT)
        if end is None:  # the process is gone, and VmGone is still on its way
            (tmp_path / str(number) / str(PID) / "maps").unlink()
        assert world.later() == []


def model(*events: Event) -> Snapshot:
    correlator = Correlator()
    for event in events:
        correlator.feed(event)
    return correlator.snapshot()


def test_what_becomes_of_the_incident() -> None:
    poison = Poison(T0, PFN, "dirty LRU page", "Recovered")
    told = Sigbus(T0 + SECOND, PID, 70, 4, HVA, 12, vm=1, vcpu=0, gfn=8, pfn=PFN)
    left = PageReplaced(T0 + 2 * SECOND, 1, PFN, HVA)
    ran = [VcpuState(T0 + n * SECOND, 1, 70, "running", 0, 5) for n in (3, 4)]

    before = model(*BEGIN, poison, told, *ran)
    assert before.vms[1].poisoned_pages == 1
    after = model(*BEGIN, poison, told, left, *ran)
    (incident,) = after.incidents
    assert (incident.state, incident.verdict) == ("delivered", "handled")
    assert incident.verdicts[0].evidence[-1] == Finding(FindingKind.PAGE_REPLACED, hva=HVA)
    assert after.vms[1].poisoned_pages == 0
    assert incident.timeline[-2].event == left

    (untold,) = model(*BEGIN, poison, left).incidents
    assert untold.state == "unowned"
    assert next_steps(untold)[0].startswith("nothing")

    # Not of another VM, nor of another address
    for stranger in (PageReplaced(T0, 2, PFN, HVA), PageReplaced(T0, 1, PFN, HVA + 0x1000)):
        assert model(*BEGIN, poison, stranger).vms[1].poisoned_pages == 1
