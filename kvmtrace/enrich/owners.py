"""Find out which VM owns a poisoned page.

Owners are found in page tables and put in front of the poison that they belong to. A poll spends at
most ``FIRST_SECONDS`` on new poison and a few ``SLICE_SECONDS`` on searches that have begun; owners
that are found later come as ``Owned`` after their poison.
"""

from __future__ import annotations

import math
import time
from collections import OrderedDict
from collections.abc import Iterable
from dataclasses import replace

from kvmtrace.bounded import BoundedDict
from kvmtrace.enrich.page_tables import MappedPage, PageTableSearch, entry_at
from kvmtrace.enrich.stage import Stage
from kvmtrace.events import (
    Event,
    Exit,
    Found,
    Lost,
    Owned,
    Owner,
    Poison,
    Unpoison,
    VmGone,
    VmSeen,
)
from kvmtrace.linux.pagemap import PAGE, poisoned
from kvmtrace.linux.proc_reader import RETRY_SECONDS
from kvmtrace.page_types import PageOutcome, is_huge, outcome_of
from kvmtrace.sources.guest_memory import Memory, gfns_at

FIRST_SECONDS = 0.5
SLICE_SECONDS = 0.05
MAX_SEARCHES = 4
MAX_RETRIES = 64
MAX_PFNS = 16384
MAX_HUGE = 4096


class OwnerLookup(Stage):
    """Adds owners to poison. ``memory``: what the source can look up of guest memory."""

    def __init__(self, memory: Memory | None = None, proc: str = "/proc") -> None:
        self._memory = memory
        self._proc = proc
        self._pid_of: dict[int, int] = {}  # by VM
        self._ended_pids: set[int] = set()  # processes whose last VM ended
        self._searches: list[PageTableSearch] = []
        # Of processes that hung: when to try once more (monotonic seconds), and those in progress
        self._retries: list[tuple[float, PageTableSearch]] = []
        self._retrying: list[PageTableSearch] = []
        # Pages to be searched for: whether they may be of a hugetlb page
        self._to_search: dict[int, bool] = {}
        # Pages without an owner by search
        self._to_look_up: OrderedDict[int, None] = OrderedDict()
        self._poisoned: BoundedDict[int, None] = BoundedDict(MAX_PFNS)
        # No longer poisoned, though a search may still find them
        self._unpoisoned: BoundedDict[int, None] = BoundedDict(MAX_PFNS)
        # Pages that memory_failure could not get hold of, and at how many places they were found
        self._unheld: BoundedDict[int, int] = BoundedDict(MAX_PFNS)
        self._reported: BoundedDict[tuple[int, Owner], None] = BoundedDict(MAX_PFNS)
        # (VM, gfn) of exits
        self._resolved_exits: BoundedDict[tuple[int, int], None] = BoundedDict(MAX_PFNS)
        # Lost huge pages by (pid, hva): size, and pfn if known
        self._huge: BoundedDict[tuple[int, int], tuple[int, int | None]] = BoundedDict(MAX_HUGE)
        # Poisoned pages without a poison event
        self._unexplained: BoundedDict[int, None] = BoundedDict(MAX_PFNS)
        self._new_unexplained: list[int] = []
        self._deadline = 0.0

    @property
    def busy(self) -> bool:
        """Whether a search is in progress, or waits."""
        return bool(self._searches or self._to_search or self._to_look_up)

    @property
    def pfns(self) -> frozenset[int]:
        """Pages that have a poison event."""
        return frozenset(self._poisoned)

    def max_wait(self) -> float:
        """Come back soon while a search is in progress."""
        return SLICE_SECONDS if self.busy else math.inf

    def unexplained_pfns(self) -> list[int]:
        """Poisoned pages with a delivery but no poison event; each is returned once."""
        pfns, self._new_unexplained = self._new_unexplained, []
        return pfns

    def note_poisoned(self, pfn: int | None) -> None:
        """Note a page whose page table entry is poisoned; None is ignored."""
        if pfn is not None and pfn not in self._poisoned and pfn not in self._unexplained:
            self._unexplained[pfn] = None
            self._new_unexplained.append(pfn)

    def huge_pfn_at(self, pid: int, hva: int) -> int | None:
        """Return the pfn of the lost huge page at ``hva`` of a process; None if not known."""
        for (owner, start), (size, pfn) in self._huge.items():
            if owner == pid and start <= hva < start + size:
                return pfn
        return None

    def process(self, events: list[Event], now: int, *, last: bool = False) -> list[Event]:
        """Put owners in front of the poison that they belong to, as far as they are found now."""
        # Until now, so that the stages after this one find what the last batch was about.
        for pid in self._ended_pids.difference(self._pid_of.values()):
            for page in [page for page in self._huge if page[0] == pid]:
                del self._huge[page]
        self._ended_pids.clear()
        self._deadline = time.monotonic() + FIRST_SECONDS
        return self.add_owners(events, now)

    def add_owners(self, events: list[Event], now: int) -> list[Event]:
        """As ``process``, for more events of the same batch, within the same time limit."""
        out = self._continue_searches(now)
        wanted = self._without_owner(events)
        found: dict[int | None, list[Event]] = {}
        done: set[int | None] = set()  # pages whose owners have been put in front of their poison
        if wanted:
            self._track_vms(events)
            for one in self._search(wanted, now):
                found.setdefault(one.pfn if isinstance(one, Owned) else None, []).append(one)
        for event in events:
            self._track_vms([event])
            match event:
                case Poison():
                    out += found.pop(None, [])
                    if event.pfn not in done:
                        done.add(event.pfn)
                        out += [replace(owned, ts=event.ts) for owned in found.get(event.pfn, [])]
                    out.append(event)
                case Unpoison():
                    done.discard(event.pfn)
                    out.append(event)
                case Found():
                    done.add(event.pfn)
                    out += [*found.pop(None, []), *found.get(event.pfn, []), event]
                case Exit() if event.is_poison and event.gfn is not None:
                    out += [*self._page_of_exit(event, event.gfn), event]
                case _:
                    out.append(event)
        return out + [event for pfn, rest in found.items() if pfn not in done for event in rest]

    def _track_vms(self, events: Iterable[Event]) -> None:
        for event in events:
            match event:
                case VmSeen():
                    self._pid_of[event.vm] = event.pid
                case VmGone():
                    pid = self._pid_of.pop(event.vm, None)
                    if pid is not None and pid not in self._pid_of.values():
                        self._ended_pids.add(pid)

    def _without_owner(self, events: list[Event]) -> dict[int, bool]:
        """{pfn: whether it may be a hugetlb page} of poison whose owners guest_memfd did not give.

        Also notes which pages are poisoned and unpoisoned.
        """
        wanted = {}
        for event in events:
            match event:
                case Poison():
                    self._is_poisoned(event.pfn)
                    outcome = outcome_of(event.page_type, event.result)
                    if outcome == PageOutcome.UNHELD:
                        self._unheld.setdefault(event.pfn, 0)
                    elif outcome is not None:
                        self._unheld.pop(event.pfn, None)
                    owned = event.gmem and event.gmem.owners and event.gmem.complete
                    if not owned and outcome != PageOutcome.KERNEL:
                        wanted[event.pfn] = is_huge(event.page_type)
                case Found():
                    self._is_poisoned(event.pfn)
                    wanted[event.pfn] = True
                case Unpoison():
                    wanted.pop(event.pfn, None)
                    self._is_unpoisoned(event.pfn)
        return wanted

    def _is_poisoned(self, pfn: int) -> None:
        self._poisoned[pfn] = None
        self._unpoisoned.pop(pfn, None)

    def _is_unpoisoned(self, pfn: int) -> None:
        """Forget what is known of the page: the next poison may be of another VM."""
        self._unpoisoned[pfn] = None
        by_pfn = (self._poisoned, self._unexplained, self._unheld)
        for pages in (*by_pfn, self._to_search, self._to_look_up):
            pages.pop(pfn, None)
        for of, owner in [key for key in self._reported if key[0] == pfn]:
            del self._reported[of, owner]
            if owner.gfn is not None:
                self._resolved_exits.pop((owner.vm, owner.gfn), None)
        for page in [page for page, (_, of) in self._huge.items() if of == pfn]:
            del self._huge[page]

    # -- searching

    def _search(self, wanted: dict[int, bool], now: int) -> list[Event]:
        """Return the owners that are found at once; later slices continue the search."""
        self._to_search |= wanted
        events = self._start_search(self._deadline, now)
        owned = {event.pfn for event in events if isinstance(event, Owned)}
        self._to_look_up.update((pfn, None) for pfn in wanted if pfn not in owned)
        return events + self._look_up_pages(self._deadline, now) + self._drop_excess(now)

    def _start_search(self, deadline: float, now: int) -> list[Event]:
        if not self._to_search or len(self._searches) >= MAX_SEARCHES:
            return []
        wanted, self._to_search = self._to_search, {}
        huge = frozenset(pfn for pfn, is_huge in wanted.items() if is_huge)
        return self._run(PageTableSearch(wanted, self._pids(), self._proc, huge), deadline, now)

    def _run(self, search: PageTableSearch, deadline: float, now: int) -> list[Event]:
        """Return what a search finds until ``deadline``."""
        places, events = self._step(search, deadline, now)
        return self._owners(places, search.huge, now) + events

    def _step(
        self, search: PageTableSearch, deadline: float, now: int
    ) -> tuple[list[MappedPage], list[Event]]:
        """Continue a search, which is kept until it is done; what it found, and what it missed."""
        places = search.step(deadline)
        if not search.done:
            if search not in self._searches:
                self._searches.append(search)
            return places, []
        if search in self._searches:
            self._searches.remove(search)
        if not search.skipped:
            return places, []
        if search.pfns and search not in self._retrying and len(self._retries) < MAX_RETRIES:
            again = PageTableSearch(search.pfns, sorted(search.skipped), self._proc, search.huge)
            self._retries.append((time.monotonic() + RETRY_SECONDS, again))
        return places, [Lost(now, "unreadable_processes", len(search.skipped))]

    def _continue_searches(self, now: int) -> list[Event]:
        events: list[Event] = []
        while self._retries and self._retries[0][0] <= time.monotonic():
            _, again = self._retries.pop(0)
            self._retrying.append(again)
            self._searches.append(again)
        deadline = time.monotonic() + SLICE_SECONDS
        searches = list(self._searches)
        for number, search in enumerate(searches):
            begun = time.monotonic()
            share = max(0.0, deadline - begun) / (len(searches) - number)
            events += self._run(search, begun + share, now)
        self._retrying = [search for search in self._retrying if not search.done]
        events += self._start_search(time.monotonic() + SLICE_SECONDS, now)
        return events + self._look_up_pages(time.monotonic() + SLICE_SECONDS, now)

    def _pids(self) -> list[int]:
        return sorted(set(self._pid_of.values()))

    def _look_up_pages(self, deadline: float, now: int) -> list[Event]:
        """Look the pages up in the kernel: they are guest_memfd's, or of files that VMs map.

        For pages that no page table refers to.
        """
        events: list[Event] = []
        files: dict[tuple[int, int, int], int] = {}
        of_guest_memfd: list[tuple[int, Owner]] = []
        if not self._to_look_up or len(self._searches) >= MAX_SEARCHES:
            return []
        while self._to_look_up and time.monotonic() < deadline:
            pfn, _ = self._to_look_up.popitem(last=False)
            found = self._memory.page(pfn) if self._memory else None
            if found is None:
                continue
            page, seen = found
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

    def _drop_excess(self, now: int) -> list[Event]:
        """Forget the oldest pages that wait to be searched for, if there are too many."""
        excess = len(self._to_search) + len(self._to_look_up) - MAX_PFNS
        if excess <= 0:
            return []
        for _ in range(excess):
            if self._to_search:
                del self._to_search[next(iter(self._to_search))]
            else:
                self._to_look_up.popitem(last=False)
        return [Lost(now, "owner_searches", excess)]

    def _page_of_exit(self, exit_: Exit, gfn: int) -> list[Event]:
        """Return the page that an exit is about, by the page table at the address of its gfn."""
        vm = exit_.vm
        pid = self._pid_of.get(vm)
        if pid is None or (vm, gfn) in self._resolved_exits:
            return []
        slots = (self._memory.slots(vm) if self._memory else None) or ()
        hva = next((hva for slot in slots if (hva := slot.hva_of(gfn)) is not None), None)
        if hva is None:
            return []
        entry = entry_at(pid, hva, self._proc)
        if entry is None:
            return []  # tried again at the next exit
        self._resolved_exits[vm, gfn] = None
        pfn = poisoned(entry)
        if pfn is None:
            return []
        self.note_poisoned(pfn)
        return [Owned(exit_.ts, pfn, Owner(vm, gfn, hva), "pagemap")]

    def _owners(self, places: list[MappedPage], huge: frozenset[int], now: int) -> list[Event]:
        events: list[Event] = []
        for place in self._with_pfn(places, huge - self._unpoisoned.keys()):
            if place.pfn in self._unpoisoned:
                continue  # unpoisoned since the search began
            for vm in [vm for vm, pid in self._pid_of.items() if pid == place.pid]:
                for owner in self._owners_at(vm, place):
                    key = (place.pfn or 0, owner)
                    if key not in self._reported and self._is_no_zero_page(key[0]):
                        self._reported[key] = None
                        events.append(Owned(now, key[0], owner, place.via, place.size))
        return events

    def _is_no_zero_page(self, pfn: int) -> bool:
        """Whether one more place of the page is to be reported.

        A page that memory_failure could not get hold of and that is mapped in two places is the
        zero page, which is mapped in thousands.
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
        # Without slots, the owner is only known if the process runs one VM.
        alone = sum(pid == place.pid for pid in self._pid_of.values()) == 1
        return [Owner(vm, None, place.hva)] if alone else []

    # -- huge pages, whose pfn pagemap does not show

    def _with_pfn(self, places: list[MappedPage], huge: frozenset[int]) -> list[MappedPage]:
        """Return the places with their pfn; without huge pages whose pfn remains unknown.

        The page table itself has the pfn, if the source can read it. If not, and exactly one lost
        huge page is new and exactly one poisoned huge page has no place, they belong together.
        """
        resolved = [place for place in places if place.pfn is not None]
        unresolved: list[MappedPage] = []
        for place in places:
            if place.pfn is not None:
                continue
            head = self._huge_entry(place)
            if head is None:
                if (place.pid, place.hva) not in self._huge:
                    unresolved.append(place)
                continue
            pages = range(head, head + place.size // PAGE)
            pfn = next((pfn for pfn in (*huge, *self._poisoned) if pfn in pages), None)
            if pfn is not None:
                resolved.append(self._resolve_huge(place, pfn))
        placed = {place.pfn for place in resolved} | {pfn for _, pfn in self._huge.values()}
        candidates = [pfn for pfn in huge if pfn not in placed]
        # Several processes may share one page.
        regions = {place.file or (place.pid, place.hva, -1) for place in unresolved}
        if len(candidates) == 1 and len(regions) == 1:
            resolved += [self._resolve_huge(place, candidates[0]) for place in unresolved]
        else:
            for place in unresolved:
                self._note_huge(place, None)
        return resolved

    def _resolve_huge(self, place: MappedPage, pfn: int) -> MappedPage:
        self._note_huge(place, pfn)
        offset = pfn % (place.size // PAGE) * PAGE
        return replace(place, hva=place.hva + offset, pfn=pfn)

    def _note_huge(self, place: MappedPage, pfn: int | None) -> None:
        self._huge[place.pid, place.hva] = (place.size, pfn)

    def _huge_entry(self, place: MappedPage) -> int | None:
        if self._memory is None:
            return None
        # All VMs of a process share its page table. The source may have it for some of them only.
        vms = [vm for vm, pid in self._pid_of.items() if pid == place.pid]
        found = (self._memory.huge_entry(vm, place.hva) for vm in vms)
        return next((entry for entry in found if entry is not None), None)
