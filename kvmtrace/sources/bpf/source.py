"""The eBPF source: compiles bpf/common.c with bcc, attaches what it can, emits events.

The only module that knows bcc. Kernel structs are reached by offsets from BTF that are passed to
the compiler; see bpf/common.c for what is passed.
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
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from typing import IO, Any

from kvmtrace import files, probes
from kvmtrace.errors import KvmtraceError
from kvmtrace.events import Event, Lost
from kvmtrace.linux import host
from kvmtrace.linux.clock import epoch_offset_ns, now_ns
from kvmtrace.probes import Probe, ProbeRuns
from kvmtrace.sources.bpf import attach_errors, copies, lookup, maps, records
from kvmtrace.sources.bpf.guest_memory import BpfMemory
from kvmtrace.sources.bpf.layout import OFFSETS, Layout, Trampoline
from kvmtrace.sources.bpf.translator import BpfTranslator

RING_PAGES = 512
MAX_KEYS = 16384
MAX_OVERFLOW = 4096

PARTS = tuple(f"{topic}.c" for topic in "common exits signals poison hardware vms".split())
"""The program in C, in bpf/: compiled as one text."""

BCC_HINT = "apt install python3-bpfcc (Debian, Ubuntu) or dnf install python3-bcc (Fedora)"

# How often to look whether kvm came or went, in seconds.
_WATCH_SECONDS = 1.0
_SETTLE_LIMIT = 10.0

# The programs of each probe by way: bcc method and function name in bpf/*.c.
_TRACEPOINTS = {
    "poison": "tp_poison",
    "mce": "tp_mce",
    "mc_event": "tp_mc_event",
    "extlog": "tp_extlog",
    "arm_event": "tp_arm_event",
    "non_standard": "tp_non_standard",
}
_KPROBES: dict[str, tuple[str, str | None]] = {
    "run": ("kp_run", None),
    "gmem": ("kp_gmem", "kr_gmem"),
    "faultin": ("kp_faultin", "kr_faultin"),
    "vm_new": ("kp_vm_new", "kr_vm_new"),
    "gmem_error": ("kp_gmem_error", None),
    "sigbus": ("kp_sigbus", None),
    "sigbus_forced": ("kp_sigbus_forced", None),
    "sigbus_bare": ("kp_sigbus_bare", None),
    "vm_gone": ("kp_vm_gone", None),
    "apei": ("kp_apei", None),
    "soft_offline": ("kp_soft_offline", "kr_soft_offline"),
    "unpoison": ("kp_unpoison", "kr_unpoison"),
}


def import_bcc() -> Any:
    """The distribution's ``bcc`` module; raises KvmtraceError naming the package that has it."""
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
    """Keep what libbcc, libbpf and clang write to file descriptor 2; the list gets the lines."""
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
    """One file for all: $TMPDIR may be a user's, where root cannot write any more later."""
    return tempfile.TemporaryFile()


def _fdinfo(descriptor: int) -> dict[str, int]:
    """What the kernel counts of a program of ours (kernel/bpf/syscall.c, bpf_prog_show_fdinfo)."""
    with contextlib.suppress(OSError), open(f"/proc/self/fdinfo/{descriptor}") as info:
        return counts_in(info.read())
    return {}


def counts_in(fdinfo: str) -> dict[str, int]:
    """The fields that are numbers."""
    return {name: int(value) for name, value in _FIELD.findall(fdinfo)}


_FIELD = re.compile(r"^(\w+):[ \t]*([0-9]{1,20})[ \t]*$", re.MULTILINE)


class BpfSource:
    """Events by eBPF. Raises KvmtraceError where bcc, BTF or the kernel do not play along."""

    name = "bpf"

    def __init__(self) -> None:
        self.why: str | None = None
        if host.lockdown() == "confidentiality":
            # Programs that read nothing would still attach: a watch that sees next to nothing.
            raise KvmtraceError(
                "kernel lockdown (confidentiality) forbids BPF programs to read kernel memory",
                "boot with lockdown=integrity or without; `kvmtrace doctor` shows it",
            )
        self._bcc = import_bcc()
        self._translator = BpfTranslator(epoch_offset_ns(), host.memory_failure_names())
        self._programs = _Programs(self._bcc)
        self._next_watch = 0.0
        self._settling: _Settling | None = None  # without programs meanwhile
        self._closed = False
        self._backlog: list[Event] = []
        self.memory = BpfMemory(self._translator, self._backlog.append)
        self._meet()

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
            self._programs.wait(0 if events else timeout)
            events += self._drain(last=timeout == 0)
        elif not events:
            time.sleep(max(0.0, min(timeout, self._next_watch - time.monotonic())))
        if timeout == 0:
            events += self._translator.release()
        return events

    def probes(self) -> tuple[Probe, ...]:
        return self._programs.states

    def probe_runs(self) -> Mapping[str, ProbeRuns]:
        return self._programs.runs()

    def close(self) -> None:
        if not self._closed:
            self._closed = True
            self._programs.close()

    def _meet(self) -> None:
        """The VMs that are there, to ``_backlog``.

        The kernel's list first: it has their generations too. What /proc shows without one
        is a VM from before the first event, and some began since these programs were attached.
        """
        self.memory.use(self._programs.walk, self._programs.generation)
        self._backlog += self._translator.start()

    def _drain(self, *, last: bool = False) -> list[Event]:
        events = self._translator.translate(self._programs.take(), self._programs)
        events += self._translator.counters(self._programs, at_once=last)
        return events

    def _watch_kvm(self) -> list[Event]:
        """Let go when kvm wants to be unloaded; attach anew when it has come or gone."""
        events: list[Event] = []
        if self._settling is None:
            if not self._programs.outdated():
                return []
            events += self._drain()
            events += self._translator.flush(self._programs)
            self.memory.use(None, lambda _struct: 0)
            self._programs.close()
            self._settling = _Settling()
        elif self._settling.is_over():
            self._programs = _Programs(self._bcc)
            self._settling = None
            self._meet()
            # Before what these VMs did meanwhile.
            events += self._backlog
            self._backlog.clear()
        return events


class _Programs:
    """One compiled and attached set of programs, for the kvm module that is there now."""

    def __init__(self, bcc: Any) -> None:
        self._bcc = bcc
        self._kvm = _kvm_modules()
        self._raw: list[bytes] = []
        self._attached: dict[str, list[Any]] = {}
        self._missed: dict[str, int] = {}  # by probe
        self._copies: dict[str, int] = {}  # by probe, where there are
        self._asked: Any = None
        self._rows: dict[str, maps.Rows] = {}  # by map
        self._seen: dict[str, dict[bytes, bytes]] = {}  # by map: its rows as they were read last
        wanted = probes.specs()
        self._layout = Layout((*wanted, *probes.context_specs()))
        self._bpf = self._compile(*PARTS)
        states = [self._attach(spec) for spec in self._layout.specs]
        if any(state.attached and state.name == "gmem" for state in states):
            self._bpf["watching_gmem"][ctypes.c_int(0)] = ctypes.c_uint32(1)
        # Context that this kernel does not have is not missed; what it has and refuses is.
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
            self._bpf["ring"].open_ring_buffer(self._receive)
        self.walk = self._questions()

    def _questions(self) -> lookup.KernelLookup | None:
        """The programs that answer questions; None where they do not compile here."""
        try:
            self._asked = asked = self._compile("lookup.bpf.c")
        except KvmtraceError:
            return None

        def load(name: str) -> int:
            with quiet_stderr():
                return int(asked.load_func(name.encode(), self._bcc.BPF.RAW_TRACEPOINT).fd)

        addresses = {name: symbol.address for name, symbol in self._layout.symbols.items()}
        return lookup.KernelLookup(asked, load, self._layout.offsets, addresses)

    def generation(self, struct: int) -> int:
        """Which of the VMs at this address there is now: see gen_of() in the programs."""
        try:
            return int(self._bpf["generation"][ctypes.c_uint64(struct)].value)
        except KeyError:
            return 0

    def _compile(self, *parts: str) -> Any:
        source = files.bpf_dir()
        # bcc rewrites maps in the main file only: there is but one. Errors name the part.
        text = "".join(f'#line 1 "{part}"\n{(source / part).read_text()}' for part in parts)
        cflags = [
            f"-I{source}",
            f"-DRING_PAGES={RING_PAGES}",
            f"-DMAX_KEYS={MAX_KEYS}",
            f"-DMAX_OVERFLOW={MAX_OVERFLOW}",
            *self._layout.cflags(),
        ]
        # bcc attaches by function name on construction, all or nothing; each probe has its own
        # fate here.
        unattached = type("BPF", (self._bcc.BPF,), {"_trace_autoload": lambda self: None})
        os.environ["BCC_KERNEL_SOURCE"] = str(source / "stubs")
        with quiet_stderr() as said:
            try:
                return unattached(text=text.encode(), cflags=cflags)
            except Exception as error:  # bcc raises bare Exception
                reason = str(error)
        detail = next((line.strip() for line in said if "error" in line), None) or reason
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
        refusal = attach_errors.Refusal("the kernel's BTF does not have this function")
        place = self._layout.trampoline(spec)
        if place is not None:
            via = "fentry" if spec.at == "entry" else "fexit"
            refused = self._attach_trampoline(spec, place, via)
            if refused is None:
                if spec.name == "run" and self._attach_userspace_exit("tp_run_under_way") is None:
                    via = "fexit+raw_tracepoint"
                return Probe(spec.name, True, target, via)
            refusal = refused
        if spec.name in _KPROBES:
            refused, via = self._attach_kprobe(spec, target)
            if refused is None:
                return Probe(spec.name, True, target, via)
            if not host.has_kprobes():
                refused = replace(refused, why="this kernel has no kprobes")
            refusal = attach_errors.both(refusal, refused)
        return Probe(spec.name, False, target, why=refusal.why, detail=refusal.detail)

    def _attach_tracepoint(self, spec: probes.ProbeSpec, target: str) -> Probe:
        refused = self._try(
            spec.name,
            lambda: self._bpf.attach_raw_tracepoint(
                tp=target.rpartition(":")[2].encode(), fn_name=_TRACEPOINTS[spec.name].encode()
            ),
            _TRACEPOINTS[spec.name],
            "raw_tracepoint",
        )
        if refused is None:
            return Probe(spec.name, True, target, "raw_tracepoint")
        if refused.number == errno.ENOENT:  # BTF may know it without its driver
            return Probe(spec.name, False, why=spec.absent)
        return Probe(spec.name, False, target, why=refused.why, detail=refused.detail)

    def _attach_trampoline(
        self, spec: probes.ProbeSpec, place: Trampoline, via: str
    ) -> attach_errors.Refusal | None:
        bpf, name = self._bpf, place.full_name
        code = copies.Code(self._memory_of(name.encode()))
        if not code.size:
            if place.module:
                return attach_errors.Refusal("this bcc cannot attach to modules (0.29 can)")
            name = place.plain_name
            code = copies.Code(self._memory_of(name.encode()))
        fn_name = name.encode()
        if spec.at == "entry":
            attach, links = bpf.attach_kfunc, bpf.kfunc_entry_fds
        else:
            attach, links = bpf.attach_kretfunc, bpf.kfunc_exit_fds
        for copy in range(code.copies(spec.name)):
            code.become(copy)
            refused = self._try(spec.name, lambda: attach(fn_name=fn_name), name, via)
            if refused is not None:
                return None if copy else refused
            # bcc loads and attaches a function once; by another name it still detaches it.
            for kept in (bpf.funcs, links):
                kept[b"%s#%d" % (fn_name, copy)] = kept.pop(fn_name)
            self._copies[spec.name] = copy + 1
        return None

    def _memory_of(self, function: bytes) -> memoryview:
        """The bytes that bcc loads a program from; none where there is no such program."""
        lib, module = self._bcc.libbcc.lib, self._bpf.module
        start = lib.bpf_function_start(module, function)
        if not start:
            return memoryview(b"")
        size = lib.bpf_function_size(module, function)
        return memoryview((ctypes.c_ubyte * size).from_address(start)).cast("B")

    def _attach_kprobe(
        self, spec: probes.ProbeSpec, target: str
    ) -> tuple[attach_errors.Refusal | None, str]:
        event = target.encode()
        entry, leave = _KPROBES[spec.name]
        refused = self._try(
            spec.name,
            lambda: self._bpf.attach_kprobe(event=event, fn_name=entry.encode()),
            entry,
            "kprobe",
        )
        if spec.name == "run":
            return refused or self._attach_userspace_exit("tp_run"), "kprobe+raw_tracepoint"
        if leave is None:
            return refused, "kprobe"
        refused = refused or self._try(
            spec.name,
            lambda: self._bpf.attach_kretprobe(event=event, fn_name=leave.encode()),
            leave,
            "kretprobe",
        )
        return refused, "kretprobe"

    def _attach_userspace_exit(self, function: str) -> attach_errors.Refusal | None:
        return self._try(
            "run",
            lambda: self._bpf.attach_raw_tracepoint(
                tp=b"kvm_userspace_exit", fn_name=function.encode()
            ),
            function,
            "raw_tracepoint",
        )

    def _try(
        self, probe: str, attach: Any, function: str, way: str
    ) -> attach_errors.Refusal | None:
        """Attach one program (``function``) of a probe; why not, if that fails."""
        with quiet_stderr() as said:
            try:
                attach()
            except Exception as error:  # bcc raises bare Exception
                reason = str(error)
            else:
                self._attached.setdefault(probe, []).append(self._bpf.funcs[function.encode()])
                return None
        return attach_errors.explain(way, reason, said)

    # -- what the kernel has for us

    def _receive(self, _context: Any, data: int, size: int) -> None:
        self._raw.append(ctypes.string_at(data, size))

    def wait(self, timeout: float) -> None:
        """Wait for records; they are then in ``take()``."""
        self._bpf.ring_buffer_poll(int(timeout * 1000))

    def take(self) -> list[bytes]:
        """The records received since the last call."""
        raw, self._raw = self._raw, []
        return raw

    def counters(self) -> list[tuple[records.ExitKeyRecord, records.ExitCount]]:
        """The exact counters that moved since the last call, from the map and its overflow."""
        return [
            (records.ExitKeyRecord.from_buffer_copy(key), records.ExitCount.from_buffer_copy(count))
            for name in ("exits", "overflow")
            for key, count in self._moved(name)
        ]

    def refused(self) -> list[tuple[records.RefusalKeyRecord, records.RefusedCount]]:
        """How often kvm_gmem_get_pfn answered EHWPOISON, by VM and gfn: what moved."""
        return [
            (
                records.RefusalKeyRecord.from_buffer_copy(key),
                records.RefusedCount.from_buffer_copy(count),
            )
            for key, count in self._moved("refused")
        ]

    def signals(self) -> list[tuple[records.SigbusKey, records.SigbusCount]]:
        """Signals that are the same but for their time, counted: what moved."""
        return [
            (records.SigbusKey.from_buffer_copy(key), records.SigbusCount.from_buffer_copy(count))
            for key, count in self._moved("signals")
        ]

    def _moved(self, name: str) -> Iterator[tuple[bytes, bytes]]:
        """The rows of a map whose value differs from the one that was read last."""
        seen = self._seen.setdefault(name, {})
        for key, value in self._maps(name).rows():
            if seen.get(key) != value:
                seen[key] = value
                yield key, value

    def _maps(self, name: str) -> maps.Rows:
        if name not in self._rows:
            self._rows[name] = maps.Rows(self._bcc.libbcc.lib, self._bpf[name])
        return self._rows[name]

    def forget_signals(self, keys: list[records.SigbusKey]) -> None:
        """Drop the counters of signals that a VM was sent."""
        self._delete("signals", keys)

    def forget_refused(self, keys: list[records.RefusalKeyRecord]) -> None:
        """Drop the counters of what a VM that is gone was refused."""
        self._delete("refused", keys)

    def forget(self, keys: list[records.ExitKeyRecord]) -> None:
        """Drop the counters of a VM that is gone."""
        self._delete("exits", keys)
        self._delete("overflow", keys)

    def _delete(self, name: str, keys: Sequence[ctypes.Structure]) -> None:
        table, seen = self._bpf[name], self._seen.get(name, {})
        for key in keys:
            seen.pop(bytes(key), None)
            with contextlib.suppress(KeyError):
                del table[table.Key.from_buffer_copy(key)]

    def activity(self) -> int:
        """A number that changes with every failed KVM_RUN."""
        return int(self._bpf["activity"][ctypes.c_int(0)].value)

    def lost(self) -> list[int]:
        """Counts in the order of ``records.LOST_PLACES``."""
        table = self._bpf["lost"]
        return [int(table[ctypes.c_int(place)].value) for place in range(len(records.LOST_PLACES))]

    def runs(self) -> dict[str, ProbeRuns]:
        """Runs and time by probe, where kernel.bpf_stats_enabled is on."""
        found: dict[str, ProbeRuns] = {}
        for probe, functions in self._attached.items():
            told = [_fdinfo(function.fd) for function in functions]
            run_ns = sum(one.get("run_time_ns", 0) for one in told)
            if run_ns:
                # One call runs all of them: copies, or what is at entry and at return.
                found[probe] = ProbeRuns(max(one.get("run_cnt", 0) for one in told), run_ns)
        return found

    def missed(self, now: int) -> list[Event]:
        """Events of which a program was not run, because it was preempted in itself on that CPU.

        Not of those of which another copy was.
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
        """Whether kvm came, or it or its vendor module went, since these were attached.

        A vendor module that comes after kvm brings nothing to attach to, and while programs are
        compiled anew nothing is seen.
        """
        now = _kvm_modules()
        if self._kvm and set(self._kvm) <= set(now):
            self._kvm = now
        return now != self._kvm

    def close(self) -> None:
        self._attached = {}  # their file descriptors may soon be others' files
        self.states = tuple(
            Probe(state.name, False, state.target, why="closed")
            for state in getattr(self, "states", ())
        )
        for bpf in (self._bpf, self._asked):
            if bpf is None:
                continue
            # bcc 0.26 looks for its kprobes in tracefs, and raises where that is not mounted; it
            # would do so again at exit. They end with their file descriptors.
            with quiet_stderr(), contextlib.suppress(Exception):
                bpf.cleanup()
            atexit.unregister(bpf.cleanup)


def _no_target(spec: probes.ProbeSpec, has_kvm: bool) -> dict[str, str]:
    """``why`` and ``detail`` of a probe that the kernel has no place for."""
    if not has_kvm and "kvm" in spec.targets[0]:
        return {"why": probes.NO_KVM}
    return {"why": spec.absent, "detail": f"not in /proc/kallsyms: {', '.join(spec.targets)}"}


def _kvm_modules() -> tuple[str, ...]:
    """What there is of kvm, with what makes one loading of it different from the next."""
    found = []
    for module in ("kvm", "kvm_amd", "kvm_intel"):
        with contextlib.suppress(OSError):
            inode = os.stat(f"/sys/module/{module}").st_ino
            if _is_live(module):
                found.append(f"{module}:{inode}")
    return tuple(found)


class _Settling:
    """Whether kvm's modules have come or gone; to be asked now and then.

    One goes after the other; what is there in between may be replaced before programs are compiled
    for it, which then seem to fit and are made anew, blind meanwhile.
    """

    def __init__(self) -> None:
        self._seen = _kvm_modules()
        self._end = time.monotonic() + _SETTLE_LIMIT

    def is_over(self) -> bool:
        """They are as they were when this was asked last, or it takes too long."""
        before, self._seen = self._seen, _kvm_modules()
        return before == self._seen or time.monotonic() >= self._end


def _is_live(module: str) -> bool:
    """Loaded to the end and not on its way out. What is built in has no such state."""
    try:
        with open(f"/sys/module/{module}/initstate") as file:
            return file.read().strip() == "live"
    except FileNotFoundError:
        return True
