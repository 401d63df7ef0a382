"""The ftrace source: tracefs dynamic events, no compiler, no headers, no BPF.

One group of events and three instances (fields.RINGS), all named after this process. What the
kernel accepts is asked of the kernel, probe by probe; see ``kvmtrace.ftrace``.
"""

from __future__ import annotations

import atexit
import contextlib
import errno
import heapq
import math
import os
import select
import time
from collections.abc import Mapping

from kvmtrace import clock, host
from kvmtrace.btf import Btf
from kvmtrace.errors import KvmtraceError
from kvmtrace.events import Event, Lost
from kvmtrace.ftrace import dynevents, fields, hist, instance, ringpage
from kvmtrace.ftrace.dynevents import Defined, DynamicEvents
from kvmtrace.ftrace.instance import Instance
from kvmtrace.ftrace.joins import Joiner, Record
from kvmtrace.model import Probe, ProbeRuns
from kvmtrace.probes import ProbeSpec, specs
from kvmtrace.vms import VmTable

COUNT_SECONDS = 1.0  # how often the kernel's counts are read while something is going on
UPKEEP_SECONDS = 1.0  # how often kvm's coming and going, CPUs and missed VMs are looked at
BATCH_SECONDS = 0.05  # how long faults may gather after some were read
SIGNAL_SECONDS = 0.02  # how soon to look for the fault that a signal was sent from
KVM = "/sys/module/kvm"
_NEVER_LOOKED = object()


class FtraceSource:
    """Raises KvmtraceError where this host does not let us trace."""

    name = "ftrace"

    def __init__(self) -> None:
        self.why: str | None = None
        self._root = _tracefs()
        _remove_dead(self._root)
        self._group = instance.own_name()
        self._rings: dict[str, Instance] = {}
        self._formats: dict[int, tuple[str, ringpage.EventFormat]] = {}
        self._probes: dict[str, Probe] = {}
        self._specs = {spec.name: spec for spec in specs()}
        self._offset_ns = clock.epoch_offset_ns()
        self._joiner = Joiner(VmTable(), _tgid_of, host.memory_failure_names(self._root))
        self._events = DynamicEvents(self._root, self._group, _offset)
        self._pending: list[tuple[int, int, Record]] = []
        self._serial = 0
        self._ready: list[Event] = []
        self._filters: dict[str, str] = {}
        self._kvm: object = _NEVER_LOOKED
        self._counts_due = self._upkeep_due = self._storm_until = 0.0
        self._active = False
        self._doubt = 0
        self._closed = False
        try:
            layout = ringpage.PageLayout.parse(_read(f"{self._root}/events/header_page"))
            for ring in fields.RINGS:
                name = f"{self._group}_{ring}"
                self._rings[ring] = Instance(self._root, name, fields.RING_KIB[ring], layout)
            self._ready += self._joiner.vms.scan(time.time_ns())
            self._upkeep()
        except OSError as error:
            self.close()
            raise _explained(error) from error
        except BaseException:
            self.close()
            raise
        atexit.register(self.close)

    # -- the Source protocol

    def poll(self, timeout: float) -> list[Event]:
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
        return tuple(self._probes[name] for name in self._specs if name in self._probes)

    def probe_runs(self) -> Mapping[str, ProbeRuns]:
        """Nothing: the kernel does not time these probes."""
        return {}

    def close(self) -> None:
        """Remove everything of ours from tracefs."""
        if self._closed:
            return
        self._closed = True
        atexit.unregister(self.close)
        for ring in self._rings.values():
            ring.close()
        _remove_events(self._events)

    # -- attaching

    def _upkeep(self) -> None:
        """Attach what is missing and can be had now; notice kvm's coming and going, and CPUs."""
        self._upkeep_due = time.monotonic() + UPKEEP_SECONDS
        kvm = _kvm_now()
        if kvm != self._kvm:
            self._kvm = kvm
            self._detach()
            self._attach()
        for ring in self._rings.values():
            ring.open_cpus()
        self._ready += self._joiner.vms.missed(time.time_ns())

    def _attach(self) -> None:
        for ring, probes in fields.RINGS.items():
            for name in probes:
                if name == "slot":
                    spec = ProbeSpec("slot", (fields.SLOT_TARGET,), "entry", "")
                elif name in self._specs:
                    spec = self._specs[name]
                else:
                    continue
                known = self._probes.get(name)
                if known is None or not known.attached:
                    self._probes[name] = self._attach_one(self._rings[ring], spec)
        self._joiner.watches_gmem = self._probes["gmem"].attached

    def _attach_one(self, ring: Instance, spec: ProbeSpec) -> Probe:
        if spec.is_tracepoint:
            return self._attach_tracepoint(ring, spec)
        if self._kvm is None and any("kvm" in target for target in spec.targets):
            return Probe(spec.name, False, None, None, "kvm is not loaded")
        why: list[str] = []
        wanted = fields.FIELDS.get(f"{spec.name}/{os.uname().machine}", fields.FIELDS[spec.name])
        for target in spec.targets:
            outcome = self._events.define(spec.name, target, spec.at, wanted)
            if isinstance(outcome, Defined):
                try:
                    self._enable(ring, outcome)
                except OSError as error:
                    why.append(f"{target}: {error.strerror}")
                    self._events.remove(spec.name)
                    continue
                without = ", ".join(f"{name} ({said})" for name, said in outcome.missing)
                return Probe(
                    spec.name, True, target, outcome.way, f"without {without}" if without else None
                )
            why.append(outcome.why)
        return Probe(spec.name, False, None, None, "; ".join(why))

    def _enable(self, ring: Instance, event: Defined) -> None:
        path = f"events/{self._group}/{event.name}"
        condition = fields.FILTERS.get(event.name)
        if event.name == "faultin" and "pfn" not in event.fields:
            condition = fields.FILTERS["faultin/lean"]
        if condition:
            ring.write(f"{path}/filter", condition)
            self._filters[event.name] = condition
        if event.name == "run":
            for trigger in hist.triggers(event.fields).values():
                with contextlib.suppress(OSError):  # no CONFIG_HIST_TRIGGERS: events must do
                    ring.append(f"{path}/trigger", trigger)
        self._learn_format(event.name, ring.read(f"{path}/format"))
        ring.write(f"{path}/enable", "1")

    def _attach_tracepoint(self, ring: Instance, spec: ProbeSpec) -> Probe:
        target = spec.targets[0]
        path = f"events/{target.replace(':', '/')}"
        text = ring.read(f"{path}/format")
        if not text:
            return Probe(spec.name, False, None, None, f"this kernel has no {target}")
        try:
            self._learn_format(spec.name, text)
            ring.write(f"{path}/enable", "1")
        except (OSError, ValueError) as error:
            return Probe(spec.name, False, None, None, str(error))
        return Probe(spec.name, True, target, "tracepoint")

    def _learn_format(self, probe: str, text: str) -> None:
        known = ringpage.EventFormat(text)
        self._formats[known.id] = (probe, known)

    def _detach(self) -> None:
        """Remove the events on functions: those of a kvm that is gone, or that came back."""
        self._drain()
        for name in self._events.names():
            for ring in self._rings.values():
                with contextlib.suppress(OSError):
                    ring.write(f"events/{self._group}/{name}/enable", "0")
            for ring in self._rings.values():
                with contextlib.suppress(OSError):
                    for trigger in ring.read(f"events/{self._group}/{name}/trigger").splitlines():
                        spec = trigger.partition(" [")[0]
                        ring.append(f"events/{self._group}/{name}/trigger", f"!{spec}")
        _remove_events(self._events)
        for name, probe in list(self._probes.items()):
            if probe.via != "tracepoint":
                del self._probes[name]
        self._joiner.tally = hist.Tally()

    # -- reading

    def _next_counts(self) -> float:
        return self._counts_due if self._active else math.inf

    def _wait(self, end: float) -> None:
        """Wait until there is something to read, at most until ``end`` (monotonic seconds)."""
        now = time.monotonic()
        if self._pending:
            end = now
        if self._joiner.waiting:
            end = min(end, now + SIGNAL_SECONDS)
        if self._storm_until > now:
            # Faults that come thick and fast are read in batches; all else still wakes us.
            if not self._poll(("poison", "signals"), min(end, self._storm_until) - now):
                now = time.monotonic()
                if now < end and now >= self._storm_until:
                    self._poll(tuple(self._rings), end - now)
        else:
            self._poll(tuple(self._rings), end - now)

    def _poll(self, rings: tuple[str, ...], seconds: float) -> bool:
        poller = select.poll()
        for name in rings:
            for fd in self._rings[name].fds():
                poller.register(fd, select.POLLIN | select.POLLPRI)
        return bool(poller.poll(math.ceil(max(0.0, seconds) * 1000)))

    def _drain(self) -> tuple[int, bool]:
        """Read all rings into ``_pending``: (records of faults, whether a ring was nearly full)."""
        faults = 0
        nearly_full = False
        for name, ring in self._rings.items():
            pages = 0
            for page in ring.drain():
                pages += 1
                for ts, entry in ringpage.entries(page, ring.layout):
                    known = self._formats.get(ringpage.event_id(entry))
                    if known is None:
                        continue
                    self._serial += 1
                    record = Record(ts + self._offset_ns, known[0], known[1].decode(entry))
                    heapq.heappush(self._pending, (ts, self._serial, record))
                    faults += name == "faults"
            nearly_full |= pages * ring.layout.size >= ring.capacity // 2
        return faults, nearly_full

    def _collect(self) -> list[Event]:
        """Everything up to now, in order over all CPUs and rings."""
        now = time.monotonic()
        # Read before the events: what it counts has its event in a ring, unless that was full.
        totals = self._totals() if self._active and now >= self._counts_due else None
        until = time.monotonic_ns()
        ts = until + self._offset_ns
        faults, nearly_full = self._drain()
        if faults:
            self._storm_until = now + BATCH_SECONDS
        events = self._dropped(ts) if nearly_full or totals is not None else []
        records = []
        # What another CPU said meanwhile may be older than what was read last: it waits.
        while self._pending and self._pending[0][0] <= until:
            records.append(heapq.heappop(self._pending)[2])
        events += self._joiner.batch(
            records, ts, totals=totals, read_totals=self._totals, doubtful=self._doubt > 0
        )
        self._doubt = max(0, self._doubt - 1)
        if totals is not None:
            self._counts_due = now + COUNT_SECONDS
            self._active = False
            lost = self._joiner.tally.lost(totals)
            if lost:
                events.append(Lost(ts, "exit_counts", lost))
        if faults or self._doubt or self._joiner.storms:
            self._active = True
        if self._joiner.storms.changed:
            self._mute()
        return events

    def _mute(self) -> None:
        self._joiner.storms.changed = False
        for name, excluded in self._joiner.storms.conditions().items():
            if name in self._filters:
                path = f"events/{self._group}/{name}/filter"
                with contextlib.suppress(OSError):
                    self._rings["faults"].write(path, f"({self._filters[name]}){excluded}")

    def _totals(self) -> hist.Totals:
        return hist.parse(self._rings["faults"].read(f"events/{self._group}/run/hist"))

    def _dropped(self, ts: int) -> list[Event]:
        events: list[Event] = []
        for name, ring in self._rings.items():
            dropped = ring.dropped()
            if dropped and name == "faults":
                # Their count is exact all the same; only joins made of them are in doubt.
                self._doubt = 2
            elif dropped:
                events.append(Lost(ts, f"ftrace_{name}", dropped))
        return events


# -- this host


def _tracefs() -> str:
    if os.geteuid() != 0 and not host.privilege().may_trace:
        raise KvmtraceError("tracing the kernel needs root", "run it with sudo")
    found = host.tracing()
    if found is None:
        raise KvmtraceError(
            "tracefs is not mounted", "mount -t tracefs tracefs /sys/kernel/tracing"
        )
    if not found.readable or not os.access(f"{found.path}/instances", os.W_OK):
        mode = host.lockdown()
        if mode not in (None, "none"):
            raise KvmtraceError(
                f"kernel lockdown ({mode}) forbids tracing",
                "boot without lockdown=, or with Secure Boot off",
            )
        raise KvmtraceError(f"{found.path} cannot be written", "run it with sudo")
    if not found.dynamic_events:
        raise KvmtraceError(
            "this kernel has no dynamic events",
            "a kernel built with CONFIG_KPROBE_EVENTS or CONFIG_FPROBE_EVENTS has them",
        )
    return found.path


def _explained(error: OSError) -> KvmtraceError:
    mode = host.lockdown()
    if error.errno in (errno.EPERM, errno.EACCES) and mode not in (None, "none"):
        return KvmtraceError(
            f"kernel lockdown ({mode}) forbids tracing",
            "boot without lockdown=, or with Secure Boot off",
        )
    return KvmtraceError(
        f"tracefs refused: {error.strerror} ({error.filename or 'control file'})",
        "`kvmtrace doctor` shows what is missing",
    )


def _remove_dead(root: str) -> None:
    """Remove what kvmtrace processes that are no more (kill -9) left in tracefs."""
    with contextlib.suppress(OSError):
        for name in os.listdir(f"{root}/instances"):
            if instance.is_dead(name):
                instance.remove(f"{root}/instances/{name}")
    for group in dynevents.groups(root):
        if instance.is_dead(group):
            _remove_events(DynamicEvents(root, group))


def _remove_events(events: DynamicEvents, seconds: float = 1.0) -> None:
    """Remove all events of a group; tries again for a while, since instances go in the end."""
    end = time.monotonic() + seconds
    while any(not removed for removed in [events.remove(name) for name in events.names()]):
        if time.monotonic() >= end:
            return
        time.sleep(0.02)


def _kvm_now() -> object:
    """Something that changes when kvm is loaded, unloaded or loaded again; None without it."""
    try:
        there = os.stat(KVM)
    except OSError:
        return None
    state = _read(f"{KVM}/initstate").strip()
    if state in ("", "live"):  # "": built in
        return there.st_ino
    return None


def _tgid_of(tid: int) -> int | None:
    for line in _read(f"/proc/{tid}/status").splitlines():
        if line.startswith("Tgid:"):
            return int(line.split()[1])
    return None


def _offset(struct: str, member: str) -> int | None:
    try:
        btf = Btf()
    except KvmtraceError:
        return None
    try:
        return btf.offset(struct, member)
    finally:
        btf.close()


def _read(path: str) -> str:
    try:
        with open(path, encoding="utf-8", errors="replace") as file:
            return file.read()
    except OSError:
        return ""
