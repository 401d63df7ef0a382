"""Go on where an earlier serve of the same boot ended: its events first, then the source's.

VMs that still run keep their keys, so their counters go on, and pages that are found again join
their incidents. The other VMs have ended meanwhile.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterable
from typing import Any

from kvmtrace.events import Event, KernelCounts, Lost, Owned, Poison, VmGone, VmSeen
from kvmtrace.session.archive import LOST_AT, Archive
from kvmtrace.sources import Source, WrappedSource


class ResumedSource(WrappedSource):
    """The events ``past``, then those of ``inner``, which also go to ``archive``."""

    def __init__(
        self, inner: Source, past: list[Event], archive: Archive, now: Callable[[], int]
    ) -> None:
        """``now``: ns since the epoch, by the clock of the source's events."""
        super().__init__(inner)
        self._archive, self._now = archive, now
        self._past: list[Event] | None = past
        self._keys: dict[int, int] = {}  # ours by the source's
        self._running = {event.vm: event for event in past if isinstance(event, VmSeen)}
        for event in past:
            if isinstance(event, VmGone):
                self._running.pop(event.vm, None)
        keys = [key for event in past for key in keys_of(event)]
        self._base = max(keys, default=-1) + 1
        self._counts_go_on = any(isinstance(event, KernelCounts) for event in past)

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
        for event in seen:
            for key, before in self._running.items():
                if key not in self._keys.values() and _is_same(before, event):
                    self._keys[event.vm] = key
                    break

    def _ended(self) -> list[Event]:
        """The VMs of the past that no longer run."""
        here = set(self._keys.values())
        return [VmGone(self._now(), key) for key in self._running if key not in here]

    def _translated(self, event: Event) -> Event:
        if isinstance(event, KernelCounts) and self._counts_go_on:
            # The kernel's counts are since boot: what it handled in between was missed.
            return dataclasses.replace(event, at_start=False)
        return rekeyed(event, lambda vm: self._keys.setdefault(vm, self._base + vm))

    def close(self) -> None:
        super().close()
        self._archive.close()


def rekeyed(event: Event, key: Callable[[int], int]) -> Event:
    """The event with other keys for its VMs."""
    changes: dict[str, Any] = {}
    match event:
        case Owned():
            changes["owner"] = dataclasses.replace(event.owner, vm=key(event.owner.vm))
        case Poison(gmem=gmem) if gmem is not None:
            owners = tuple(dataclasses.replace(one, vm=key(one.vm)) for one in gmem.owners)
            changes["gmem"] = dataclasses.replace(gmem, owners=owners)
        case _ if (vm := getattr(event, "vm", None)) is not None:
            changes["vm"] = key(vm)
    return dataclasses.replace(event, **changes) if changes else event


def keys_of(event: Event) -> list[int]:
    """The keys of the VMs that an event names."""
    keys: list[int] = []

    def note(vm: int) -> int:
        keys.append(vm)
        return vm

    rekeyed(event, note)
    return keys


def _is_same(before: VmSeen, now: VmSeen) -> bool:
    """Whether a VM is one of an earlier run: the process, and all that is known of both."""
    if before.pid != now.pid:
        return False
    facts = ((before.uuid, now.uuid), (before.name, now.name), (before.vmm, now.vmm))
    return all(one == other for one, other in facts if one is not None and other is not None)
