"""Attach the probes: each to its target and ring, with the fields that this kernel accepts."""

from __future__ import annotations

import contextlib
import errno
import functools
import os
import time
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import replace

from kvmtrace.errors import KvmtraceError
from kvmtrace.linux import kallsyms
from kvmtrace.linux.btf import Btf
from kvmtrace.linux.tracefs import dynamic_events, instance
from kvmtrace.linux.tracefs.dynamic_events import Defined, DynamicEvents
from kvmtrace.linux.tracefs.histogram import Block, HistogramReader
from kvmtrace.linux.tracefs.instance import Instance
from kvmtrace.linux.tracefs.ring_page import EventFormat
from kvmtrace.probes import NO_KVM, RUN_UNDER_WAY, Probe, ProbeSpec, context_specs, specs
from kvmtrace.sources import limits
from kvmtrace.sources.ftrace import exits, hardware, memslots, poison, refusals, signals, vms
from kvmtrace.sources.ftrace.fields import Sift
from kvmtrace.sources.ftrace.totals import KernelTotals

# In the order in which they are attached.
PROBES = (
    poison.PROBES
    | hardware.PROBES
    | vms.PROBES
    | memslots.PROBES
    | signals.PROBES
    | refusals.PROBES
    | exits.PROBES
)
# Several rings, so that many events of one kind cannot crowd out rare ones of another.
RINGS = {
    ring: tuple(name for name, request in PROBES.items() if request.ring == ring)
    for ring in limits.RING_KIB
}
# Probes of a ring that have to be counted (by hist triggers); then a full ring loses nothing.
COUNTED = {"signals": ("sigbus", "sigbus_forced"), "faults": ("run", "vncr")}

# The kernel's reasons to refuse a probe (kernel/trace/trace_probe.h), in plain words.
_MEANING = (
    ("No BTF entry", "the kernel's BTF does not have this function"),
    ("BTF is not available", "this kernel's probes take no arguments by name (6.6 does)"),
    ("Invalid fetch argument", "this kernel's probes take no arguments by name (6.6 does)"),
    ("No BTF argument", "this kernel's function lacks an argument that is needed"),
    ("Invalid argument number", "this kernel's function lacks an argument that is needed"),
    ("field is not found", "this kernel's types lack a member that is needed"),
    ("none of its alternatives fits", "this kernel's types lack a member that is needed"),
    ("Failed to register", "the kernel does not let this function be traced"),
    ("Invalid probed address", "the kernel does not let this function be traced"),
    ("Invalid argument", "this kernel has no probes of this kind"),
)


class Attacher:
    """The probes in tracefs ``root``, as events of one ``group``. ``rings``: by name (RINGS)."""

    def __init__(self, root: str, group: str, rings: Mapping[str, Instance]) -> None:
        self.formats: dict[int, tuple[str, EventFormat]] = {}
        """{event ID: (probe, format)}"""
        self._group = group
        self._rings = rings
        self._events = DynamicEvents(root, group, self._offset)
        self._types: Btf | None = None  # read when the first offset is asked for
        self._specs = {spec.name: spec for spec in specs() + context_specs()}
        self._specs |= {spec.name: spec for spec in (memslots.SLOT, RUN_UNDER_WAY)}
        self._helpers = {memslots.SLOT.name, RUN_UNDER_WAY.name}
        self._optional = {*self._helpers, *(spec.name for spec in context_specs())}
        self._probes: dict[str, Probe] = {}
        self._filters: dict[str, tuple[str, str]] = {}  # path and condition
        self._counted: set[str] = set()
        # The targets that this kernel has; read when the first probe is refused.
        self._functions: set[str] | None = None
        self._counts = HistogramReader()

    def probes(self) -> tuple[Probe, ...]:
        """The state of every probe, in the order of probes.specs.

        Optional probes are left out if the kernel has none of their targets.
        """
        found = (self._probes[name] for name in self._specs if name in self._probes)
        return tuple(
            probe
            for probe in found
            if probe.name not in self._optional
            or (probe.target is not None and probe.name not in self._helpers)
        )

    def attached(self, name: str) -> bool:
        """Whether one probe is attached."""
        return name in self._probes and self._probes[name].attached

    def counted(self, *names: str) -> bool:
        """Whether the kernel counts the hits of those of these probes that are attached."""
        return all(name in self._counted for name in names if self.attached(name))

    def attach(self, has_kvm: bool) -> None:
        """Attach the probes that are not attached yet."""
        self._functions = self._types = None
        for ring, names in RINGS.items():
            for name in names:
                if name in self._specs and not self.attached(name):
                    self._probes[name] = self._one(self._rings[ring], self._specs[name], has_kvm)

    def detach(self) -> None:
        """Remove all events on functions. Tracepoints stay, except kvm's, which go with kvm."""
        for name in self._events.names():
            path = f"events/{self._group}/{name}"
            for ring in self._rings.values():
                with contextlib.suppress(OSError):
                    ring.write(f"{path}/enable", "0")
                    for trigger in ring.read(f"{path}/trigger").splitlines():
                        if trigger.startswith("hist:"):
                            ring.append(f"{path}/trigger", f"!{trigger.partition(' [')[0]}")
        remove_events(self._events)
        self._filters.clear()
        self._counted.clear()
        for name, probe in list(self._probes.items()):
            if probe.via != "tracepoint" or (probe.target or "").startswith("kvm:"):
                del self._probes[name]

    def mute(self, excluded: Mapping[str, str]) -> bool | None:
        """Keep some events out of the ring. ``excluded``: {event: what to add to its filter}.

        False: the kernel refused a filter, and none of these events is kept out. None: writing
        failed for another reason (no file descriptors left, for instance), and some may be kept
        out; try again.
        """
        filters = {name: self._filters[name] for name in excluded if name in self._filters}
        try:
            for name, (path, ordinary) in filters.items():
                self._ring_of(name).write(path, f"({ordinary}){excluded[name]}")
        except OSError as error:
            if error.errno not in (errno.EINVAL, errno.E2BIG):
                return None
        else:
            return True
        try:
            for name, (path, ordinary) in filters.items():  # accepted before
                self._ring_of(name).write(path, ordinary)
        except OSError:
            return None
        return False

    def totals(self) -> KernelTotals:
        """Read the kernel's counts."""
        totals = KernelTotals()
        gmem = self._counted & {"gmem"}
        # Refusals before the exits that they lead to: an exit that is counted meanwhile is not
        # missing. Failures after theirs: see KernelTotals.gmem_never_failed.
        for name in gmem:
            totals.add(name, (block for block in self._blocks(name) if ",ret" not in block.keys))
        for name in self._counted - gmem:
            totals.add(name, self._blocks(name))
        for name in gmem:
            totals.add(name, (block for block in self._blocks(name) if ",ret" in block.keys))
        return totals

    def _blocks(self, name: str) -> Iterable[Block]:
        ring, path = self._ring_of(name), f"events/{self._group}/{name}/hist"
        return self._counts.read(name, functools.partial(ring.read, path))

    def _ring_of(self, name: str) -> Instance:
        return next(self._rings[ring] for ring, names in RINGS.items() if name in names)

    def close(self) -> None:
        """Remove all events; the instances that use them must be gone."""
        remove_events(self._events)

    def _offset(self, struct: str, member: str) -> int | None:
        try:
            self._types = self._types or Btf()
        except KvmtraceError:
            return None
        return self._types.offset(struct, member)

    # -- one probe

    def _one(self, ring: Instance, spec: ProbeSpec, has_kvm: bool) -> Probe:
        if spec.is_tracepoint:
            return self._tracepoint(ring, spec)
        if not has_kvm and any("kvm" in target for target in spec.targets):
            return Probe(spec.name, False, why=NO_KVM)
        request = PROBES[spec.name]
        fields = request.fields_on(os.uname().machine)
        attempts = [(target, spec.at, fields) for target in spec.targets]
        if request.at_entry:
            attempts += [(target, "entry", request.at_entry) for target in spec.targets]
        refused: list[tuple[str, str]] = []
        if request.sift is not None:
            sifted = self._sifted(ring, spec, request.sift)
            if sifted is not None:
                return sifted
        for target, at, wanted in attempts:
            outcome = self._events.define(spec.name, target, at, wanted)
            if not isinstance(outcome, Defined):
                refused.append((target, outcome.why))
                continue
            try:
                self._enable(ring, outcome)
            except (OSError, ValueError) as error:
                refused.append((target, f"{target}: {error}"))
                self._events.remove(spec.name)
                continue
            return _attached(outcome)
        return self._not_attached(spec, refused)

    def _sifted(self, ring: Instance, spec: ProbeSpec, sift: Sift) -> Probe | None:
        """Attach a probe by two events; None where this kernel has no such events."""
        for target in spec.targets:
            base = self._events.define(f"every_{spec.name}", target, spec.at, sift.every)
            if not isinstance(base, Defined):
                continue
            condition = next(text for field, text in sift.conditions if field in base.fields)
            fields = sift.fields_on(os.uname().machine, base.fields)
            made = self._events.define_from(spec.name, base.name, condition, fields)
            if isinstance(made, Defined):
                try:
                    self._enable(ring, made)
                except (OSError, ValueError):
                    self._events.remove(spec.name)
                else:
                    return _attached(replace(made, target=target, probe_type=base.probe_type))
            self._events.remove(base.name)
        return None

    def _not_attached(self, spec: ProbeSpec, refused: Sequence[tuple[str, str]]) -> Probe:
        """Give the reason. ``refused``: (target, kernel's reason) in order, absent ones too."""
        detail = "; ".join(reason for _, reason in refused)
        if self._functions is None:
            functions = (x for one in self._specs.values() for x in one.targets if ":" not in x)
            symbols = kallsyms.symbols(functions)
            self._functions = set(spec.targets) if symbols is None else set(symbols.modules)
        here = [one for one in refused if one[0] in self._functions]
        if not here:
            return Probe(spec.name, False, why=spec.absent, detail=detail)
        target, reason = here[0]
        meanings = (why for words, why in _MEANING if words in reason)
        why = next(meanings, "the kernel refuses the probe")
        return Probe(spec.name, False, target, why=why, detail=detail)

    def _enable(self, ring: Instance, event: Defined) -> None:
        path = f"events/{self._group}/{event.name}"
        self._filter(ring, event.name, path, event.fields)
        triggers = PROBES[event.name].triggers(event.fields)
        with contextlib.suppress(OSError):  # no CONFIG_HIST_TRIGGERS: by events only
            for trigger in triggers:
                ring.append(f"{path}/trigger", trigger)
            if triggers:
                self._counted.add(event.name)
        self._add_format(event.name, ring.read(f"{path}/format"))
        ring.write(f"{path}/enable", "1")

    def _tracepoint(self, ring: Instance, spec: ProbeSpec) -> Probe:
        formats = (
            (target, path, ring.read(f"{path}/format"))
            for target in spec.targets
            for path in [f"events/{target.replace(':', '/')}"]
        )
        target, path, text = next((one for one in formats if one[2]), ("", "", ""))
        if not text:
            return Probe(spec.name, False, why=spec.absent)
        try:
            self._add_format(spec.name, text)
            self._filter(ring, spec.name, path, ("errno",))
            ring.write(f"{path}/enable", "1")
        except (OSError, ValueError) as error:
            why = "the kernel does not let this tracepoint be used"
            return Probe(spec.name, False, target, why=why, detail=str(error))
        return Probe(spec.name, True, target, "tracepoint")

    def _filter(self, ring: Instance, name: str, path: str, known: Collection[str]) -> None:
        conditions = PROBES[name].filters
        condition = next((text for field, text in conditions if field in known), None)
        if condition:
            ring.write(f"{path}/filter", condition)
            self._filters[name] = f"{path}/filter", condition

    def _add_format(self, probe: str, text: str) -> None:
        known = EventFormat(text)
        self.formats[known.id] = (probe, known)


def _attached(event: Defined) -> Probe:
    without = ", ".join(name for name, _ in event.missing)
    return Probe(
        event.name,
        True,
        event.target,
        event.probe_type,
        f"without {without}" if without else None,
        "; ".join(f"{name}: {reason}" for name, reason in event.missing) or None,
    )


def remove_dead(root: str) -> None:
    """Remove what kvmtrace processes that were killed (kill -9) left in tracefs; nothing else."""
    with contextlib.suppress(OSError):
        for name in os.listdir(f"{root}/instances"):
            if instance.is_dead(name):
                instance.remove(f"{root}/instances/{name}")
    for group in dynamic_events.groups(root):
        if instance.is_dead(group):
            remove_events(DynamicEvents(root, group))


def remove_events(events: DynamicEvents) -> None:
    """Remove all events of a group; try again for a second, as instances may still use them."""
    end = time.monotonic() + 1.0
    while True:
        removed = [events.remove(name) for name in events.names()]
        if all(removed) or time.monotonic() >= end:
            return
        time.sleep(0.02)
