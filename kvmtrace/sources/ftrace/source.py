"""The ftrace source: tracefs dynamic events; no compiler, no headers, no BPF.

It has one group of events and three instances (attach.RINGS), all named after this process. See
``kvmtrace.sources.ftrace`` for its parts.
"""

from __future__ import annotations

import atexit
import heapq
import math
import select
import time
from collections.abc import Mapping

from kvmtrace.errors import KvmtraceError
from kvmtrace.events import Event, Lost
from kvmtrace.linux import clock, kvm_module
from kvmtrace.linux.read import read_text
from kvmtrace.linux.tracefs import instance, mount, ring_page
from kvmtrace.linux.tracefs.instance import Instance
from kvmtrace.linux.tracefs.missed import Missed
from kvmtrace.probes import Probe, ProbeRuns
from kvmtrace.sources import limits
from kvmtrace.sources.ftrace import attach, preflight
from kvmtrace.sources.ftrace.attach import Attacher
from kvmtrace.sources.ftrace.guest_memory import FtraceMemory
from kvmtrace.sources.ftrace.records import Record
from kvmtrace.sources.ftrace.translator import FtraceTranslator
from kvmtrace.sources.ftrace.vms import VmResolver, tgid_of
from kvmtrace.sources.vm_table import VmTable

_NOT_CHECKED = -1


class FtraceSource:
    """Events by ftrace. Raises KvmtraceError where this host does not let us trace."""

    name = "ftrace"

    def __init__(self) -> None:
        self.why: str | None = None
        self._closed = False
        self._rings: dict[str, Instance] = {}
        self._pending: list[tuple[int, int, Record]] = []
        self._serial = 0
        self._ready: list[Event] = []
        self._kvm: int | None = _NOT_CHECKED
        self._counts_due = self._upkeep_due = self._scan_due = self._batch_until = 0.0
        self._active = False  # something may have been counted since the counts were read
        self._doubtful_batches = 0  # in which a join may lack a record that was dropped
        self._signals_dropped = False  # in this batch
        self._damaged = 0  # entries shorter than their format, not yet reported
        self._offset_ns = clock.epoch_offset_ns()
        root = preflight.tracefs()
        attach.remove_dead(root)
        group = instance.own_name()
        names = mount.memory_failure_names(root)
        self._translator = FtraceTranslator(VmResolver(VmTable(), tgid_of), names)
        self.memory = FtraceMemory(self._translator.vms, self._translator.poisons.memory)
        self._attacher = Attacher(root, group, self._rings)
        self._missed = Missed(root, group)
        try:
            layout = ring_page.PageLayout.parse(read_text(f"{root}/events/header_page"))
            for ring, kib in limits.RING_KIB.items():
                self._rings[ring] = Instance(root, f"{group}_{ring}", kib, layout)
            self._ready += self._translator.vms.table.scan(clock.now_ns())
            self._scan_due = time.monotonic() + limits.SCAN_SECONDS
            self._upkeep()
        except OSError as error:
            self.close()
            raise preflight.to_kvmtrace_error(error) from error
        except ValueError as error:
            self.close()
            raise KvmtraceError(f"this kernel's rings cannot be read: {error}") from error
        except BaseException:
            self.close()
            raise
        atexit.register(self.close)

    # -- the Source protocol

    def poll(self, timeout: float) -> list[Event]:
        """Return events since the last call, in order of time over all CPUs.

        ``timeout`` 0: read all that the kernel has counted, and hold nothing back.
        """
        if timeout <= 0 and not self._closed:
            events, self._ready = self._ready, []
            return events + self._collect(last=True)
        end = time.monotonic() + timeout
        while not self._closed:
            if time.monotonic() >= self._upkeep_due:
                self._upkeep()
            if not self._ready:
                self._wait(min(end, self._upkeep_due, self._next_counts()))
            events, self._ready = self._ready, []
            events += self._collect()
            if events or time.monotonic() >= end:
                return events
        return []

    def probes(self) -> tuple[Probe, ...]:
        return self._attacher.probes()

    def probe_runs(self) -> Mapping[str, ProbeRuns]:
        """Return nothing: the kernel does not time these probes."""
        return {}

    def close(self) -> None:
        """Remove everything of ours from tracefs."""
        if self._closed:
            return
        self._closed = True
        atexit.unregister(self.close)
        for ring in self._rings.values():
            ring.close()
        self._attacher.close()

    # -- upkeep

    def _upkeep(self) -> None:
        """Attach what can be attached now; find new CPUs, a new kvm, and VMs that ended."""
        kvm = kvm_module.load_number()
        if kvm != self._kvm:
            self._kvm = kvm
            # kvm was loaded or unloaded: events on its functions, and their counts, end here.
            self._ready += self._collect(last=True)
            self._attacher.detach()
            self._attacher.attach(kvm is not None)
            self._translator.begin(
                watches_gmem=self._attacher.attached("gmem"),
                counts_exits=self._attacher.counted(*attach.COUNTED["faults"]),
                counts_signals=self._attacher.counted(*attach.COUNTED["signals"]),
            )
        for ring in self._rings.values():
            ring.open_cpus()
        vms = self._translator.vms.table
        if not self._attacher.attached("vm_new") and time.monotonic() >= self._scan_due:
            self._ready += vms.scan(clock.now_ns())
            self._scan_due = time.monotonic() + limits.SCAN_SECONDS
        self._ready += vms.reap(clock.now_ns())
        if missed := self._missed.newly_missed():
            self._ready.append(Lost(clock.now_ns(), "ftrace_missed", missed))
        self._upkeep_due = time.monotonic() + limits.UPKEEP_SECONDS

    # -- waiting

    def _next_counts(self) -> float:
        return self._counts_due if self._active else math.inf

    def _wait(self, end: float) -> None:
        """Wait until there is something to read, at most until ``end`` (monotonic seconds)."""
        now = time.monotonic()
        if self._pending:
            return
        if self._translator.signals.any_waiting:
            end = min(end, now + limits.SIGNAL_SECONDS)
        if self._batch_until > now:
            # Faults in quick succession are read in batches; anything else wakes us at once.
            if self._poll(("poison", "signals"), min(end, self._batch_until) - now):
                return
            now = time.monotonic()
        if now < end:
            self._poll(tuple(self._rings), end - now)

    def _poll(self, rings: tuple[str, ...], seconds: float) -> bool:
        poller = select.poll()
        for name in rings:
            for fd in self._rings[name].fds():
                poller.register(fd, select.POLLIN | select.POLLPRI)
        return bool(poller.poll(math.ceil(max(0.0, seconds) * 1000)))

    # -- reading

    def _collect(self, *, last: bool = False) -> list[Event]:
        """Read everything up to now. ``last``: hold nothing back for records still to come."""
        now = time.monotonic()
        # Read before the rings: what is counted here has its event there, unless a ring was full.
        totals = None
        if self._active and (last or now >= self._counts_due):
            totals = self._attacher.totals()
            self._counts_due = now + limits.COUNT_SECONDS
            self._active = False
        until = time.monotonic_ns()
        faults, nearly_full = self._drain()
        if last:
            until = time.monotonic_ns()
        ts = until + self._offset_ns
        if faults:
            self._batch_until = now + limits.BATCH_SECONDS
        events = self._dropped(ts) if nearly_full or totals is not None else []
        if self._damaged:
            events.append(Lost(ts, "ftrace_damaged", self._damaged))
            self._damaged = 0
        records = []
        # Later records wait: another CPU's older records may not have been read yet.
        while self._pending and self._pending[0][0] <= until:
            records.append(heapq.heappop(self._pending)[2])
        events += self._translator.batch(
            records,
            ts,
            totals=totals,
            read_totals=self._attacher.totals,
            faults_dropped=self._doubtful_batches > 0,
            signals_dropped=self._signals_dropped,
            last=last,
        )
        self._doubtful_batches = max(0, self._doubtful_batches - 1)
        self._signals_dropped = False
        self._active |= self._doubtful_batches > 0 or self._translator.counts_pending
        if (exclusions := self._translator.filter_exclusions()) is not None:
            taken = self._attacher.mute(exclusions)
            if taken is None:
                self._translator.exclusions_not_written()
            elif not taken:
                self._translator.exclusions_refused()
        return events

    def _drain(self) -> tuple[int, bool]:
        """Read all rings into ``_pending``: (records of faults, whether one was nearly full)."""
        faults = 0
        nearly_full = False
        formats = self._attacher.formats
        for name, ring in self._rings.items():
            pages = 0
            for page in ring.drain():
                pages += 1
                for ts, entry in ring_page.entries(page, ring.layout):
                    known = formats.get(ring_page.event_id(entry))
                    if known is None:
                        continue
                    self._serial += 1
                    try:
                        record = Record(ts + self._offset_ns, known[0], known[1].decode(entry))
                    except ValueError:
                        self._damaged += 1
                        continue
                    heapq.heappush(self._pending, (ts, self._serial, record))
                    faults += name == "faults"
            self._active |= pages > 0 and name != "poison"
            nearly_full |= pages * ring.layout.size >= ring.capacity // 2
        return faults, nearly_full

    def _dropped(self, ts: int) -> list[Event]:
        events: list[Event] = []
        for name, ring in self._rings.items():
            dropped = ring.dropped()
            if dropped and name == "faults":
                # Joins may lack a record, in this batch and in the next, which began meanwhile.
                self._doubtful_batches = 2
            self._signals_dropped |= dropped > 0 and name == "signals"
            # Exits and signals that are counted are not lost.
            counted = attach.COUNTED.get(name)
            if dropped and not (counted and self._attacher.counted(*counted)):
                events.append(Lost(ts, f"ftrace_{name}", dropped))
        return events
