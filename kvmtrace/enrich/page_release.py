"""Watch whether a poisoned page is still in a VMM's memory, by its page table.

The entry of a lost page names its pfn until the VMM puts another page there, which is how a VMM
recovers. Hugetlb pages have no such entry, and guest_memfd has one only where it is mapped.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator

from kvmtrace.bounded import BoundedDict
from kvmtrace.enrich.page_tables import hold
from kvmtrace.enrich.stage import Stage
from kvmtrace.events import Event, Owned, PageReplaced, Sigbus, Unpoison, VmGone, VmSeen
from kvmtrace.linux.pagemap import PAGE

_SECOND = 1_000_000_000
CHECK_NS = _SECOND  # some microseconds for each place, a read for each process
MAX_PLACES = 1024

_Place = tuple[int, int, int]  # VM, pfn, hva


class PageReleaseWatch(Stage):
    """Adds a PageReplaced when a poisoned page has left a VM."""

    def __init__(self, proc: str = "/proc") -> None:
        self._proc = proc
        self._pid_of: dict[int, int] = {}  # by VM
        self._places: BoundedDict[_Place, None] = BoundedDict(MAX_PLACES)
        self._new: dict[_Place, None] = {}
        self._next = 0

    def process(self, events: list[Event], now: int, *, last: bool = False) -> list[Event]:
        """Watch the places that events name, and append those that the page has left."""
        for event in events:
            self._follow(event)
        self._add_new()
        return events + self._check(now)

    def _follow(self, event: Event) -> None:
        match event:
            case VmSeen():
                self._pid_of[event.vm] = event.pid
            case VmGone():
                self._pid_of.pop(event.vm, None)
                self._drop(lambda vm, pfn: vm == event.vm)
            case Unpoison():
                self._drop(lambda vm, pfn: pfn == event.pfn)
            case Owned() if event.owner.hva is not None:
                self._watch(event.owner.vm, event.pfn, event.owner.hva)
            case Sigbus(vm=int(vm), pfn=int(pfn), hva=int(hva)):
                self._watch(vm, pfn, hva)

    def _watch(self, vm: int, pfn: int, hva: int) -> None:
        place = (vm, pfn, hva // PAGE * PAGE)
        if place not in self._places:
            self._new[place] = None

    def _add_new(self) -> None:
        """Begin to watch new places.

        A page that is not mapped there, or whose entry does not name it, cannot be watched.
        guest_memfd remains the VM's even if the VMM unmaps it.
        """
        if not self._new:
            return
        new, self._new = list(self._new)[-MAX_PLACES:], {}
        for place, is_there in self._are_there(new, new=True):
            if is_there:
                self._places[place] = None

    def _drop(self, concerned: Callable[[int, int], bool]) -> None:
        for places in (self._places, self._new):
            for place in [place for place in places if concerned(place[0], place[1])]:
                del places[place]

    def _check(self, now: int) -> list[Event]:
        if not self._places or now < self._next:
            return []
        self._next = now + CHECK_NS
        states = self._are_there(list(self._places), new=False)
        left = [place for place, is_there in states if is_there is False]
        for place in left:
            del self._places[place]
        return [PageReplaced(now, vm, pfn, hva) for vm, pfn, hva in left]

    def _are_there(
        self, places: list[_Place], *, new: bool
    ) -> Iterator[tuple[_Place, bool | None]]:
        """Yield whether the page is at each place; one read for each process."""
        by_pid: dict[int, list[_Place]] = {}
        for place in places:
            pid = self._pid_of.get(place[0])
            if pid is not None:
                by_pid.setdefault(pid, []).append(place)
        for pid, in_it in by_pid.items():
            pages = tuple((pfn, hva) for _, pfn, hva in in_it)
            yield from zip(in_it, hold(pid, pages, self._proc, new=new), strict=True)
