"""What the kernel does not report, looked up while it can be: which VM owns a poisoned page.

``OwnerLookup`` is a source around a source: it adds owners found in page tables just before the
poison they belong to, the pfn of signals, who made the CPU of a machine check, pages that were
poisoned before the start, and the kernel's own counts. What it adds are events like any others, so
recordings hold them and replays do not look anything up.

It never holds up its source for long: a poll spends at most ``FIRST_SECONDS`` on new poison and a
few ``SLICE_SECONDS`` on what was begun; owners found later come as ``Owned`` after their poison.
"""

from __future__ import annotations

import time
from collections import OrderedDict
from collections.abc import Callable, Iterable
from dataclasses import replace

from kvmtrace.enrich.existing_poison import ExistingPoison
from kvmtrace.enrich.page_tables import MappedPage, PageTableSearch, entry_at, poisoned_pfn
from kvmtrace.enrich.pipeline import EnrichedSource
from kvmtrace.events import (
    Event,
    Exit,
    Found,
    GmemPoison,
    Lost,
    Mce,
    Owned,
    Owner,
    Poison,
    Sigbus,
    Unpoison,
    VmGone,
    VmSeen,
)
from kvmtrace.linux import clock, host, mce
from kvmtrace.linux.pagemap import PAGE, poisoned
from kvmtrace.linux.proc_reader import READER, RETRY_SECONDS
from kvmtrace.page_types import PageOutcome, is_huge, outcome_of
from kvmtrace.sources import Source
from kvmtrace.sources.guest_memory import HasMemory, Memory, gfns_at
from kvmtrace.vmm import identity

FIRST_SECONDS = 0.5
SLICE_SECONDS = 0.05
MAX_SEARCHES = 4
MAX_LATER = 64
MAX_THREADS = 64
MAX_PFNS = 16384
MAX_HUGE = 4096
# From memory_failure's verdict to the signal that its caller sends for it.
JOIN_NS = 5_000_000_000


class OwnerLookup(EnrichedSource):
    """A source whose poisons come with their owners. ``inner``: the source that it reads."""

    def __init__(
        self,
        inner: Source,
        proc: str = "/proc",
        inventory: ExistingPoison | None = None,
        now: Callable[[], int] = clock.now_ns,
    ) -> None:
        super().__init__(inner, now)
        self._inventory = inventory or ExistingPoison(proc)
        self._observer = Observer(inner.memory if isinstance(inner, HasMemory) else None, proc)
        self._hangs = READER.hangs

    def poll(self, timeout: float) -> list[Event]:
        last = timeout == 0
        if self._observer.busy:
            timeout = min(timeout, SLICE_SECONDS)
        counts = self._inventory.counts(self._now())
        told = in_order(self.read(timeout))
        now = self._read_ns
        deadline = time.monotonic() + FIRST_SECONDS
        events = counts + self._observer.events(told, now, deadline)
        self._inventory.settle(self._observer.suspects())
        found = self._inventory.look(
            now, time.monotonic() + SLICE_SECONDS, self._observer.pfns, last=last
        )
        events += self._observer.events(found, now, deadline) if found else []
        return events + self._given_up()

    def _given_up(self) -> list[Event]:
        hangs = READER.hangs - self._hangs
        self._hangs += hangs
        return [Lost(self._read_ns, "hung_reads", hangs)] if hangs else []


def in_order(events: list[Event]) -> list[Event]:
    """As they happened: a source reads its rings and its counters one after the other.

    VMs come first, whenever it was found out who they are.
    """
    return sorted(events, key=lambda event: (not isinstance(event, VmSeen), event.ts))


class Observer:
    """Adds to batches of events what page tables show. ``memory``: what the source can look up."""

    def __init__(self, memory: Memory | None = None, proc: str = "/proc") -> None:
        self._memory = memory
        self._proc = proc
        self._cpu = host.cpu(proc)
        self._pid_of: dict[int, int] = {}  # by VM
        self._searches: list[PageTableSearch] = []
        # For processes that hung: tried once more (monotonic seconds), and those that are.
        self._later: list[tuple[float, PageTableSearch]] = []
        self._again: list[PageTableSearch] = []
        self._waiting: dict[
            int, bool
        ] = {}  # pfns to be searched for: may they be of a hugetlb page
        self._to_ask: OrderedDict[int, None] = OrderedDict()  # pfns no page table refers to
        self._seen: OrderedDict[int, None] = OrderedDict()  # poisoned pfns
        self._mended: OrderedDict[int, None] = OrderedDict()  # no more: searches may still run
        # Pages that memory_failure could not get hold of, and at how many places they were found.
        self._unheld: OrderedDict[int, int] = OrderedDict()
        self._owned: OrderedDict[tuple[int, Owner], None] = OrderedDict()
        self._asked: OrderedDict[tuple[int, int], None] = OrderedDict()  # (VM, gfn) of exits
        self._huge: OrderedDict[tuple[int, int], tuple[int, int | None]] = OrderedDict()
        self._poisoned_by: OrderedDict[int, Poison] = OrderedDict()  # by thread
        self._suspected: OrderedDict[int, None] = OrderedDict()
        self._fresh: list[int] = []
        self._deadline = 0.0
        self._read: dict[tuple[int, int], int | None] = {}  # pfns by process and page, in a batch

    @property
    def busy(self) -> bool:
        """A search is going on, or waits."""
        return bool(self._searches or self._waiting or self._to_ask)

    @property
    def pfns(self) -> frozenset[int]:
        """Pages that are known to be poisoned."""
        return frozenset(self._seen)

    def suspects(self) -> list[int]:
        """Poisoned pages with a delivery but no poison event; each is given once."""
        fresh, self._fresh = self._fresh, []
        return fresh

    def _suspect(self, pfn: int | None) -> int | None:
        if pfn is not None and pfn not in self._seen and pfn not in self._suspected:
            self._suspected[pfn] = None
            self._fresh.append(pfn)
            while len(self._suspected) > MAX_PFNS:
                self._suspected.popitem(last=False)
        return pfn

    def events(self, events: list[Event], now: int, deadline: float | None = None) -> list[Event]:
        """``events`` with what was found about them, in order. ``now``: ns since the epoch.

        ``deadline``: until when (monotonic seconds) owners of new poison may be searched for.
        """
        self._deadline = time.monotonic() + FIRST_SECONDS if deadline is None else deadline
        self._read.clear()
        out = self._slice(now)
        wanted = self._unowned(events)
        found: dict[int | None, list[Event]] = {}
        told: set[int | None] = set()  # pages whose owners stand in front of their poison
        if wanted:
            self._follow(events)
            for one in self._begin(wanted, now):
                found.setdefault(one.pfn if isinstance(one, Owned) else None, []).append(one)
        for event in events:
            self._follow([event])
            match event:
                case Poison():
                    out += found.pop(None, [])
                    if event.pfn not in told:
                        told.add(event.pfn)
                        out += [replace(owned, ts=event.ts) for owned in found.get(event.pfn, [])]
                    out.append(event)
                case Unpoison():
                    told.discard(event.pfn)
                    out.append(event)
                case Found():
                    told.add(event.pfn)
                    out += [*found.pop(None, []), *found.get(event.pfn, []), event]
                case Exit() if event.is_poison and event.gfn is not None:
                    out += [*self._page_behind(event, event.gfn), event]
                case Sigbus(hva=None):
                    out += [self._named_process(one) for one in self._after_poison(event)]
                case Sigbus():
                    pfn = self._suspect(self._pfn_at(event)) if event.pfn is None else event.pfn
                    out.append(self._named_process(replace(event, pfn=pfn)))
                case Mce() if event.vendor is None:
                    out.append(self._by_cpu(event))
                case _:
                    out.append(event)
        return out + [event for pfn, rest in found.items() if pfn not in told for event in rest]

    def _by_cpu(self, check: Mce) -> Mce:
        """What the bits of a machine check mean depends on who made the CPU."""
        cpu, addr, status = self._cpu, check.addr, check.status
        if addr is not None:
            registers = (addr, status, check.misc, cpu.vendor, cpu.physical_bits)
            addr = mce.physical(*registers, bank=check.bank, ipid=check.ipid, smca=cpu.smca)
        return replace(
            check,
            vendor=cpu.vendor,
            pfn=None if addr is None else addr // PAGE,
            count=max(check.count, mce.errors(status, cpu.vendor, check.bank)),
        )

    def _after_poison(self, signal: Sigbus) -> list[Sigbus]:
        """A SIGBUS without an address is about the page that its thread has just poisoned, or
        nothing of ours.
        """
        poison = self._poisoned_by.get(signal.sender or 0)
        if poison is None or not 0 <= signal.ts - poison.ts <= JOIN_NS:
            return []
        return [replace(signal, pfn=poison.pfn)]

    def _named_process(self, signal: Sigbus) -> Sigbus:
        """With what a process that runs no VM of ours calls itself.

        The source knows its thread's name, which need not be the process's; but many die of it.
        """
        comm = None
        if signal.vm is None:
            comm = identity.process_name(signal.pid, self._proc) or signal.comm
        return signal if signal.comm == comm else replace(signal, comm=comm)

    def _follow(self, events: Iterable[Event]) -> None:
        for event in events:
            match event:
                case VmSeen():
                    self._pid_of[event.vm] = event.pid
                case VmGone():
                    pid = self._pid_of.pop(event.vm, None)
                    if pid not in self._pid_of.values():
                        for key in [key for key in self._huge if key[0] == pid]:
                            del self._huge[key]
                case Poison(tid=int(tid)):
                    self._poisoned_by[tid] = event
                    self._poisoned_by.move_to_end(tid)
                    while len(self._poisoned_by) > MAX_THREADS:
                        self._poisoned_by.popitem(last=False)

    def _unowned(self, events: list[Event]) -> dict[int, bool]:
        """{pfn: it may be a hugetlb page} of poisons that guest_memfd does not own up to."""
        told: dict[int, GmemPoison] = {}
        wanted = {}
        for event in events:
            match event:
                case GmemPoison():
                    told[event.tid] = event
                case Poison():
                    gmem = told.pop(event.tid, None) if event.tid is not None else None
                    self._is_poisoned(event.pfn)
                    outcome = outcome_of(event.page_type, event.result)
                    if outcome == PageOutcome.UNHELD:
                        self._unheld.setdefault(event.pfn, 0)
                    elif outcome is not None:
                        self._unheld.pop(event.pfn, None)
                    owned = gmem is not None and gmem.owners and gmem.complete
                    if not owned and outcome != PageOutcome.KERNEL:
                        wanted[event.pfn] = is_huge(event.page_type)
                case Found():
                    self._is_poisoned(event.pfn)
                    wanted[event.pfn] = True
                case Unpoison():
                    wanted.pop(event.pfn, None)
                    self._is_mended(event.pfn)
        for pages in (self._seen, self._mended, self._unheld):
            while len(pages) > MAX_PFNS:
                pages.popitem(last=False)
        return wanted

    def _is_poisoned(self, pfn: int) -> None:
        self._seen[pfn] = None
        self._mended.pop(pfn, None)

    def _is_mended(self, pfn: int) -> None:
        """What is known of the page is of its old poison; the next one is looked up anew."""
        self._mended[pfn] = None
        for pages in (self._seen, self._suspected, self._unheld, self._waiting, self._to_ask):
            pages.pop(pfn, None)
        for of, owner in [key for key in self._owned if key[0] == pfn]:
            del self._owned[of, owner]
            if owner.gfn is not None:
                self._asked.pop((owner.vm, owner.gfn), None)
        for place in [place for place, (_, of) in self._huge.items() if of == pfn]:
            del self._huge[place]

    # -- searching

    def _begin(self, wanted: dict[int, bool], now: int) -> list[Event]:
        """Owners that are found at once; the rest of the search goes on in later slices."""
        self._waiting |= wanted
        events = self._start_waiting(self._deadline, now)
        owned = {event.pfn for event in events if isinstance(event, Owned)}
        self._to_ask.update((pfn, None) for pfn in wanted if pfn not in owned)
        return events + self._ask_pages(self._deadline, now) + self._bounded(now)

    def _start_waiting(self, deadline: float, now: int) -> list[Event]:
        if not self._waiting or len(self._searches) >= MAX_SEARCHES:
            return []
        wanted, self._waiting = self._waiting, {}
        huge = frozenset(pfn for pfn, is_huge in wanted.items() if is_huge)
        return self._run(PageTableSearch(wanted, self._pids(), self._proc, huge), deadline, now)

    def _run(self, search: PageTableSearch, deadline: float, now: int) -> list[Event]:
        """What a search finds until ``deadline``."""
        places, events = self._step(search, deadline, now)
        return self._owners(places, search.huge, now) + events

    def _step(
        self, search: PageTableSearch, deadline: float, now: int
    ) -> tuple[list[MappedPage], list[Event]]:
        """Go on with a search, which is kept until it is done; what it found, what it missed."""
        places = search.step(deadline)
        if not search.done:
            if search not in self._searches:
                self._searches.append(search)
            return places, []
        if search in self._searches:
            self._searches.remove(search)
        if not search.skipped:
            return places, []
        if search.pfns and search not in self._again and len(self._later) < MAX_LATER:
            again = PageTableSearch(search.pfns, sorted(search.skipped), self._proc, search.huge)
            self._later.append((time.monotonic() + RETRY_SECONDS, again))
        return places, [Lost(now, "unreadable_processes", len(search.skipped))]

    def _slice(self, now: int) -> list[Event]:
        events: list[Event] = []
        while self._later and self._later[0][0] <= time.monotonic():
            _, again = self._later.pop(0)
            self._again.append(again)
            self._searches.append(again)
        deadline = time.monotonic() + SLICE_SECONDS
        searches = list(self._searches)
        for number, search in enumerate(searches):
            begun = time.monotonic()
            share = max(0.0, deadline - begun) / (len(searches) - number)
            events += self._run(search, begun + share, now)
        self._again = [search for search in self._again if not search.done]
        events += self._start_waiting(time.monotonic() + SLICE_SECONDS, now)
        return events + self._ask_pages(time.monotonic() + SLICE_SECONDS, now)

    def _pids(self) -> list[int]:
        return sorted(set(self._pid_of.values()))

    def _ask_pages(self, deadline: float, now: int) -> list[Event]:
        """Ask the pages themselves: guest_memfd, or files that nobody has these pages mapped of."""
        events: list[Event] = []
        files: dict[tuple[int, int, int], int] = {}
        of_guest_memfd: list[tuple[int, Owner]] = []
        if not self._to_ask or len(self._searches) >= MAX_SEARCHES:
            return []
        while self._to_ask and time.monotonic() < deadline:
            pfn, _ = self._to_ask.popitem(last=False)
            answer = self._memory.page(pfn) if self._memory else None
            if answer is None:
                continue
            page, seen = answer
            events += seen
            if page.inode is not None and page.device is not None and page.index is not None:
                files[page.device, page.inode, page.index] = pfn
            of_guest_memfd += [(pfn, owner) for owner in page.owners or ()]
        mapped = PageTableSearch((), self._pids(), self._proc, files=files)
        places, missed = self._step(mapped, deadline, now)
        events += missed
        for pfn, owner in of_guest_memfd:
            pid = self._pid_of.get(owner.vm)
            mine = [x for x in places if (x.pid, x.pfn) == (pid, pfn)] if not owner.hva else []
            exact = self._owners_at(owner.vm, mine[0]) if mine else []
            events.append(Owned(now, pfn, exact[0] if exact else owner, "guest_memfd"))
        of_others = [x for x in places if x.pfn not in {pfn for pfn, _ in of_guest_memfd}]
        return events + self._owners(of_others, frozenset(), now)

    def _bounded(self, now: int) -> list[Event]:
        """Forget the oldest of what a flood of poisons leaves to be looked for."""
        excess = len(self._waiting) + len(self._to_ask) - MAX_PFNS
        if excess <= 0:
            return []
        for _ in range(excess):
            if self._waiting:
                del self._waiting[next(iter(self._waiting))]
            else:
                self._to_ask.popitem(last=False)
        return [Lost(now, "owner_searches", excess)]

    def _page_behind(self, told: Exit, gfn: int) -> list[Event]:
        """Which page an exit is about, by the page table at the address of its gfn."""
        pid = self._pid_of.get(told.vm)
        if pid is None or (told.vm, gfn) in self._asked:
            return []
        slots = (self._memory.slots(told.vm) if self._memory else None) or ()
        hva = next((hva for slot in slots if (hva := slot.hva_of(gfn)) is not None), None)
        if hva is None:
            return []
        entry = entry_at(pid, hva, self._proc)
        if entry is None:
            return []  # it may be read at the next exit
        self._asked[told.vm, gfn] = None
        while len(self._asked) > MAX_PFNS:
            self._asked.popitem(last=False)
        pfn = self._suspect(poisoned(entry))
        if pfn is None:
            return []
        return [Owned(told.ts, pfn, Owner(told.vm, gfn, hva), "pagemap")]

    def _owners(self, places: list[MappedPage], huge: frozenset[int], now: int) -> list[Event]:
        events: list[Event] = []
        for place in self._named(places, huge - self._mended.keys()):
            if place.pfn in self._mended:
                continue  # unpoisoned since the search began
            for vm in [vm for vm, pid in self._pid_of.items() if pid == place.pid]:
                for owner in self._owners_at(vm, place):
                    key = (place.pfn or 0, owner)
                    if key not in self._owned and self._may_be_owned(key[0]):
                        self._owned[key] = None
                        events.append(Owned(now, key[0], owner, place.via, place.size))
        while len(self._owned) > MAX_PFNS:
            self._owned.popitem(last=False)
        return events

    def _may_be_owned(self, pfn: int) -> bool:
        """A page that nobody got hold of and that is in two places is the zero page.

        It is in thousands.
        """
        places = self._unheld.get(pfn)
        if places is not None:
            self._unheld[pfn] = places + 1
        return places is None or places < 2

    def _owners_at(self, vm: int, place: MappedPage) -> list[Owner]:
        slots = self._memory.slots(vm) if self._memory else None
        gfns = gfns_at(slots, place.hva) if slots else []
        if gfns:
            return [Owner(vm, gfn, place.hva) for gfn in gfns]
        # Without slots, whose memory it is can only be said where the process runs one VM.
        alone = sum(pid == place.pid for pid in self._pid_of.values()) == 1
        return [Owner(vm, None, place.hva)] if alone else []

    # -- huge pages, of which pagemap does not have the pfn

    def _named(self, places: list[MappedPage], huge: frozenset[int]) -> list[MappedPage]:
        """The places with their pfn; without those of huge pages that remain unknown.

        The page table itself has it, where the source can read it. Where not: if one lost huge page
        is new and one poisoned page is a huge one without a place, they belong together.
        """
        named = [place for place in places if place.pfn is not None]
        vague: list[MappedPage] = []
        for place in places:
            if place.pfn is not None:
                continue
            head = self._huge_entry(place)
            if head is None:
                if (place.pid, place.hva) not in self._huge:
                    vague.append(place)
                continue
            pages = range(head, head + place.size // PAGE)
            pfn = next((pfn for pfn in (*huge, *self._seen) if pfn in pages), None)
            if pfn is not None:
                named.append(self._settled(place, pfn))
        placed = {place.pfn for place in named} | {pfn for _, pfn in self._huge.values()}
        candidates = [pfn for pfn in huge if pfn not in placed]
        # One page, though several processes may share it.
        regions = {place.file or (place.pid, place.hva, -1) for place in vague}
        if len(candidates) == 1 and len(regions) == 1:
            named += [self._settled(place, candidates[0]) for place in vague]
        else:
            for place in vague:
                self._note_huge(place, None)
        return named

    def _settled(self, place: MappedPage, pfn: int) -> MappedPage:
        self._note_huge(place, pfn)
        offset = pfn % (place.size // PAGE) * PAGE
        return replace(place, hva=place.hva + offset, pfn=pfn)

    def _note_huge(self, place: MappedPage, pfn: int | None) -> None:
        self._huge[place.pid, place.hva] = (place.size, pfn)
        while len(self._huge) > MAX_HUGE:
            self._huge.popitem(last=False)

    def _huge_entry(self, place: MappedPage) -> int | None:
        if self._memory is None:
            return None
        # All VMs of a process have its page table; of some the source may not know where it is.
        vms = [vm for vm, pid in self._pid_of.items() if pid == place.pid]
        found = (self._memory.huge_entry(vm, place.hva) for vm in vms)
        return next((entry for entry in found if entry is not None), None)

    def _pfn_at(self, signal: Sigbus) -> int | None:
        if signal.hva is None:
            return None
        place = (signal.pid, signal.hva // PAGE)
        if place not in self._read:
            self._read[place] = poisoned_pfn(signal.pid, signal.hva, self._proc)
        pfn = self._read[place]
        if pfn is not None:
            return pfn
        for (pid, start), (size, huge) in self._huge.items():
            if pid == signal.pid and start <= signal.hva < start + size:
                return huge
        return None
