"""The eBPF programs: compiled by bcc for the running kernel, attached, detached.

No other module imports bcc. Kernel structs are reached by offsets from BTF, which are passed to the
compiler as macros (``layout``; bpf/common.c lists them).
"""

from __future__ import annotations

import atexit
import contextlib
import ctypes
import errno
import functools
import os
import re
import sys
import tempfile
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import IO, Any

from kvmtrace import probes
from kvmtrace.errors import KvmtraceError
from kvmtrace.events import Event, Lost
from kvmtrace.linux import host, kvm_module
from kvmtrace.probes import Probe, ProbeRuns
from kvmtrace.sources import limits
from kvmtrace.sources.bpf import attach_errors, copies
from kvmtrace.sources.bpf.attach_errors import AttachFailure
from kvmtrace.sources.bpf.layout import OFFSETS, Layout, Trampoline
from kvmtrace.sources.bpf.lookup import KernelLookup, libbpf
from kvmtrace.sources.bpf.maps import Maps

PARTS = tuple(f"{topic}.c" for topic in "common exits signals poison hardware vms".split())
"""The C files of the attached programs, in bpf/."""


BCC_HINT = "apt install python3-bpfcc (Debian, Ubuntu) or dnf install python3-bcc (Fedora)"


def bpf_dir() -> Path:
    """The directory with the BPF programs and the stand-in kernel headers.

    A wheel has it inside the package; a checkout (and an editable install of it) beside it.
    """
    package = Path(__file__).resolve().parents[2]
    for parent in (package, package.parent):
        if (parent / "bpf").is_dir():
            return parent / "bpf"
    raise KvmtraceError("this installation has no bpf/ directory", "install kvmtrace again")


def joined(parts: tuple[str, ...]) -> str:
    """The C files ``parts`` of bpf/ as one text.

    bcc rewrites the use of maps in the main file only, so nothing that uses them can be included.
    Compiler errors name the part.
    """
    return "".join(f'#line 1 "{part}"\n{(bpf_dir() / part).read_text()}' for part in parts)


def program_names(text: str) -> frozenset[str]:
    """The programs in a C text that are named by their probe.

    ``tp_PROBE``: raw tracepoint; ``kp_PROBE``, ``kr_PROBE``: kprobe and kretprobe.
    """
    return frozenset(re.findall(r"^int ((?:tp|kp|kr)_\w+)\(", text, re.MULTILINE))


def import_bcc() -> Any:
    """The distribution's ``bcc`` module; raises KvmtraceError naming its package."""
    try:
        import bcc  # noqa: PLC0415
    except ImportError as error:
        # Debian's package is for its own Python, which a virtual environment may not look at.
        if error.name not in ("bcc", None):
            raise KvmtraceError("bcc does not load", BCC_HINT, str(error)) from error
        found = host.bcc_not_found()
        raise KvmtraceError(f"bcc is {found.why}", found.fix) from error
    except OSError as error:
        raise KvmtraceError("bcc does not load", BCC_HINT, str(error)) from error
    if not hasattr(bcc, "BPF"):
        raise KvmtraceError(
            "the installed bcc is PyPI's, which is another project (lattices, not BPF)",
            f"pip uninstall bcc, then {BCC_HINT}",
        )
    return bcc


@contextlib.contextmanager
def quiet_stderr() -> Iterator[list[str]]:
    """Catch what libbcc, libbpf and clang write to file descriptor 2; the list gets the lines."""
    lines: list[str] = []
    sys.stderr.flush()
    caught = _scratch()
    saved = os.dup(2)
    os.dup2(caught.fileno(), 2)
    try:
        yield lines
    finally:
        os.dup2(saved, 2)
        os.close(saved)
        caught.seek(0)
        lines += caught.read().decode(errors="replace").splitlines()
        caught.seek(0)
        caught.truncate()


@functools.cache
def _scratch() -> IO[bytes]:
    """One file for the life of the process: root may not be able to write to $TMPDIR later."""
    return tempfile.TemporaryFile()


def _fdinfo(descriptor: int) -> dict[str, int]:
    """The kernel's counts of one of our programs (kernel/bpf/syscall.c, bpf_prog_show_fdinfo)."""
    with contextlib.suppress(OSError), open(f"/proc/self/fdinfo/{descriptor}") as info:
        return counts_in(info.read())
    return {}


def counts_in(fdinfo: str) -> dict[str, int]:
    """The fields that are numbers."""
    return {name: int(value) for name, value in _FIELD.findall(fdinfo)}


_FIELD = re.compile(r"^(\w+):[ \t]*([0-9]{1,20})[ \t]*$", re.MULTILINE)


class Programs:
    """One compiled and attached set of programs, for the kvm module that is loaded now.

    ``states``: every probe, attached or not. ``maps``: counters and records. ``lookup``: None where
    its programs do not compile. Raises KvmtraceError if nothing can be attached.
    """

    def __init__(self) -> None:
        self._bcc = import_bcc()
        libbpf()  # before anything that makes it print
        self._kvm: tuple[str, ...] | None = None
        self._attached: dict[str, list[Any]] = {}  # bcc's functions, by probe
        self._missed: dict[str, int] = {}  # by probe
        self._copies: dict[str, int] = {}  # by probe, where there are several
        self._lookup_bpf: Any = None
        wanted = probes.specs()
        # What is read while kvm is being loaded belongs to neither state.
        while self._kvm != (now := kvm_module.loaded()):
            self._kvm = now
            self._layout = Layout((*wanted, *probes.context_specs()))
        self._names = program_names(joined(PARTS))
        self._bpf = self._compile(*PARTS)
        self.maps = Maps(self._bcc.libbcc.lib, self._bpf)
        states = [self._attach(spec) for spec in self._layout.specs]
        if any(state.attached and state.name == "gmem" for state in states):
            self.maps.set_gmem_watched()
        # A context probe is optional: it is listed only where this kernel has its target.
        expected = {spec.name for spec in wanted}
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
        with quiet_stderr():
            self.maps.open_ring()
        self.lookup = self._load_lookup_programs()

    def _load_lookup_programs(self) -> KernelLookup | None:
        try:
            self._lookup_bpf = bpf = self._compile("lookup.bpf.c")
        except KvmtraceError:
            return None

        def load(name: str) -> int:
            with quiet_stderr():
                return int(bpf.load_func(name.encode(), self._bcc.BPF.RAW_TRACEPOINT).fd)

        addresses = {name: symbol.address for name, symbol in self._layout.symbols.items()}
        return KernelLookup(bpf, load, self._layout.offsets, addresses)

    def _compile(self, *parts: str) -> Any:
        directory = bpf_dir()
        cflags = [
            f"-I{directory}",
            *(f"-D{name}={getattr(limits, name)}" for name in limits.IN_C),
            *self._layout.cflags(),
        ]
        # On construction bcc attaches all programs by their names and fails if one of them fails.
        # Here each probe is attached, or not, on its own.
        unattached = type("BPF", (self._bcc.BPF,), {"_trace_autoload": lambda self: None})
        os.environ["BCC_KERNEL_SOURCE"] = str(directory / "stubs")
        with quiet_stderr() as stderr:
            try:
                return unattached(text=joined(parts).encode(), cflags=cflags)
            except Exception as error:  # bcc raises bare Exception
                reason = str(error)
        detail = next((line.strip() for line in stderr if "error" in line), None) or reason
        if attach_errors.errno_in(detail) in (errno.EPERM, errno.EACCES):
            raise KvmtraceError(
                "the kernel does not permit BPF",
                "a missing capability or this host's policy: see `kvmtrace doctor`",
                detail,
            )
        raise KvmtraceError(
            "bcc cannot compile the eBPF programs",
            "`kvmtrace doctor --verbose` shows what it says",
            detail,
        )

    def _attach(self, spec: probes.ProbeSpec) -> Probe:
        target, missing = self._layout.target(spec), self._layout.missing(spec.name)
        if target is None:
            return Probe(spec.name, False, **_no_target(spec, bool(self._kvm)))
        if missing:
            member = ".".join(OFFSETS[missing][0])
            return Probe(spec.name, False, target, why=f"the kernel's BTF has no {member}")
        if spec.is_tracepoint:
            return self._attach_tracepoint(spec, target)
        failure = AttachFailure("the kernel's BTF does not have this function")
        place = self._layout.trampoline(spec)
        if place is not None:
            via = "fentry" if spec.at == "entry" else "fexit"
            failed = self._attach_trampoline(spec, place, via)
            if failed is None:
                if spec.name == "run" and self._attach_userspace_exit("tp_run_under_way") is None:
                    via = "fexit+raw_tracepoint"
                return Probe(spec.name, True, target, via)
            failure = failed
        if f"kp_{spec.name}" in self._names:
            failed, via = self._attach_kprobe(spec, target)
            if failed is None:
                return Probe(spec.name, True, target, via)
            if not host.has_kprobes():
                failed = replace(failed, why="this kernel has no kprobes")
            failure = attach_errors.both(failure, failed)
        return Probe(spec.name, False, target, why=failure.why, detail=failure.detail)

    def _attach_tracepoint(self, spec: probes.ProbeSpec, target: str) -> Probe:
        event = target.rpartition(":")[2]
        failed = self._attach_raw_tracepoint(spec.name, event, f"tp_{spec.name}")
        if failed is None:
            return Probe(spec.name, True, target, "raw_tracepoint")
        if failed.number == errno.ENOENT:  # the event is in BTF, but its driver is not loaded
            return Probe(spec.name, False, why=spec.absent)
        return Probe(spec.name, False, target, why=failed.why, detail=failed.detail)

    def _attach_trampoline(
        self, spec: probes.ProbeSpec, place: Trampoline, via: str
    ) -> AttachFailure | None:
        bpf, name = self._bpf, place.full_name
        code = copies.Code(self._memory_of(name.encode()))
        if not code.size:
            if place.module:
                return AttachFailure("this bcc cannot attach to modules (0.29 can)")
            name = place.plain_name
            code = copies.Code(self._memory_of(name.encode()))
        fn_name = name.encode()
        if spec.at == "entry":
            attach, links = bpf.attach_kfunc, bpf.kfunc_entry_fds
        else:
            attach, links = bpf.attach_kretfunc, bpf.kfunc_exit_fds
        for copy in range(code.copies(spec.name)):
            code.set_copy_number(copy)
            failed = self._try(spec.name, lambda: attach(fn_name=fn_name), name, via)
            if failed is not None:
                return None if copy else failed
            # bcc loads and attaches a function once by each name, and detaches it by any.
            for kept in (bpf.funcs, links):
                kept[b"%s#%d" % (fn_name, copy)] = kept.pop(fn_name)
            self._copies[spec.name] = copy + 1
        return None

    def _memory_of(self, function: bytes) -> memoryview:
        """The bytes that bcc loads a program from; empty if there is no such program."""
        lib, module = self._bcc.libbcc.lib, self._bpf.module
        start = lib.bpf_function_start(module, function)
        if not start:
            return memoryview(b"")
        size = lib.bpf_function_size(module, function)
        return memoryview((ctypes.c_ubyte * size).from_address(start)).cast("B")

    def _attach_kprobe(
        self, spec: probes.ProbeSpec, target: str
    ) -> tuple[AttachFailure | None, str]:
        """Attach kp_PROBE and, if there is one, kr_PROBE; the failure, and how it was attached."""
        event = target.encode()
        entry, leave = f"kp_{spec.name}", f"kr_{spec.name}"
        failed = self._try(
            spec.name,
            lambda: self._bpf.attach_kprobe(event=event, fn_name=entry.encode()),
            entry,
            "kprobe",
        )
        if spec.name == "run":
            return failed or self._attach_userspace_exit("tp_run"), "kprobe+raw_tracepoint"
        if leave not in self._names:
            return failed, "kprobe"
        failed = failed or self._try(
            spec.name,
            lambda: self._bpf.attach_kretprobe(event=event, fn_name=leave.encode()),
            leave,
            "kretprobe",
        )
        return failed, "kretprobe"

    def _attach_userspace_exit(self, function: str) -> AttachFailure | None:
        return self._attach_raw_tracepoint("run", "kvm_userspace_exit", function)

    def _attach_raw_tracepoint(self, probe: str, event: str, function: str) -> AttachFailure | None:
        return self._try(
            probe,
            lambda: self._bpf.attach_raw_tracepoint(tp=event.encode(), fn_name=function.encode()),
            function,
            "raw_tracepoint",
        )

    def _try(self, probe: str, attach: Any, function: str, way: str) -> AttachFailure | None:
        """Attach one program (``function``) of a probe; the reason if that fails."""
        with quiet_stderr() as stderr:
            try:
                attach()
            except Exception as error:  # bcc raises bare Exception
                reason = str(error)
            else:
                self._attached.setdefault(probe, []).append(self._bpf.funcs[function.encode()])
                return None
        return attach_errors.explain(way, reason, stderr)

    def runs(self) -> dict[str, ProbeRuns]:
        """Runs and time by probe, where kernel.bpf_stats_enabled is on."""
        found: dict[str, ProbeRuns] = {}
        for probe, functions in self._attached.items():
            counts = [_fdinfo(function.fd) for function in functions]
            run_ns = sum(one.get("run_time_ns", 0) for one in counts)
            if run_ns:
                # One call runs all of them: every copy, or those at entry and at return.
                found[probe] = ProbeRuns(max(one.get("run_cnt", 0) for one in counts), run_ns)
        return found

    def missed(self, now: int) -> list[Event]:
        """``Lost`` for calls that a program was skipped for, as it was preempted on that CPU.

        Calls that another copy of the program may have handled are not counted.
        """
        events: list[Event] = []
        for probe, functions in self._attached.items():
            if self._copies.get(probe, 1) > 1:
                continue
            total = sum(_fdinfo(function.fd).get("recursion_misses", 0) for function in functions)
            more = total - self._missed.get(probe, 0)
            self._missed[probe] = total
            if more > 0:
                events.append(Lost(now, f"{probe}_missed", more))
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

    def close(self) -> None:
        self._attached = {}  # their file descriptors may be reused for other files
        self.states = tuple(
            Probe(state.name, False, state.target, why="closed")
            for state in getattr(self, "states", ())
        )
        for bpf in (self._bpf, self._lookup_bpf):
            if bpf is None:
                continue
            # bcc 0.26 looks for its kprobes in tracefs and raises if that is not mounted, here and
            # again at exit. The kprobes end with their file descriptors.
            with quiet_stderr(), contextlib.suppress(Exception):
                bpf.cleanup()
            atexit.unregister(bpf.cleanup)


def _no_target(spec: probes.ProbeSpec, has_kvm: bool) -> dict[str, str]:
    """``why`` and ``detail`` of a probe whose target this kernel does not have."""
    if not has_kvm and "kvm" in spec.targets[0]:
        return {"why": probes.NO_KVM}
    return {"why": spec.absent, "detail": f"not in /proc/kallsyms: {', '.join(spec.targets)}"}
