"""Page table entries of a real kernel (7.3.4), and the owners that follow from them."""

from __future__ import annotations

import os
import struct
from dataclasses import replace
from pathlib import Path

import pytest

from kvmtrace import kvm
from kvmtrace.correlate import Correlator
from kvmtrace.correlate.limits import Limits
from kvmtrace.enrich import existing_poison, owners, pipeline, signal_pages
from kvmtrace.enrich.existing_poison import ExistingPoison
from kvmtrace.enrich.kernel_counts import KernelCountsReader
from kvmtrace.enrich.machine_checks import MachineChecks
from kvmtrace.enrich.owners import OwnerLookup
from kvmtrace.enrich.page_tables import MappedPage, PageTableSearch, poisoned_pfn, walk
from kvmtrace.enrich.pipeline import EnrichedSource, all_stages, in_order
from kvmtrace.enrich.signal_pages import SignalPages
from kvmtrace.events import (
    Event,
    Exit,
    Found,
    GmemPage,
    HwError,
    Lost,
    Owned,
    Owner,
    Poison,
    Sigbus,
    Unpoison,
    VmSeen,
)
from kvmtrace.linux import mce, page_flags
from kvmtrace.linux.pagemap import PAGE, parse_maps, poisoned, referenced_pfn
from kvmtrace.probes import Probe, ProbeRuns
from kvmtrace.sources.bpf import lookup
from kvmtrace.sources.guest_memory import Memslot, Page, gfns_at
from tests.unit.fake import SECOND, T0, FakeSource, machine_check

# /proc/PID/pagemap after memory_failure on Linux 7.3.4, x86-64
ANON = 0x4080000002099558  # pfn 0x104caa
MEMFD = 0x60800000020E0138  # pfn 0x107009, mapped shared
THP = 0x40800000020E0078  # pfn 0x107003, one of 512
NEVER_TOUCHED = 0x80000000000000
HUGETLB_LOST = 0x80000000000000  # the same as never touched
PRESENT = 0x8180000000105C00
HVA = 0x7F54D37D5000


@pytest.mark.parametrize(
    ("entry", "pfn"),
    [
        (ANON, 0x104CAA),
        (MEMFD, 0x107009),
        (THP, 0x107003),
        (0x4080000002041DD8, 0x1020EE),
        (NEVER_TOUCHED, None),
        (PRESENT, None),
        (1 << 62 | 0x1234 << 5 | 3, None),  # swapped out to the fourth swap device
        (1 << 62 | 0x1234 << 5 | 22, 0x1234),  # 6.1 with memory on devices
        (1 << 62 | 2 << 5 | 31, None),  # a marker: UFFDIO_POISON
        (1 << 62 | 1 << 5 | 30, None),  # 6.1's
    ],
)
def test_pfn_of_a_poisoned_entry(entry: int, pfn: int | None) -> None:
    assert poisoned(entry) == pfn


def test_a_mapped_page_is_referred_to_but_not_poisoned() -> None:
    assert referenced_pfn(PRESENT) == 0x105C00
    assert referenced_pfn(NEVER_TOUCHED) is None


def test_pfn_of_a_hardware_entry() -> None:
    # arch/x86/include/asm/pgtable_64.h: type in bits 59-63, the offset inverted from bit 9 on.
    entry = 24 << 59 | (~0x106000 & (1 << 50) - 1) << 9
    assert lookup.poisoned_x86(entry) == 0x106000
    assert lookup.poisoned_x86(0) is None
    assert lookup.poisoned_x86(0x8000000105C008E7) is None  # mapped
    assert lookup.poisoned_x86(3 << 59 | 0x1FE00) is None  # swapped out


@pytest.mark.parametrize("kind", [23, 24, 27])
@pytest.mark.parametrize("pfn", [0x106000, 0x43F00, 0x40F0])
def test_pfn_of_an_arm64_entry(kind: int, pfn: int) -> None:
    assert lookup.poisoned_arm64(kind << 6 | pfn << 12) == pfn
    assert lookup.poisoned_arm64(kind << 3 | pfn << 8) == pfn  # before 6.13
    assert lookup.poisoned_arm64(pfn << 12 | 0x741) is None  # mapped
    assert lookup.poisoned_arm64(0) is None


def test_device_numbers_are_converted_to_those_of_stat() -> None:
    assert lookup.device_of(37) == os.makedev(0, 37)
    assert lookup.device_of(8 << 20 | 0x101) == os.makedev(8, 0x101)


MAPS = """\
7f54d37cd000-7f54d380d000 rw-p 00000000 00:00 0 
7fc46da00000-7fc46de00000 rw-p 00000000 00:10 4242                       /anon_hugepage (deleted)
7f6401e0c000-7f6401e4c000 rw-s 00002000 00:01 1029                       /memfd:guest (deleted)
7ffc0b5f9000-7ffc0b5fd000 r--p 00000000 00:00 0                          [vvar]
7ffc0b5fd000-7ffc0b5ff000 r-xp 00000000 00:00 0                          [vdso]
"""  # noqa: W291 (as the kernel prints it)


def test_maps() -> None:
    anon, huge, memfd = parse_maps(MAPS)
    assert (anon.start, anon.end, anon.shared, anon.inode) == (0x7F54D37CD000, 0x7F54D380D000, 0, 0)
    assert (huge.device, huge.inode, huge.shared) == (os.makedev(0, 0x10), 4242, False)
    assert (memfd.shared, memfd.offset) == (True, 0x2000)
    assert memfd.file_offset(0x7F6401E0F000) == 0x5000


def proc_with(tmp_path: Path, pid: int, entries: dict[int, int], maps: str) -> None:
    """A /proc with one process; ENOTTY for PAGEMAP_SCAN, as on kernels before 6.7."""
    directory = tmp_path / str(pid)
    directory.mkdir(parents=True, exist_ok=True)
    (directory / "maps").write_text(maps)
    with (directory / "pagemap").open("wb") as file:
        for hva, entry in entries.items():
            file.seek(hva // PAGE * 8)
            file.write(struct.pack("=Q", entry))


LOW_MAPS = "00010000-00020000 rw-p 00000000 00:00 0 \n"
SHARED_MAPS = "00040000-00060000 rw-s 00002000 00:01 1029 /memfd:guest (deleted)\n"


def places(pfns: tuple[int, ...], pids: tuple[int, ...], proc: str) -> list[MappedPage]:
    return [place for place in walk(pfns, pids, proc) if isinstance(place, MappedPage)]


def test_a_page_table_is_read_where_it_cannot_be_scanned(tmp_path: Path) -> None:
    proc_with(tmp_path, 7, {0x10000: PRESENT, 0x13000: ANON, 0x1F000: 0}, LOW_MAPS)
    proc = str(tmp_path)
    assert poisoned_pfn(7, 0x13000, proc) == 0x104CAA
    assert poisoned_pfn(7, 0x10000, proc) is None
    assert poisoned_pfn(8, 0x13000, proc) is None  # no such process
    assert places((0x104CAA, 0x999), (7, 8), proc) == [MappedPage(7, 0x13000, 0x104CAA, PAGE)]
    assert places((0x105C00,), (7,), proc) == [
        MappedPage(7, 0x10000, 0x105C00, PAGE)
    ]  # still mapped


def test_a_process_that_maps_the_same_file_owns_the_page_too(tmp_path: Path) -> None:
    proc_with(tmp_path, 7, {0x43000: MEMFD, 0x5F000: 0}, SHARED_MAPS)
    other = "00100000-00120000 rw-s 00004000 00:01 1029 /memfd:guest (deleted)\n"
    proc_with(tmp_path, 8, {0x11F000: 0}, other)
    proc_with(tmp_path, 9, {0x101000: PRESENT, 0x11F000: 0}, other)  # put another page in its place
    file = (os.makedev(0, 1), 1029, 5)
    assert places((0x107009,), (7, 8, 9), str(tmp_path)) == [
        MappedPage(7, 0x43000, 0x107009, PAGE, "pagemap", file),
        MappedPage(8, 0x101000, 0x107009, PAGE, "mapping", file),
    ]


def test_gfns() -> None:
    slots = [
        Memslot(1, 0x100, 0x40, HVA - 3 * PAGE),
        Memslot(2, 0x800, 1, HVA),
        Memslot(3, 0, 8, 0),
    ]
    assert gfns_at(slots, HVA) == [0x103, 0x800]
    assert gfns_at(slots, HVA - 4 * PAGE) == []


def test_kpageflags() -> None:
    flags = struct.pack("=5Q", 0x40008501C, 0x8401C, 0, 0x80000, 0x60000)
    assert list(page_flags.poisoned_in(flags)) == [0, 1, 3]


def test_ram_that_a_driver_brought_is_ram(tmp_path: Path) -> None:
    (tmp_path / "iomem").write_text(
        "00100000-7fffffff : System RAM\n  01000000-01ffffff : Kernel code\n"
        "1050000000-304fffffff : CXL Window 0\n  1050000000-304fffffff : dax0.0\n"
        "    1050000000-304fffffff : System RAM (kmem)\n"
    )
    found = page_flags.ram_ranges(str(tmp_path / "iomem"))
    shift = kvm.PAGE_SHIFT
    assert found == [
        (0x100000 >> shift, 0x80000000 >> shift),
        (0x1050000000 >> shift, 0x3050000000 >> shift),
    ]


def test_failure_counts_are_summed_over_nodes(tmp_path: Path) -> None:
    for node, total in ((0, 8), (1, 2)):
        directory = tmp_path / f"devices/system/node/node{node}/memory_failure"
        directory.mkdir(parents=True)
        (directory / "total").write_text(f"{total}\n")
        (directory / "recovered").write_text("1\n")
    assert page_flags.failure_counts(str(tmp_path)) == (("recovered", 2), ("total", 10))


def test_page_flags_are_read_only_if_there_is_poison(tmp_path: Path) -> None:
    (tmp_path / "meminfo").write_text("HardwareCorrupted:     0 kB\n")
    (count,) = counts(tmp_path)
    assert getattr(count, "at_start", None) is True
    first = ExistingPoison(OwnerLookup(), str(tmp_path))
    assert first.process([count], 1, last=True) == [count]
    (tmp_path / "meminfo").write_text("HardwareCorrupted:    16 kB\n")
    (tmp_path / "iomem").write_text(
        "00001000-00008fff : System RAM\n00009000-0000ffff : Reserved\n"
    )
    pages = [0] * 16
    pages[3], pages[4], pages[12] = 0x80000, 0x40008501C, 0x80000
    (tmp_path / "kpageflags").write_bytes(struct.pack("=16Q", *pages))
    second = ExistingPoison(OwnerLookup(), str(tmp_path))
    begin = counts(tmp_path)
    assert second.process(begin, 1) == begin  # they may be just being poisoned
    events = second.scan(2, float("inf"), frozenset({4}), last=True)
    assert events == ([Found(2, 3)] if kvm.PAGE_SHIFT == 12 else events)
    assert second.scan(3, float("inf"), frozenset(), last=True) == []


def counts(proc: Path) -> list[Event]:
    """What the kernel counts at the start."""
    reader = KernelCountsReader(str(proc), str(proc / "sys"))
    reader.before_read(1)
    return reader.process([], 1)


def by_pages(source: _Poisoned, root: Path, sys: Path) -> EnrichedSource:
    """The source, with its pages looked up in a made-up /proc."""
    return EnrichedSource(source, all_stages(None, str(root), str(sys)))


class _Poisoned:
    """A source in whose poll a page is poisoned: first reported, then counted."""

    name = "bpf"
    why: str | None = None

    def __init__(self, root: Path, batches: list[list[Event]] | None = None) -> None:
        self._root = root
        self._batches = batches

    def poll(self, timeout: float) -> list[Event]:
        directory = self._root / "sys/devices/system/node/node0/memory_failure"
        directory.mkdir(parents=True, exist_ok=True)
        (directory / "total").write_text("8\n")
        if self._batches is not None:
            return self._batches.pop(0)
        return [Poison(1, 0x104CAA, "dirty LRU page", "Recovered")]

    def probes(self) -> tuple[Probe, ...]:
        return ()

    def probe_runs(self) -> dict[str, ProbeRuns]:
        return {}

    def close(self) -> None:
        pass


def test_found_pages_beyond_the_limit_are_lost(tmp_path: Path) -> None:
    """As many are reported as there may be incidents."""
    pages = [0x80000 if number % 2 else 0 for number in range(8192)]
    (tmp_path / "meminfo").write_text("HardwareCorrupted:     16384 kB\n")
    last = (len(pages) << kvm.PAGE_SHIFT) - 1
    (tmp_path / "iomem").write_text(f"00000000-{last:08x} : System RAM\n")
    (tmp_path / "kpageflags").write_bytes(struct.pack(f"={len(pages)}Q", *pages))
    looked = ExistingPoison(OwnerLookup(), str(tmp_path))
    told = looked.process(counts(tmp_path), 1, last=True)
    found = [event for event in told if isinstance(event, Found)]
    assert len(found) == existing_poison.MAX_FOUND == Limits().incidents
    lost = [event for event in told if isinstance(event, Lost)]
    assert sum(event.count for event in lost) == 4096 - len(found)
    correlator = Correlator()
    for event in told:
        correlator.feed(event)
    assert correlator.snapshot().lost == {"found_pages": 4096 - len(found)}


def test_counts_come_before_a_poison_of_the_same_poll(tmp_path: Path) -> None:
    source = _Poisoned(tmp_path)
    source.poll(0)
    events = by_pages(source, tmp_path, tmp_path / "sys").poll(0)
    assert [event.kind for event in events] == ["kernel_counts", "poison"]


def test_a_page_marked_before_its_event_is_no_existing_poison(tmp_path: Path) -> None:
    (tmp_path / "meminfo").write_text("HardwareCorrupted:     4 kB\n")
    (tmp_path / "iomem").write_text(f"00000000-{(8 << kvm.PAGE_SHIFT) - 1:08x} : System RAM\n")
    (tmp_path / "kpageflags").write_bytes(struct.pack("=8Q", 0, 0, 0x80000, 0, 0, 0x80000, 0, 0))
    source = _Poisoned(tmp_path, [[], [Poison(1, 5, "dirty LRU page", "Recovered")]])
    owners = by_pages(source, tmp_path, tmp_path)
    assert [event.kind for event in owners.poll(0.001)] == ["kernel_counts"]
    told = owners.poll(0)
    assert [(e.kind, getattr(e, "pfn", 0)) for e in told] == [("poison", 5), ("found", 2)]


def test_a_page_with_a_delivery_is_found_without_reading_page_flags(tmp_path: Path) -> None:
    """Reading them may take long, and a loop must be shown now."""
    (tmp_path / "meminfo").write_text("HardwareCorrupted:     0 kB\n")
    proc_with(tmp_path, 7, {0x13000: ANON}, LOW_MAPS)
    signal = Sigbus(1, 7, 70, 4, 0x13000, sender=70)
    source = _Poisoned(tmp_path, [[signal, signal], [signal]])
    owners = by_pages(source, tmp_path, tmp_path)
    kinds = [event.kind for event in owners.poll(0.001)]
    assert kinds == ["kernel_counts", "sigbus", "sigbus"]
    assert [event.kind for event in owners.poll(0)] == ["sigbus", "found"]


def test_a_machine_check_gets_its_vendor(tmp_path: Path) -> None:
    (tmp_path / "cpuinfo").write_text("processor\t: 0\nvendor_id\t: AuthenticAMD\n")
    (told,) = MachineChecks(str(tmp_path)).process(
        [machine_check(1, 0x1000, 1, 4, 0, 0, 1 << 44)], 99
    )
    assert isinstance(told, HwError)
    assert told.check is not None
    assert (told.check.vendor, told.severity) == ("AuthenticAMD", "deferred")


@pytest.mark.parametrize(
    ("vendor", "misc", "pfn"),
    [
        ("GenuineIntel", 0x86, 0x12345),  # a physical address, exact to 64 bytes
        ("GenuineIntel", 0x46, None),  # a linear one
        ("GenuineIntel", None, None),  # no MISC, no mode
        ("Shanghai", 0x86, 0x12345),
        ("AuthenticAMD", 0x46, 0x12345),  # no such field
    ],
)
def test_the_page_of_a_machine_check(
    tmp_path: Path, vendor: str, misc: int | None, pfn: int | None
) -> None:
    """TME-MK's and SEV's keys are in the high bits, which the kernel takes from the width."""
    sizes = "address sizes\t: 46 bits physical, 57 bits virtual"
    spelt = "  Shanghai  " if vendor == "Shanghai" else vendor
    (tmp_path / "cpuinfo").write_text(f"vendor_id\t: {spelt}\n{sizes}\n")
    check = machine_check(1, 3 << 46 | 0x12345678, None, 5, 0, 0, 3 << 58 | mce.POISON, misc)
    (told,) = MachineChecks(str(tmp_path)).process([check], 99)
    assert isinstance(told, HwError)
    assert told.check is not None
    assert (told.check.vendor, told.addr, told.pfn) == (vendor, check.addr, pfn)


def story(tmp_path: Path, events: list[Event]) -> list[Event]:
    owners = OwnerLookup(None, str(tmp_path))
    return SignalPages(owners, str(tmp_path)).process(owners.process(events, 99), 99)


def test_a_signal_without_an_address_is_about_the_poison_before_it(tmp_path: Path) -> None:
    poison = Poison(3, 5, "guest_memfd", "Failed", tid=70)
    bare = Sigbus(4, 7, 70, kvm.SI_KERNEL, None, sender=70)
    late = replace(bare, ts=6_000_000_000)
    told = story(tmp_path, [replace(bare, ts=2), poison, bare, replace(bare, sender=71), late])
    assert told == [poison, replace(bare, pfn=5)]


def test_a_process_without_a_vm_gets_its_name(tmp_path: Path) -> None:
    """If it still exists: it may have died of the signal."""
    for pid, comm in ((8, b"cat\n"), (9, b"a\xff\x1b[2Jb\n")):
        (tmp_path / str(pid)).mkdir()
        (tmp_path / str(pid) / "comm").write_bytes(comm)
    plain = Sigbus(1, 8, 80, 4, 0x13000, pfn=5)
    told = story(
        tmp_path,
        [
            plain,
            replace(plain, pid=9),
            replace(plain, pid=10),
            replace(plain, vm=1, comm="a VMM"),
            replace(plain, pid=10, comm="thread"),
            replace(plain, comm="thread"),
        ],
    )
    names = [getattr(event, "comm", "") for event in told]
    assert names == ["cat", "a\N{REPLACEMENT CHARACTER}?[2Jb", None, None, "thread", "cat"]


def test_owners_come_before_their_poison(tmp_path: Path) -> None:
    proc_with(tmp_path, 7, {0x13000: ANON, 0x1F000: 0}, LOW_MAPS)
    seen = VmSeen(1, 5, 7)
    poison = Poison(3, 0x104CAA, "dirty LRU page", "Recovered", tid=70)
    owned = Owned(3, 0x104CAA, Owner(5, None, 0x13000), "pagemap", PAGE)
    assert story(tmp_path, [seen, poison]) == [seen, owned, poison]


def test_while_pages_are_looked_up_no_loop_ends(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The kernel has not been read meanwhile: its events are late, not over."""
    now = T0
    proc_with(tmp_path, 7, {0x13000: ANON, 0x1F000: 0}, LOW_MAPS)

    class Slow(ExistingPoison):
        def scan(self, ts: int, *_: object, **__: object) -> list[Event]:
            nonlocal now
            now += 60 * SECOND
            return [Found(ts, 0x104CAA)]

    def clock() -> int:
        return now

    loop = Exit(T0, 5, 0, kvm.EHWPOISON, 39, True, 70, gpa=0x8000, gfn=8, count=2000)
    proc = str(tmp_path)
    monkeypatch.setattr(pipeline, "ExistingPoison", Slow)
    source = EnrichedSource(
        FakeSource([VmSeen(T0, 5, 7), loop]), all_stages(None, proc, proc), clock
    )
    correlator = Correlator()
    events = source.poll(0)
    for event in events:
        correlator.feed(event)
    assert [event.pfn for event in events if isinstance(event, Owned)] == [0x104CAA]
    assert now > T0
    assert "looping" in {incident.state for incident in correlator.snapshot().incidents}


def test_a_page_is_read_once_however_many_signals_name_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    read: list[int] = []

    def entry(pid: int, hva: int, proc: str) -> int | None:
        read.append(hva)
        return 5 if hva < 0x20000 else None

    monkeypatch.setattr(signal_pages, "poisoned_pfn", entry)
    hvas = [0x13000, 0x13040, 0x20000, 0x13FFF, 0x20008]
    stage = SignalPages(OwnerLookup(None, str(tmp_path)), str(tmp_path))
    for _ in range(2):  # it may be another page in the next batch
        told = stage.process([Sigbus(3, 7, 1, 4, hva) for hva in hvas], 99)
        assert [getattr(one, "pfn", 0) for one in told] == [5, 5, None, 5, None]
    assert read == [0x13000, 0x20000] * 2


@pytest.mark.parametrize("together", [False, True])
def test_a_page_that_is_poisoned_again_is_searched_for_again(
    tmp_path: Path, together: bool
) -> None:
    proc_with(tmp_path, 7, {0x13000: ANON, 0x1F000: 0}, LOW_MAPS)
    stage = OwnerLookup(None, str(tmp_path))
    poisons = [Poison(ts, 0x104CAA, "dirty LRU page", "Recovered", tid=70) for ts in (3, 9, 20)]
    events = [VmSeen(1, 5, 7), poisons[0], Unpoison(6, 0x104CAA), poisons[1]]
    events += [Unpoison(12, 0x104CAA), poisons[2]]
    batches = [events] if together else [[event] for event in events]
    told = [event for batch in batches for event in stage.process(batch, 99)]
    for poison in poisons:
        owned = told[told.index(poison) - 1]
        assert owned == Owned(poison.ts, 0x104CAA, Owner(5, None, 0x13000), "pagemap", PAGE)
    assert stage.pfns == {0x104CAA}


def test_an_unpoisoned_page_is_not_searched_for(tmp_path: Path) -> None:
    """Its next poison may be of another VM."""
    proc_with(tmp_path, 7, {0x13000: ANON, 0x1F000: 0}, LOW_MAPS)
    stage = OwnerLookup(None, str(tmp_path))
    poison = Poison(3, 0x104CAA, "dirty LRU page", "Recovered", tid=70)
    batch = [VmSeen(1, 5, 7), poison, Unpoison(6, 0x104CAA)]
    assert stage.process(batch, 99) == batch
    assert not stage.busy


def test_a_waiting_search_ends_when_the_page_is_unpoisoned(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(owners, "MAX_SEARCHES", 0)  # others are going on
    monkeypatch.setattr(owners, "FIRST_SECONDS", -1.0)
    monkeypatch.setattr(owners, "SLICE_SECONDS", -1.0)
    stage = OwnerLookup(Slots(Page()), str(tmp_path))
    stage.process([VmSeen(1, 5, 7), Poison(3, 0x104CAA, "dirty LRU page", "Recovered")], 99)
    assert stage.busy
    stage.process([Unpoison(6, 0x104CAA)], 99)
    assert not stage.busy


@pytest.mark.parametrize("pfn", [0x104CAA, None])
@pytest.mark.parametrize("unpoisoned", [False, True])
def test_owners_of_an_unpoisoned_page_are_not_reported(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, pfn: int | None, unpoisoned: bool
) -> None:
    """A lost huge page without a pfn is not taken for it either."""
    ready: list[MappedPage] = []

    class Slow(PageTableSearch):
        def step(self, deadline: float) -> list[MappedPage]:
            if self.done or not ready:
                return []
            self.done = True
            return ready

    monkeypatch.setattr(owners, "PageTableSearch", Slow)
    stage = OwnerLookup(None, str(tmp_path))
    poison = Poison(3, 0x104CAA, "huge page", "Recovered", tid=70)
    stage.process([VmSeen(1, 5, 7), poison], 99)
    if unpoisoned:
        stage.process([Unpoison(6, 0x104CAA)], 99)
    ready.append(MappedPage(7, 0x200000, pfn, 2 << 20))
    found = [event.pfn for event in stage.process([], 99) if isinstance(event, Owned)]
    assert found == ([] if unpoisoned else [0x104CAA])
    assert not stage.busy


@pytest.mark.parametrize(
    ("page_type", "places"),
    [("reserved kernel page", 0), ("unknown page", 2), ("dirty LRU page", 16)],
)
def test_thousands_of_mappings_of_the_zero_page_are_not_reported(
    tmp_path: Path, page_type: str, places: int
) -> None:
    """Before 6.7 a whole page table is read, in which mapped pages match as well."""
    mapped = {0x10000 + n * PAGE: 1 << 63 | 0x104CAA for n in range(16)}
    proc_with(tmp_path, 7, mapped, LOW_MAPS)
    poison = Poison(3, 0x104CAA, page_type, "Ignored", tid=70)
    told = story(tmp_path, [VmSeen(1, 5, 7), poison])
    assert sum(isinstance(event, Owned) for event in told) == places
    correlator = Correlator()
    for event in told:
        correlator.feed(event)
    assert correlator.snapshot().kernel_pages == (places < 16)


def test_owners_of_an_already_poisoned_page_are_reported_once(tmp_path: Path) -> None:
    proc_with(tmp_path, 7, {0x13000: ANON, 0x1F000: 0}, LOW_MAPS)
    stage = OwnerLookup(None, str(tmp_path))
    poison = Poison(3, 0x104CAA, "dirty LRU page", "Recovered", tid=70)
    again = Poison(4, 0x104CAA, "already poisoned", "Failed", tid=70)
    told = stage.process([VmSeen(1, 5, 7), poison, again], 99) + stage.process([again], 99)
    assert sum(isinstance(event, Owned) for event in told) == 1


def test_a_page_with_guest_memfd_owners_is_not_searched_for(tmp_path: Path) -> None:
    proc_with(tmp_path, 7, {0x13000: ANON, 0x1F000: 0}, LOW_MAPS)
    events: list[Event] = [
        VmSeen(1, 5, 7),
        Poison(3, 0x104CAA, "", "Failed", tid=70, gmem=GmemPage(383, 3, (Owner(5, 3),))),
    ]
    assert story(tmp_path, events) == events


def test_without_slots_one_of_two_vms_of_a_process_is_not_named(tmp_path: Path) -> None:
    proc_with(tmp_path, 7, {0x13000: ANON, 0x1F000: 0}, LOW_MAPS)
    events: list[Event] = [
        VmSeen(1, 5, 7),
        VmSeen(1, 6, 7),
        Poison(3, 0x104CAA, "dirty LRU page", "Recovered"),
    ]
    assert story(tmp_path, events) == events


def test_a_signal_gets_the_pfn_of_its_address(tmp_path: Path) -> None:
    proc_with(tmp_path, 7, {0x13000: ANON, 0x1F000: 0}, LOW_MAPS)
    told = story(tmp_path, [Sigbus(1, 7, 70, 4, 0x13000), Sigbus(1, 7, 70, 4, 0x11000)])
    assert [getattr(event, "pfn", 0) for event in told] == [0x104CAA, None]


class Slots:
    """A source's memory with one slot, and at most one page, of guest_memfd."""

    def __init__(self, page: Page | None = None) -> None:
        self._page = page

    def slots(self, vm: int) -> tuple[Memslot, ...] | None:
        return (Memslot(None, 0x100, 16, 0x10000),)

    def huge_entry(self, vm: int, hva: int) -> int | None:
        return None

    def page(self, pfn: int) -> tuple[Page, list[Event]] | None:
        return None if self._page is None else (self._page, [])


def exit_at(gfn: int | None, errno: int = kvm.EHWPOISON) -> Exit:
    return Exit(9, 5, 0, errno, kvm.EXIT_MEMORY_FAULT, annotated=True, gfn=gfn)


def test_an_exit_names_the_page_by_the_page_table(tmp_path: Path) -> None:
    proc_with(tmp_path, 7, {0x13000: ANON, 0x1F000: 0}, LOW_MAPS)
    stage = OwnerLookup(Slots(), str(tmp_path))
    seen = VmSeen(1, 5, 7)
    owned = Owned(9, 0x104CAA, Owner(5, 0x103, 0x13000), "pagemap")
    assert stage.process([seen, exit_at(0x103)], 99) == [seen, owned, exit_at(0x103)]
    # Asked once; and not of other places, nor for other errnos.
    others: list[Event] = [exit_at(0x103), exit_at(0x104), exit_at(0x999), exit_at(None)]
    others += [exit_at(0x105, kvm.EFAULT)]
    assert stage.process(others, 99) == others


def test_where_a_guest_memfd_page_is_mapped(tmp_path: Path) -> None:
    maps = "00010000-00020000 rw-s 00002000 00:10 1466 anon_inode:[kvm-gmem]\n"
    proc_with(tmp_path, 7, {0x1F000: 0}, maps)
    page = Page(1466, os.makedev(0, 0x10), 5, (Owner(5, None),))
    seen = VmSeen(1, 5, 7)
    poison = Poison(3, 0x104CAA, "dirty unevictable LRU page", "Failed", tid=70)
    owned = Owned(3, 0x104CAA, Owner(5, 0x103, 0x13000), "guest_memfd")
    assert OwnerLookup(Slots(page), str(tmp_path)).process([seen, poison], 99) == [
        seen,
        owned,
        poison,
    ]
    elsewhere = replace(page, index=500)
    owned = replace(owned, owner=Owner(5, None))
    told = OwnerLookup(Slots(elsewhere), str(tmp_path)).process([seen, poison], 99)
    assert told == [seen, owned, poison]


def test_events_are_sorted_by_time() -> None:
    """Counters are read after or before rings; a VM may be identified last of all."""
    exit_ = Exit(5, 1, 0, 133, 39, True, gfn=8)
    poison = Poison(3, 0x104CAA, "dirty LRU page", "Recovered")
    seen = VmSeen(9, 1, 7)
    assert in_order([exit_, poison, seen]) == [seen, poison, exit_]


def test_a_page_that_is_unpoisoned_at_once_gets_no_owner(tmp_path: Path) -> None:
    proc_with(tmp_path, 7, {0x13000: ANON, 0x1F000: 0}, LOW_MAPS)
    poison = Poison(3, 0x104CAA, "dirty LRU page", "Recovered", tid=70)
    batch: list[Event] = [VmSeen(1, 5, 7), poison, Unpoison(6, 0x104CAA)]
    assert story(tmp_path, batch) == batch
