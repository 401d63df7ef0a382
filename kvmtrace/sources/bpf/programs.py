"""The eBPF programs: made for the running kernel, attached, detached.

Kernel structs are reached by offsets from BTF, which are passed to the compiler as macros
(``layout``; bpf/common.c lists them). What was compiled once is kept (``program_cache``).
"""

from __future__ import annotations

import contextlib
import errno
import re
import time
from collections.abc import Callable
from dataclasses import dataclass, replace

from kvmtrace import probes, sources
from kvmtrace.errors import KvmtraceError
from kvmtrace.events import Event, Lost
from kvmtrace.linux import host, kvm_module
from kvmtrace.linux.btf import FunctionType
from kvmtrace.probes import Probe, ProbeRuns
from kvmtrace.sources import limits
from kvmtrace.sources.bpf import attach_errors
from kvmtrace.sources.bpf.attach_errors import AttachFailure
from kvmtrace.sources.bpf.compiler import (
    CompiledProgram,
    CompiledPrograms,
    bcc_version,
    compiled,
    fingerprint,
)
from kvmtrace.sources.bpf.layout import OFFSETS, Layout
from kvmtrace.sources.bpf.loader import Loader
from kvmtrace.sources.bpf.lookup import KernelLookup
from kvmtrace.sources.bpf.maps import Maps
from kvmtrace.sources.bpf.program_cache import ProgramCache
from kvmtrace.sources.bpf.run_probe import RunProbe


def _fdinfo(descriptor: int) -> dict[str, int]:
    """The kernel's counts of one of our programs (kernel/bpf/syscall.c, bpf_prog_show_fdinfo)."""
    with contextlib.suppress(OSError), open(f"/proc/self/fdinfo/{descriptor}") as info:
        return counts_in(info.read())
    return {}


def counts_in(fdinfo: str) -> dict[str, int]:
    """The fields that are numbers."""
    return {name: int(value) for name, value in _FIELD.findall(fdinfo)}


_FIELD = re.compile(r"^(\w+):[ \t]*([0-9]{1,20})[ \t]*$", re.MULTILINE)


_LOAD_SECONDS = 2.0  # a signal has to end the process within five

# Exits without an errno: `run`, which comes before them, sees these as well.
_IN_RUN = ("arm_sea", "vncr")


class Programs:
    """One loaded and attached set of programs, for the kvm module that is loaded now.

    ``states``: every probe, attached or not. ``maps``: counters and records. ``lookup``: what looks
    up VMs and pages. ``run``: what all exits run. Raises KvmtraceError if nothing can be attached,
    and ``kvm_module.Changing`` if kvm is being loaded or unloaded, unless ``whatever_kvm_is``.
    """

    def __init__(self, *, whatever_kvm_is: bool = False) -> None:
        self._kvm: tuple[str, ...] = ()
        self._attached: dict[str, list[int]] = {}  # descriptors of programs, by probe
        self._missed: dict[str, int] = {}  # by probe
        self._copies: dict[str, int] = {}  # by probe, where there are several
        cache = ProgramCache()
        # What is read while kvm is being loaded belongs to neither state: its functions are there
        # before it counts as loaded.
        deadline = time.monotonic() + _LOAD_SECONDS
        while True:
            self._kvm = kvm_module.loaded()
            self._layout = _layout(cache)
            is_changing = kvm_module.is_changing(self._layout.modules())
            if self._kvm == kvm_module.loaded() and not is_changing:
                break
            if time.monotonic() >= deadline:
                if not whatever_kvm_is:
                    raise kvm_module.Changing
                break  # ``outdated`` notices what comes of it
            time.sleep(0.1)
        self._cache: ProgramCache | None = cache
        programs = _compiled(self._layout, cache)
        if cache.trouble and cache.path:
            sources.note(f"the cache of eBPF programs: {cache.trouble}")
        try:
            self._loader = Loader(programs, self._layout.addresses())
            self.run = RunProbe(self._loader, skips_raw=self._layout.skips_raw_tracepoints)
            self.maps = Maps(self._loader.maps, self.run.guard)
        except PermissionError as error:
            raise KvmtraceError(
                "the kernel does not permit BPF",
                "a missing capability or this host's policy: see `kvmtrace doctor`",
                str(error),
            ) from error
        self._attached["run"] = self.run.programs
        states = [self._attach(spec) for spec in self._layout.specs]
        if any(state.attached and state.name == "gmem" for state in states):
            self.maps.set_gmem_watched()
        # A context probe is optional: it is listed only where this kernel has its target.
        expected = {spec.name for spec in probes.specs()}
        context = {spec.name for spec in probes.context_specs()}
        self.states = tuple(
            state
            for state in states
            if state.attached
            or state.name in expected
            or (state.name in context and state.target is not None)
        )
        if not any(state.attached for state in self.states):
            first = next((state for state in self.states if state.why), None)
            self.close()
            why = first.why if first else "no reason given"
            raise KvmtraceError(
                f"no eBPF program could be attached: {why}",
                "`kvmtrace doctor` shows what is missing",
                (first.detail if first else None) or "",
            )
        addresses = {name: symbol.address for name, symbol in self._layout.symbols.items()}
        self.lookup = KernelLookup(self._loader, self._layout.offsets, addresses)

    def _attach(self, spec: probes.ProbeSpec) -> Probe:
        target, missing = self._layout.target(spec), self._layout.missing(spec.name)
        if target is None:
            return Probe(spec.name, False, **_no_target(spec, bool(self._kvm)))
        if missing:
            member = ".".join(OFFSETS[missing][0])
            return Probe(spec.name, False, target, why=f"the kernel's BTF has no {member}")
        if spec.name in _IN_RUN:
            return replace(self.run.state, name=spec.name)
        if spec.name == "run":
            return self.run.attach() if self._kvm else Probe("run", False, why=probes.NO_KVM)
        if spec.is_tracepoint:
            return self._attach_tracepoint(spec, target)
        failure = AttachFailure("the kernel's BTF does not have this function")
        function = self._layout.function(spec)
        if function is not None:
            via = "fentry" if spec.at == "entry" else "fexit"
            failed = self._attach_trampoline(spec, function, via)
            if failed is None:
                return Probe(spec.name, True, target, via)
            failure = failed
            self._add_kprobes()
        if f"kp_{spec.name}" in self._loader:
            failed, via = self._attach_kprobe(spec, target)
            if failed is None:
                return Probe(spec.name, True, target, via)
            if not host.has_kprobes():
                failed = replace(failed, why="this kernel has no kprobes")
            failure = attach_errors.both(failure, failed)
        return Probe(spec.name, False, target, why=failure.why, detail=failure.detail)

    def _add_kprobes(self) -> None:
        """Compile what is attached by kprobes: a function cannot be had by fentry or fexit."""
        cache, self._cache = self._cache, None
        if cache is None:
            return
        try:
            self._loader.add(_compiled(self._layout, cache, kprobes=True))
        except KvmtraceError as error:
            sources.note(f"{error.message}, and fentry and fexit do not attach everywhere")

    def _attach_tracepoint(self, spec: probes.ProbeSpec, target: str) -> Probe:
        event = target.rpartition(":")[2]
        failed = self._attach_raw_tracepoint(spec.name, event, f"tp_{spec.name}")
        if failed is None:
            return Probe(spec.name, True, target, "raw_tracepoint")
        if failed.number == errno.ENOENT:  # the event is in BTF, but its driver is not loaded
            return Probe(spec.name, False, why=spec.absent)
        return Probe(spec.name, False, target, why=failed.why, detail=failed.detail)

    def _attach_trampoline(
        self, spec: probes.ProbeSpec, function: FunctionType, via: str
    ) -> AttachFailure | None:
        name, entry = f"fn_{spec.name}", spec.at == "entry"
        for copy in range(self._loader.copies(name, spec.name)):
            failed = self._try(
                spec.name,
                via,
                lambda copy: self._loader.attach_function(name, function, entry=entry, copy=copy),
                copy,
            )
            if failed is not None:
                return None if copy else failed
            self._copies[spec.name] = copy + 1
        return None

    def _attach_kprobe(
        self, spec: probes.ProbeSpec, target: str
    ) -> tuple[AttachFailure | None, str]:
        """Attach kp_PROBE and, if there is one, kr_PROBE; the failure, and how it was attached."""
        entry, leave = f"kp_{spec.name}", f"kr_{spec.name}"
        failed = self._try(
            spec.name, "kprobe", lambda: self._loader.attach_kprobe(entry, target, entry=True)
        )
        if leave not in self._loader:
            return failed, "kprobe"
        failed = failed or self._try(
            spec.name, "kretprobe", lambda: self._loader.attach_kprobe(leave, target, entry=False)
        )
        return failed, "kretprobe"

    def _attach_raw_tracepoint(self, probe: str, event: str, program: str) -> AttachFailure | None:
        return self._try(
            probe, "raw_tracepoint", lambda: self._loader.attach_raw_tracepoint(program, event)
        )

    def _try(
        self, probe: str, way: str, attach: Callable[..., int], *arguments: int
    ) -> AttachFailure | None:
        """Attach one program of a probe; the reason if that fails."""
        try:
            self._attached.setdefault(probe, []).append(attach(*arguments))
        except OSError as error:
            return attach_errors.explain(way, error)
        return None

    def runs(self) -> dict[str, ProbeRuns]:
        """Runs and time by probe, where kernel.bpf_stats_enabled is on."""
        found: dict[str, ProbeRuns] = {}
        for probe, programs in self._attached.items():
            counts = [_fdinfo(program) for program in programs]
            run_ns = sum(one.get("run_time_ns", 0) for one in counts)
            if run_ns:
                # One call runs all of them: every copy, or those at entry and at return.
                found[probe] = ProbeRuns(max(one.get("run_cnt", 0) for one in counts), run_ns)
        return found

    def missed(self, now: int) -> list[Event]:
        """``Lost`` for calls that a program was skipped for, as one was preempted on that CPU.

        Calls that another copy of the program may have handled are not counted.
        """
        events: list[Event] = []
        for probe, programs in self._attached.items():
            total = sum(_fdinfo(program).get("recursion_misses", 0) for program in programs)
            more = total - self._missed.get(probe, 0)
            self._missed[probe] = total
            may_miss = self.run.may_miss if probe == "run" else self._copies.get(probe, 1) == 1
            if more > 0 and may_miss:
                events.append(Lost(now, f"{probe}_missed", more))
                if probe == "run":
                    self.run.missed()
        self.run.end_guard()
        return events

    def outdated(self) -> bool:
        """Whether kvm was loaded, or it or its vendor module went, since these were attached.

        A vendor module that is loaded after kvm brings nothing to attach to. To attach anew because
        of it would lose events while the programs are compiled.
        """
        now = kvm_module.loaded()
        if self._kvm and set(self._kvm) <= set(now):
            self._kvm = now
        return now != self._kvm

    def close(self, why: str = "closed") -> None:
        """Detach. ``why``: what the probes' states have from then on."""
        self._attached = {}  # their file descriptors may be reused for other files
        self.states = tuple(
            Probe(state.name, False, state.target, why=why) for state in getattr(self, "states", ())
        )
        self.maps.close()
        self._loader.close()


def _layout(cache: ProgramCache) -> Layout:
    specs = [*probes.specs(), *probes.context_specs()]
    # By eBPF it is not at the return of the function, which the other source probes.
    at = next(number for number, spec in enumerate(specs) if spec.name == "run")
    specs[at] = replace(specs[at], targets=(probes.USERSPACE_EXIT,), at="entry")
    return Layout(specs, cache)


def _cflags(layout: Layout, *, kprobes: bool) -> list[str]:
    return [
        *(f"-D{name}={getattr(limits, name)}" for name in limits.IN_C),
        *layout.cflags(kprobes=kprobes),
    ]


def _kept(layout: Layout, cache: ProgramCache, *, kprobes: bool) -> CompiledPrograms | None:
    """What ``cache`` has for this kernel and for the bcc that is installed, if there is one."""
    name = _name(layout, kprobes=kprobes)
    found = cache.read(name)
    if found is None:
        return None
    try:
        programs = CompiledPrograms.from_object(found)
    except ValueError:
        cache.distrust(name)
        return None
    return programs if bcc_version() in (None, programs.bcc) else None


def _any_kept(layout: Layout, cache: ProgramCache) -> CompiledPrograms | None:
    """Those with kprobes first: they are there only where they were needed."""
    found = (_kept(layout, cache, kprobes=kprobes) for kprobes in (True, False))
    return next(filter(None, found), None)


def _compiled(
    layout: Layout, cache: ProgramCache, *, kprobes: bool | None = None
) -> CompiledPrograms:
    """The programs for this kernel, from ``cache`` or compiled and kept there.

    ``kprobes``: those for kprobes as well. None: only if the kernel has nothing better, because
    they take a fifth of the time of compiling.
    """
    if kprobes is None:
        programs = _any_kept(layout, cache)
    else:
        programs = _kept(layout, cache, kprobes=kprobes)
    if programs is None:
        if kprobes is None:
            kprobes = not _has_trampolines(layout)
        with sources.in_stage("compiling the eBPF programs for this kernel"):
            programs = compiled(_cflags(layout, kprobes=kprobes))
        cache.write(_name(layout, kprobes=kprobes), programs.as_object())
    return programs


# One function of the kernel's and one of kvm's that are seldom called, and `r0 = 0; exit`.
_TRIED = ("sigbus", "vm_gone")
_TRIAL = CompiledPrograms(
    "", {}, {"trial": CompiledProgram(bytes.fromhex(f"b7{0:014x}95{0:014x}"), ())}
)


def _has_trampolines(layout: Layout) -> bool:
    """Whether fentry programs can be attached: loading one does not tell."""
    loader = Loader(_TRIAL, {})
    try:
        for spec in layout.specs:
            function = layout.function(spec) if spec.name in _TRIED else None
            if function is not None:
                loader.attach_function("trial", function, entry=True, copy=0)
    except OSError:
        return False
    finally:
        loader.close()
    return True


@dataclass(frozen=True, slots=True)
class Kept:
    """Whether the next start finds its programs compiled, in ``path``.

    ``bcc``: the version that compiled them; None if they are not there. ``trouble``: why nothing
    can be kept, or what is there is not used.
    """

    path: str
    bcc: str | None
    trouble: str | None


def kept() -> Kept | None:
    """Of this kernel, as it is now; None where the kernel has no BTF."""
    cache = ProgramCache()
    try:
        programs = _any_kept(_layout(cache), cache)
    except (KvmtraceError, OSError):
        return None
    if programs is None:
        cache.check_writable()
    return Kept(cache.path, programs.bcc if programs else None, cache.trouble)


def keep() -> Kept:
    """Compile for this kernel. Raises KvmtraceError; ``trouble`` if that cannot be kept."""
    cache = ProgramCache()
    layout = _layout(cache)
    kprobes = not _has_trampolines(layout)
    programs = compiled(_cflags(layout, kprobes=kprobes))
    is_kept = cache.write(_name(layout, kprobes=kprobes), programs.as_object())
    return Kept(cache.path, programs.bcc if is_kept else None, cache.trouble)


def _name(layout: Layout, *, kprobes: bool) -> str:
    return f"programs-{fingerprint(_cflags(layout, kprobes=kprobes))}"


def _no_target(spec: probes.ProbeSpec, has_kvm: bool) -> dict[str, str]:
    """``why`` and ``detail`` of a probe whose target this kernel does not have."""
    if not has_kvm and "kvm" in spec.targets[0]:
        return {"why": probes.NO_KVM}
    return {"why": spec.absent, "detail": f"not in /proc/kallsyms: {', '.join(spec.targets)}"}
