"""Whether a poisoned page is still where it was in a VMM's memory, by its page table.

The entry of a lost page names the pfn until something else is put there, which is what a VMM that
copes does. ``Releases`` is a source around a source. Hugetlb pages have no such entry, and
guest_memfd has one only where it is mapped.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable

from kvmtrace import clock
from kvmtrace.events import Event, Owned, Released, Sigbus, Unpoison, VmGone, VmSeen
from kvmtrace.observe.around import Around
from kvmtrace.observe.owners import entry_at, is_guest_memfd_at
from kvmtrace.pagemap import PAGE, poisoned
from kvmtrace.sources import Source

_SECOND = 1_000_000_000
LOOK_NS = _SECOND  # some microseconds for each place
MAX_PLACES = 1024


class Releases(Around):
    """A source that also reports when a poisoned page left a VM. ``now``: ns since the epoch."""

    def __init__(
        self, inner: Source, proc: str = "/proc", now: Callable[[], int] = clock.now_ns
    ) -> None:
        super().__init__(inner)
        self._proc = proc
        self._now = now
        self._pid_of: dict[int, int] = {}  # by VM
        self._places: OrderedDict[tuple[int, int, int], None] = OrderedDict()  # VM, pfn, hva
        self._next = 0

    def poll(self, timeout: float) -> list[Event]:
        """The inner source's events, and what was seen to be no longer there."""
        events = self.inner.poll(timeout)
        for event in events:
            self._follow(event)
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
        # A page that is not mapped there, or whose entry does not name it, cannot be followed.
        if place in self._places or not self._is_there(*place):
            return
        if not self._is_of_guest_memfd(vm, hva):
            self._places[place] = None
            while len(self._places) > MAX_PLACES:
                self._places.popitem(last=False)

    def _drop(self, concerned: Callable[[int, int], bool]) -> None:
        for place in [place for place in self._places if concerned(place[0], place[1])]:
            del self._places[place]

    def _look(self) -> list[Event]:
        now = self._now()
        if not self._places or now < self._next:
            return []
        self._next = now + LOOK_NS
        left = [place for place in self._places if self._is_there(*place) is False]
        for place in left:
            del self._places[place]
        return [Released(now, vm, pfn, hva) for vm, pfn, hva in left]

    def _is_there(self, vm: int, pfn: int, hva: int) -> bool | None:
        """None where that is not known: nothing can be read, or the process is on its way out.

        Its end is reported by VmGone, and takes its memory down well before that.
        """
        pid = self._pid_of.get(vm)
        entry = None if pid is None else entry_at(pid, hva, self._proc)
        if pid is None or entry is None:
            return None
        if poisoned(entry) == pfn:
            return True
        return None if is_guest_memfd_at(pid, hva, self._proc) is None else False

    def _is_of_guest_memfd(self, vm: int, hva: int) -> bool:
        """Such memory stays the VM's, whatever the VMM does with its own mapping of it."""
        pid = self._pid_of.get(vm)
        return pid is not None and bool(is_guest_memfd_at(pid, hva, self._proc))
