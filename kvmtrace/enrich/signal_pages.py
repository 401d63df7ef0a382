"""Find out which page a SIGBUS is about, and which process it is for."""

from __future__ import annotations

from dataclasses import replace

from kvmtrace.bounded import BoundedDict
from kvmtrace.enrich.owners import OwnerLookup
from kvmtrace.enrich.page_tables import poisoned_pfn
from kvmtrace.enrich.stage import Stage
from kvmtrace.events import Event, Poison, Sigbus
from kvmtrace.linux.pagemap import PAGE
from kvmtrace.vmm import identity

MAX_THREADS = 64
# From memory_failure's verdict to the signal that its caller sends for it.
JOIN_NS = 5_000_000_000


class SignalPages(Stage):
    """Fills in the pfn of a Sigbus, and the name of a process that runs no VM.

    A SIGBUS without an address is about the page that its sender has just poisoned. If it poisoned
    none, the signal is of another kind and is left out.
    """

    def __init__(self, owners: OwnerLookup, proc: str = "/proc") -> None:
        self._owners = owners
        self._proc = proc
        self._poisoned_by: BoundedDict[int, Poison] = BoundedDict(MAX_THREADS)  # by thread
        self._pfns: dict[tuple[int, int], int | None] = {}  # by process and page, in a batch

    def process(self, events: list[Event], now: int, *, last: bool = False) -> list[Event]:
        self._pfns.clear()
        out: list[Event] = []
        for event in events:
            match event:
                case Poison(tid=int(tid)):
                    self._poisoned_by.renew(tid, event)
                    out.append(event)
                case Sigbus(hva=None):
                    poison = self._poisoned_by.get(event.sender or 0)
                    if poison is not None and 0 <= event.ts - poison.ts <= JOIN_NS:
                        out.append(self._with_name(replace(event, pfn=poison.pfn)))
                case Sigbus(hva=int(hva), pfn=None):
                    pfn = self._pfn_at(event.pid, hva)
                    self._owners.note_poisoned(pfn)
                    out.append(self._with_name(replace(event, pfn=pfn)))
                case Sigbus():
                    out.append(self._with_name(event))
                case _:
                    out.append(event)
        return out

    def _with_name(self, signal: Sigbus) -> Sigbus:
        """Add the name of a process that runs no VM.

        The source has the name of the thread, which may differ, but is all there is if the process
        has already died of the signal.
        """
        comm = None
        if signal.vm is None:
            comm = identity.process_name(signal.pid, self._proc) or signal.comm
        return signal if signal.comm == comm else replace(signal, comm=comm)

    def _pfn_at(self, pid: int, hva: int) -> int | None:
        page = (pid, hva // PAGE)
        if page not in self._pfns:
            self._pfns[page] = poisoned_pfn(pid, hva, self._proc)
        pfn = self._pfns[page]
        return self._owners.huge_pfn_at(pid, hva) if pfn is None else pfn
