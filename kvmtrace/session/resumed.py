"""Go on where an earlier serve of the same boot ended: its events first, then the source's.

VMs that still run keep their keys, so their counters go on, and pages that are found again join
their incidents. The other VMs have ended meanwhile.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterable

from kvmtrace.correlate import Correlator
from kvmtrace.events import Event, KernelCounts, Lost, Reboot, VmGone, VmSeen
from kvmtrace.model import HistoryState, Snapshot
from kvmtrace.session.archive import LOST_AT, Archive
from kvmtrace.session.archive_story import rekeyed
from kvmtrace.sources import Source, WrappedSource


class ResumedSource(WrappedSource):
    """The events ``past``, then those of ``inner``, which also go to ``archive``."""

    def __init__(
        self,
        inner: Source,
        past: list[Event],
        archive: Archive,
        now: Callable[[], int],
        first_key: int = 0,
    ) -> None:
        """``now``: ns since the epoch, by the clock of the source's events.

        ``past``, ``first_key``: as ``Archive.begin`` returns them.
        """
        super().__init__(inner)
        self._archive, self._now = archive, now
        self._past: list[Event] | None = past
        self._keys: dict[int, int] = {}  # of VMs of then: ours by the source's
        self._base = first_key
        self._running: dict[int, VmSeen] = {}
        self._counts_go_on = False
        self._start = _model_of(past) if past else None
        for event in past:
            match event:
                case VmSeen():
                    self._running[event.vm] = event
                case VmGone():
                    self._running.pop(event.vm, None)
                case KernelCounts():
                    self._counts_go_on = True
                case Reboot():
                    self._counts_go_on = False

    def poll(self, timeout: float) -> list[Event]:
        """As ``Source.poll``; the first call returns the past, too."""
        events = self.inner.poll(timeout)
        past, self._past = self._past, None
        if past is not None:
            self._recognize(event for event in events if isinstance(event, VmSeen))
        new = [self._translated(event) for event in events]
        if past is not None:
            new = [*self._ended(), *new]
        if lost := self._archive.take_lost():
            new.append(Lost(self._now(), LOST_AT, lost))
        self._archive.add(new)
        return [*(past or ()), *new]

    def _recognize(self, seen: Iterable[VmSeen]) -> None:
        of_process: dict[int, list[VmSeen]] = {}
        for before in self._running.values():
            of_process.setdefault(before.pid, []).append(before)
        for event in seen:
            known = of_process.get(event.pid, [])
            same = next((one for one in known if _is_same(one, event)), None)
            if same is not None:
                known.remove(same)
                self._keys[event.vm] = same.vm

    def _ended(self) -> list[Event]:
        """The VMs of the past that no longer run."""
        here = set(self._keys.values())
        return [VmGone(self._now(), key) for key in self._running if key not in here]

    def _translated(self, event: Event) -> Event:
        if isinstance(event, KernelCounts) and self._counts_go_on:
            # The kernel's counts are since boot: what it handled in between was missed.
            return dataclasses.replace(event, at_start=False)
        return rekeyed(event, lambda vm: self._keys.get(vm, self._base + vm))

    def history(self) -> HistoryState:
        """What is kept."""
        return dataclasses.replace(
            self._archive.state(), start=self._start, was_cut=self._archive.was_cut
        )

    def close(self) -> None:
        super().close()
        self._archive.close()


def _model_of(events: Iterable[Event]) -> Snapshot:
    correlator = Correlator()
    for event in events:
        correlator.feed(event)
    return correlator.snapshot()


def _is_same(before: VmSeen, now: VmSeen) -> bool:
    """Whether a VM is one of an earlier run: the process, and all that is known of both."""
    if before.pid != now.pid:
        return False
    facts = ((before.uuid, now.uuid), (before.name, now.name), (before.vmm, now.vmm))
    return all(one == other for one, other in facts if one is not None and other is not None)
