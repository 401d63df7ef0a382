"""The eBPF source: compiles and attaches the programs of bpf/, and emits events."""

from __future__ import annotations

import time
from collections.abc import Mapping

from kvmtrace.errors import KvmtraceError
from kvmtrace.events import Event
from kvmtrace.linux import host
from kvmtrace.linux.clock import epoch_offset_ns, now_ns
from kvmtrace.linux.kvm_module import SETTLE_SECONDS, Changing, Settling
from kvmtrace.linux.tracefs import mount
from kvmtrace.probes import ATTACHING_ANEW, Probe, ProbeRuns
from kvmtrace.sources import limits
from kvmtrace.sources.bpf.guest_memory import BpfMemory
from kvmtrace.sources.bpf.programs import Programs
from kvmtrace.sources.bpf.translator import BpfTranslator

# How often to check whether kvm was loaded or unloaded, in seconds.
_WATCH_SECONDS = 1.0


class BpfSource:
    """Events by eBPF. Raises KvmtraceError if bcc, BTF or the kernel's permission is missing."""

    name = "bpf"

    def __init__(self) -> None:
        self.why: str | None = None
        if host.lockdown() == "confidentiality":
            # Programs would still attach, but read nothing: next to no event could be emitted.
            raise KvmtraceError(
                "kernel lockdown (confidentiality) forbids BPF programs to read kernel memory",
                "boot with lockdown=integrity or without; `kvmtrace doctor` shows it",
            )
        self._translator = BpfTranslator(epoch_offset_ns(), mount.memory_failure_names())
        self._programs = _settled_programs()
        self._next_watch = self._next_records = 0.0
        self._settling: Settling | None = None  # no programs are attached meanwhile
        self._closed = False
        self._backlog: list[Event] = []
        self.memory = BpfMemory(self._translator, self._backlog.append)
        self._find_vms()

    def poll(self, timeout: float) -> list[Event]:
        """Events since the last call; ``timeout`` 0 reads all that the kernel has counted."""
        events = self._backlog[:]
        self._backlog.clear()
        if time.monotonic() >= self._next_watch:
            self._next_watch = time.monotonic() + _WATCH_SECONDS
            events += self._watch_kvm()
            events += self._translator.housekeeping()
            events += self._programs.missed(now_ns())
        if self._settling is None:
            self._programs.maps.wait(0 if events else timeout)
            self._gather(0 if events else timeout)
            events += self._drain(last=timeout == 0)
        elif not events:
            time.sleep(max(0.0, min(timeout, self._next_watch - time.monotonic())))
        if timeout == 0:
            events += self._translator.flush_pending_signals()
        return events

    def probes(self) -> tuple[Probe, ...]:
        return self._programs.states

    def probe_runs(self) -> Mapping[str, ProbeRuns]:
        return self._programs.runs()

    def close(self) -> None:
        if not self._closed:
            self._closed = True
            self._programs.close()

    def _find_vms(self) -> None:
        """Put the VMs that exist already into ``_backlog``.

        The kernel's list comes first, because it has their generations. A VM that only /proc shows
        is older than the first event; some were created after these programs were attached.
        """
        self.memory.use(self._programs.lookup, self._programs.maps.generation)
        self._backlog += self._translator.reset()

    def _gather(self, timeout: float) -> None:
        """Wait until the next records may be read: a reading costs more than a record."""
        left = min(timeout, self._next_records - time.monotonic())
        if left > 0:
            time.sleep(left)

    def _drain(self, *, last: bool = False) -> list[Event]:
        maps = self._programs.maps
        records = maps.take()
        if records:
            self._next_records = time.monotonic() + limits.GATHER_SECONDS
        events = self._translator.translate(records, maps)
        if counted := self._translator.counters(maps, at_once=last):
            # Reading the counters takes time. What was recorded meanwhile may come before what was
            # counted (a poison before the exits that it causes), and events of one call are put in
            # order.
            events += counted + self._translator.translate(maps.take(), maps)
        return events

    def _watch_kvm(self) -> list[Event]:
        """Detach when kvm is unloaded, so that it can be; attach anew when it comes or has gone."""
        events: list[Event] = []
        if self._settling is None:
            if not self._programs.outdated():
                return []
            events += self._drain()
            events += self._translator.flush(self._programs.maps)
            self.memory.use(None, lambda _struct: 0)
            self._programs.close(ATTACHING_ANEW)
            self._settling = Settling()
        elif self._settling.is_over():
            try:
                self._programs = Programs(whatever_kvm_is=self._settling.is_given_up)
            except Changing:
                return []
            self._settling = None
            self._find_vms()
            # VmSeen comes before other events of these VMs.
            events += self._backlog
            self._backlog.clear()
        return events


def _settled_programs() -> Programs:
    deadline = time.monotonic() + SETTLE_SECONDS
    while True:
        try:
            return Programs(whatever_kvm_is=time.monotonic() >= deadline)
        except Changing:
            pass
