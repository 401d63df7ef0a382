"""A source with what the kernel does not report: page owners, states of vCPUs, passing time.

What the stages add are events like any others: recordings hold them, and a replay looks nothing up.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

from kvmtrace.enrich.existing_poison import ExistingPoison
from kvmtrace.enrich.heartbeat import Heartbeat
from kvmtrace.enrich.hung_reads import HungReads
from kvmtrace.enrich.kernel_counts import KernelCountsReader
from kvmtrace.enrich.machine_checks import MachineChecks
from kvmtrace.enrich.owners import OwnerLookup
from kvmtrace.enrich.page_release import PageReleaseWatch
from kvmtrace.enrich.signal_pages import SignalPages
from kvmtrace.enrich.stage import Stage
from kvmtrace.enrich.vcpu_state import VcpuFollowUp
from kvmtrace.events import Event, VmSeen
from kvmtrace.linux import clock
from kvmtrace.sources import Source, WrappedSource
from kvmtrace.sources.guest_memory import HasMemory, Memory


def all_stages(memory: Memory | None = None, proc: str = "/proc", sys: str = "/sys") -> list[Stage]:
    """Return the pipeline: each stage gets the events of those before it.

    ``memory``: what the source can look up of guest memory.
    """
    owners = OwnerLookup(memory, proc)
    return [
        owners,
        MachineChecks(proc),
        SignalPages(owners, proc),
        KernelCountsReader(proc, sys),
        ExistingPoison(owners, proc),
        HungReads(),
        PageReleaseWatch(proc),
        VcpuFollowUp(proc),
        Heartbeat(),
    ]


def in_order(events: list[Event]) -> list[Event]:
    """Sort events by their time, VmSeen first.

    A source reads its rings and its counters one after the other, and may identify a VM late.
    """
    return sorted(events, key=lambda event: (not isinstance(event, VmSeen), event.ts))


class EnrichedSource(WrappedSource):
    """The events of ``inner`` after all stages."""

    def __init__(
        self,
        inner: Source,
        stages: Sequence[Stage] | None = None,
        now: Callable[[], int] = clock.now_ns,
    ) -> None:
        """``stages``: None for all of them. ``now``: ns since the epoch."""
        super().__init__(inner)
        self._now = now
        memory = inner.memory if isinstance(inner, HasMemory) else None
        self._stages = all_stages(memory) if stages is None else stages

    def poll(self, timeout: float) -> list[Event]:
        """Events, as ``Source.poll``. With ``timeout`` 0, stages keep nothing for later."""
        now = self._now()
        for stage in self._stages:
            stage.before_read(now)
        wait = min([timeout, *(stage.max_wait() for stage in self._stages)])
        events = in_order(self.inner.poll(wait))
        # Lookups may take long. If they moved the time on, a loop would seem to have ended.
        now = self._now()
        for stage in self._stages:
            events = stage.process(events, now, last=timeout == 0)
        return events
