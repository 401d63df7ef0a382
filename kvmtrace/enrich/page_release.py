"""Whether a poisoned page is still where it was in a VMM's memory, by its page table.

The entry of a lost page names the pfn until something else is put there, which is what a VMM that
copes does. ``PageReleaseWatch`` is a source around a source. Hugetlb pages have no such entry, and
guest_memfd has one only where it is mapped.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable, Iterator

from kvmtrace.enrich.page_tables import hold
from kvmtrace.enrich.pipeline import EnrichedSource
from kvmtrace.events import Event, Owned, PageReplaced, Sigbus, Unpoison, VmGone, VmSeen
from kvmtrace.linux import clock
from kvmtrace.linux.pagemap import PAGE
from kvmtrace.sources import Source

_SECOND = 1_000_000_000
LOOK_NS = _SECOND  # some microseconds for each place, a read for each process
MAX_PLACES = 1024

_Place = tuple[int, int, int]  # VM, pfn, hva


class PageReleaseWatch(EnrichedSource):
    """A source that also reports when a poisoned page left a VM. ``now``: ns since the epoch."""

    def __init__(
        self, inner: Source, proc: str = "/proc", now: Callable[[], int] = clock.now_ns
    ) -> None:
        super().__init__(inner, now)
        self._proc = proc
        self._pid_of: dict[int, int] = {}  # by VM
        self._places: OrderedDict[_Place, None] = OrderedDict()
        self._new: dict[_Place, None] = {}
        self._next = 0

    def poll(self, timeout: float) -> list[Event]:
        """The inner source's events, and what was seen to be no longer there."""
        events = self.read(timeout)
        for event in events:
            self._follow(event)
        self._begin()
        return events + self._look()

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

    def _begin(self) -> None:
        """Follow what is new.

        A page that is not mapped there, or whose entry does not name it, cannot be followed.
        Guest_memfd stays the VM's, whatever the VMM does with its own mapping of it.
        """
        if not self._new:
            return
        new, self._new = list(self._new)[-MAX_PLACES:], {}
        for place, is_there in self._asked(new, new=True):
            if is_there:
                self._places[place] = None
        while len(self._places) > MAX_PLACES:
            self._places.popitem(last=False)

    def _drop(self, concerned: Callable[[int, int], bool]) -> None:
        for places in (self._places, self._new):
            for place in [place for place in places if concerned(place[0], place[1])]:
                del places[place]

    def _look(self) -> list[Event]:
        now = self._read_ns
        if not self._places or now < self._next:
            return []
        self._next = now + LOOK_NS
        asked = self._asked(list(self._places), new=False)
        left = [place for place, is_there in asked if is_there is False]
        for place in left:
            del self._places[place]
        return [PageReplaced(now, vm, pfn, hva) for vm, pfn, hva in left]

    def _asked(self, places: list[_Place], *, new: bool) -> Iterator[tuple[_Place, bool | None]]:
        """Whether they are there, asked of all that are in one process at once."""
        by_pid: dict[int, list[_Place]] = {}
        for place in places:
            pid = self._pid_of.get(place[0])
            if pid is not None:
                by_pid.setdefault(pid, []).append(place)
        for pid, of_it in by_pid.items():
            pages = tuple((pfn, hva) for _, pfn, hva in of_it)
            yield from zip(of_it, hold(pid, pages, self._proc, new=new), strict=True)
