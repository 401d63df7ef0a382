"""The eBPF source: compiles bpf/kvmtrace.bpf.c with bcc, attaches what it can, tells events.

The only module that knows bcc. Kernel structs are reached by offsets from BTF that are passed to
the compiler; see bpf/kvmtrace.bpf.c for what is passed.
"""

from __future__ import annotations

import contextlib
import ctypes
import os
import re
import sys
import tempfile
import time
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from kvmtrace import files, host, kvm, probes
from kvmtrace.btf import Btf
from kvmtrace.clock import epoch_offset_ns
from kvmtrace.errors import KvmtraceError
from kvmtrace.events import Event
from kvmtrace.model import Probe, ProbeRuns
from kvmtrace.sources import bpf_records as records
from kvmtrace.sources.bpf_events import Translator

RING_PAGES = 512
MAX_KEYS = 16384
MAX_OVERFLOW = 4096

BCC_HINT = "apt install python3-bpfcc (Debian, Ubuntu) or dnf install python3-bcc (Fedora)"

# How often to look whether kvm came or went, in seconds.
_WATCH_SECONDS = 1.0

# Members by struct, first the names that the macros of kvmtrace.bpf.c carry, then where BTF may
# have them: names differ between kernels where a struct was renamed.
_OFFSETS: dict[str, tuple[tuple[str, str], ...]] = {
    "kvm_vcpu_kvm": (("kvm_vcpu", "kvm"),),
    "kvm_vcpu_vcpu_id": (("kvm_vcpu", "vcpu_id"),),
    "kvm_vcpu_run": (("kvm_vcpu", "run"),),
    "kvm_vcpu_stat_exits": (("kvm_vcpu", "stat.exits"),),
    "kvm_run_exit_reason": (("kvm_run", "exit_reason"),),
    "kvm_run_memory_fault": (("kvm_run", "memory_fault"),),
    "kvm_page_fault_gfn": (("kvm_page_fault", "gfn"),),
    "kvm_page_fault_write": (("kvm_page_fault", "write"),),
    "kvm_page_fault_exec": (("kvm_page_fault", "exec"),),
    "kvm_page_fault_is_private": (("kvm_page_fault", "is_private"),),
    "kvm_page_fault_pfn": (("kvm_page_fault", "pfn"),),
    "kvm_page_fault_slot": (("kvm_page_fault", "slot"),),
    "kvm_memory_slot_userspace_addr": (("kvm_memory_slot", "userspace_addr"),),
    "kvm_memory_slot_base_gfn": (("kvm_memory_slot", "base_gfn"),),
    "kvm_memory_slot_gmem_pgoff": (("kvm_memory_slot", "gmem.pgoff"),),
    "xarray_xa_head": (("xarray", "xa_head"),),
    "xa_node_shift": (("xa_node", "shift"),),
    "xa_node_slots": (("xa_node", "slots"),),
    "address_space_host": (("address_space", "host"),),
    "address_space_i_private_list": (("address_space", "i_private_list"),),
    "inode_i_ino": (("inode", "i_ino"),),
    "folio_index": (("folio", "index"),),
    "gmem_inode_vfs_inode": (("gmem_inode", "vfs_inode"),),
    "gmem_inode_gmem_file_list": (("gmem_inode", "gmem_file_list"),),
    "gmem_file_entry": (("gmem_file", "entry"), ("kvm_gmem", "entry")),
    "gmem_file_bindings": (("gmem_file", "bindings"), ("kvm_gmem", "bindings")),
    "gmem_file_kvm": (("gmem_file", "kvm"), ("kvm_gmem", "kvm")),
    "kvm_mm": (("kvm", "mm"),),
    "kvm_userspace_pid": (("kvm", "userspace_pid"),),
    "mm_struct_owner": (("mm_struct", "owner"),),
    "task_struct_pid": (("task_struct", "pid"),),
    "task_struct_tgid": (("task_struct", "tgid"),),
    "mce_status": (("mce", "status"),),
    "mce_addr": (("mce", "addr"),),
    "mce_misc": (("mce", "misc"),),
    "mce_bank": (("mce", "bank"),),
    "mce_extcpu": (("mce", "extcpu"),),
    "mce_socketid": (("mce", "socketid"),),
}

# Without these, nothing of a probe's story can be told.
_NEEDS: dict[str, tuple[str, ...]] = {
    "run": ("kvm_vcpu_kvm", "kvm_vcpu_vcpu_id", "kvm_vcpu_run", "kvm_run_exit_reason"),
    "faultin": ("kvm_vcpu_kvm", "kvm_vcpu_vcpu_id", "kvm_page_fault_gfn"),
    "gmem_error": ("address_space_host", "folio_index"),
    "sigbus": ("task_struct_pid", "task_struct_tgid"),
    "mce": ("mce_status", "mce_addr", "mce_bank"),
}

# The programs of each probe by way: bcc method and function name in kvmtrace.bpf.c.
_TRACEPOINTS = {"poison": "tp_poison", "mce": "tp_mce"}
_KPROBES = {
    "gmem": ("kp_gmem", "kr_gmem"),
    "faultin": ("kp_faultin", "kr_faultin"),
    "vm_new": ("kp_vm_new", "kr_vm_new"),
    "gmem_error": ("kp_gmem_error", None),
    "sigbus": ("kp_sigbus", None),
    "sigbus_forced": ("kp_sigbus_forced", None),
    "vm_gone": ("kp_vm_gone", None),
}


def import_bcc() -> Any:
    """The distribution's ``bcc`` module; raises KvmtraceError naming the package that has it."""
    try:
        import bcc  # noqa: PLC0415
    except ImportError as error:
        # Debian's package is for its own Python, which a virtual environment may not look at.
        if error.name not in ("bcc", None):
            raise KvmtraceError(f"bcc does not load: {error}", BCC_HINT) from error
        raise KvmtraceError("bcc is not installed (or not for this Python)", BCC_HINT) from error
    except OSError as error:
        raise KvmtraceError(f"bcc does not load: {error}", BCC_HINT) from error
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
    saved = os.dup(2)
    with tempfile.TemporaryFile() as caught:
        os.dup2(caught.fileno(), 2)
        try:
            yield lines
        finally:
            os.dup2(saved, 2)
            os.close(saved)
            caught.seek(0)
            lines += caught.read().decode(errors="replace").splitlines()


@dataclass(frozen=True, slots=True)
class _Symbol:
    module: str | None  # None: built in
    address: int


def read_symbols(names: set[str], path: str = "/proc/kallsyms") -> dict[str, _Symbol]:
    """Those of ``names`` that this kernel has. Addresses are 0 where they are not shown."""
    found: dict[str, _Symbol] = {}
    wanted = re.compile(
        rb"^([0-9a-f]+) \w ("
        + b"|".join(re.escape(n.encode()) for n in names)
        + rb")(?:\t\[(\w+)\])?$",
        re.MULTILINE,
    )
    with open(path, "rb") as symbols:
        for match in wanted.finditer(symbols.read()):
            module = match[3].decode() if match[3] else None
            found.setdefault(match[2].decode(), _Symbol(module, int(match[1], 16)))
    return found


class BpfSource:
    """Events by eBPF. Raises KvmtraceError where bcc, BTF or the kernel do not play along."""

    name = "bpf"

    def __init__(self) -> None:
        self.why: str | None = None
        self._bcc = import_bcc()
        self._translator = Translator(epoch_offset_ns(), host.memory_failure_names())
        self._programs = _Programs(self._bcc)
        self._next_watch = 0.0
        self._closed = False
        self._backlog: list[Event] = self._translator.start()

    def poll(self, timeout: float) -> list[Event]:
        """Events since the last call; ``timeout`` 0 reads all that the kernel has counted."""
        events, self._backlog = self._backlog, []
        if time.monotonic() >= self._next_watch:
            self._next_watch = time.monotonic() + _WATCH_SECONDS
            events += self._watch_kvm()
            events += self._translator.housekeeping()
        self._programs.wait(0 if events else timeout)
        events += self._drain()
        return events

    def probes(self) -> tuple[Probe, ...]:
        return self._programs.states

    def probe_runs(self) -> Mapping[str, ProbeRuns]:
        return self._programs.runs()

    def close(self) -> None:
        if not self._closed:
            self._closed = True
            self._programs.close()

    def _drain(self) -> list[Event]:
        events = self._translator.translate(self._programs.take(), self._programs)
        events += self._translator.counters(self._programs)
        return events

    def _watch_kvm(self) -> list[Event]:
        """Attach anew when kvm comes; let go when it wants to be unloaded."""
        if not self._programs.outdated():
            return []
        events = self._drain()
        events += self._translator.flush(self._programs)
        self._programs.close()
        self._programs = _Programs(self._bcc)
        events += self._translator.start()
        return events


class _Programs:
    """One compiled and attached set of programs, for the kvm module that is there now."""

    def __init__(self, bcc: Any) -> None:
        self._kvm = _kvm_modules()
        self._raw: list[bytes] = []
        self._attached: dict[str, list[Any]] = {}
        specs = probes.specs()
        names = {target for spec in specs for target in spec.targets if not spec.is_tracepoint}
        symbols = read_symbols(names | {"kvm_running_vcpu", "__per_cpu_offset"})
        self._btf = btf = Btf()
        try:
            offsets = {name: _offset(btf, where) for name, where in _OFFSETS.items()}
            targets = {
                spec.name: next((t for t in spec.targets if t in symbols), None) for spec in specs
            }
            arguments = {name: btf.arguments(target) for name, target in targets.items() if target}
        finally:
            btf.close()
        self._bpf = self._compile(bcc, offsets, targets, symbols, arguments)
        self.states = tuple(
            self._attach(spec, targets[spec.name], symbols, offsets, arguments.get(spec.name))
            for spec in specs
        )
        if not any(state.attached for state in self.states):
            why = next((state.why for state in self.states if state.why), "no reason given")
            self.close()
            raise KvmtraceError(f"no eBPF program could be attached: {why}", "kvmtrace doctor")
        with quiet_stderr():
            self._bpf["ring"].open_ring_buffer(self._receive)

    def _compile(
        self,
        bcc: Any,
        offsets: Mapping[str, int | None],
        targets: Mapping[str, str | None],
        symbols: Mapping[str, _Symbol],
        arguments: Mapping[str, tuple[str, ...] | None],
    ) -> Any:
        source = files.bpf_dir()
        cflags = [
            f"-I{source}",
            f"-DRING_PAGES={RING_PAGES}",
            f"-DMAX_KEYS={MAX_KEYS}",
            f"-DMAX_OVERFLOW={MAX_OVERFLOW}",
            f"-DPAGE_SHIFT_={kvm.PAGE_SHIFT}",
            f"-DWATCH_GMEM={int(targets.get('gmem') is not None)}",
        ]
        cflags += [
            f"-DOFF_{name}={-1 if offset is None else offset}" for name, offset in offsets.items()
        ]
        for name, target in targets.items():
            args = arguments.get(name)
            if target and args is not None:
                at = next(spec.at for spec in probes.specs() if spec.name == name)
                prefix = "kfunc" if at == "entry" else "kretfunc"
                module = symbols[target].module or "vmlinux"
                cflags.append(f"-DFN_{name}={prefix}__{module}__{target}")
                cflags.append(f"-DNARGS_{name}={len(args)}")
        running, per_cpu = symbols.get("kvm_running_vcpu"), symbols.get("__per_cpu_offset")
        if running and per_cpu and per_cpu.address:
            cflags.append(f"-DSYM_KVM_RUNNING_VCPU={running.address:#x}ULL")
            cflags.append(f"-DSYM_PER_CPU_OFFSET={per_cpu.address:#x}ULL")

        # bcc attaches by function name on construction, all or nothing; each probe has its own
        # fate here.
        unattached = type("BPF", (bcc.BPF,), {"_trace_autoload": lambda self: None})
        os.environ["BCC_KERNEL_SOURCE"] = str(source / "stubs")
        with quiet_stderr() as said:
            try:
                return unattached(src_file=os.fsencode(source / "kvmtrace.bpf.c"), cflags=cflags)
            except Exception as error:  # bcc raises bare Exception
                reason = str(error)
        reason = next((line for line in said if "error" in line), None) or reason
        raise KvmtraceError(
            f"bcc could not compile or create maps: {reason}",
            "kernel lockdown or a missing capability refuses BPF: see kvmtrace doctor",
        )

    def _attach(
        self,
        spec: probes.ProbeSpec,
        target: str | None,
        symbols: Mapping[str, _Symbol],
        offsets: Mapping[str, int | None],
        arguments: tuple[str, ...] | None,
    ) -> Probe:
        missing = [n for n in _NEEDS.get(spec.name, ()) if offsets.get(n) is None]
        if spec.is_tracepoint:
            if missing:
                return Probe(spec.name, False, why=f"BTF has no {missing[0]}")
            return self._attach_tracepoint(spec)
        if target is None:
            module = "" if self._kvm else " (kvm is not loaded)"
            wanted = " or ".join(spec.targets)
            return Probe(spec.name, False, why=f"this kernel has no {wanted}{module}")
        if missing:
            return Probe(spec.name, False, target, why=f"BTF has no {missing[0]}")
        why = "BTF does not know it"
        if arguments is not None:
            why_not = self._attach_trampoline(spec, target, symbols[target])
            if why_not is None:
                via = "fentry" if spec.at == "entry" else "fexit"
                return Probe(spec.name, True, target, via)
            why = why_not
        why_not, via = self._attach_kprobe(spec, target)
        if why_not is None:
            return Probe(spec.name, True, target, via)
        return Probe(spec.name, False, target, why=f"fentry: {why}; kprobe: {why_not}")

    def _attach_tracepoint(self, spec: probes.ProbeSpec) -> Probe:
        target = spec.targets[0]
        why = self._try(
            spec.name,
            lambda: self._bpf.attach_raw_tracepoint(
                tp=target.partition(":")[2].encode(), fn_name=_TRACEPOINTS[spec.name].encode()
            ),
            _TRACEPOINTS[spec.name],
        )
        if why is None:
            return Probe(spec.name, True, target, "raw_tracepoint")
        return Probe(spec.name, False, target, why=why)

    def _attach_trampoline(
        self, spec: probes.ProbeSpec, target: str, symbol: _Symbol
    ) -> str | None:
        prefix = "kfunc" if spec.at == "entry" else "kretfunc"
        name = f"{prefix}__{symbol.module or 'vmlinux'}__{target}"
        attach = self._bpf.attach_kfunc if spec.at == "entry" else self._bpf.attach_kretfunc
        return self._try(spec.name, lambda: attach(fn_name=name.encode()), name)

    def _attach_kprobe(self, spec: probes.ProbeSpec, target: str) -> tuple[str | None, str]:
        event = target.encode()
        if spec.name == "run":
            why = self._try(
                spec.name,
                lambda: self._bpf.attach_kprobe(event=event, fn_name=b"kp_run"),
                "kp_run",
            )
            why = why or self._try(
                spec.name,
                lambda: self._bpf.attach_raw_tracepoint(
                    tp=b"kvm_userspace_exit", fn_name=b"tp_run"
                ),
                "tp_run",
            )
            return why, "kprobe+raw_tracepoint"
        entry, leave = _KPROBES[spec.name]
        why = self._try(
            spec.name,
            lambda: self._bpf.attach_kprobe(event=event, fn_name=entry.encode()),
            entry,
        )
        if leave is None:
            return why, "kprobe"
        why = why or self._try(
            spec.name,
            lambda: self._bpf.attach_kretprobe(event=event, fn_name=leave.encode()),
            leave,
        )
        return why, "kretprobe"

    def _try(self, probe: str, attach: Any, function: str) -> str | None:
        """Attach one program; the reason in one line if that fails."""
        with quiet_stderr() as said:
            try:
                attach()
            except Exception as error:  # bcc raises bare Exception
                reason = str(error).replace("\n", " ")
            else:
                self._attached.setdefault(probe, []).append(self._bpf.funcs[function.encode()])
                return None
        told = [line.strip() for line in said if line.strip()]
        return f"{reason} ({told[0]})" if told else reason

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

    def counters(self) -> list[tuple[records.ExitKey, records.ExitCount]]:
        """The exact counters, from the map and from its overflow."""
        rows = []
        for name in ("exits", "overflow"):
            for key, count in self._bpf[name].items():
                rows.append(
                    (
                        records.ExitKey.from_buffer_copy(key),
                        records.ExitCount.from_buffer_copy(count),
                    )
                )
        return rows

    def forget(self, keys: list[records.ExitKey]) -> None:
        """Drop the counters of a VM that is gone."""
        for name in ("exits", "overflow"):
            table = self._bpf[name]
            for key in keys:
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
            runs = run_ns = 0
            for function in functions:
                with contextlib.suppress(OSError), open(f"/proc/self/fdinfo/{function.fd}") as info:
                    fields = dict(line.split(":", 1) for line in info if ":" in line)
                    runs += int(fields.get("run_cnt", 0))
                    run_ns += int(fields.get("run_time_ns", 0))
            if run_ns:
                found[probe] = ProbeRuns(runs, run_ns)
        return found

    def outdated(self) -> bool:
        """Whether kvm or its vendor module came or went since these were attached."""
        return _kvm_modules() != self._kvm

    def close(self) -> None:
        self.states = tuple(
            Probe(state.name, False, state.target, why="closed")
            for state in getattr(self, "states", ())
        )
        with quiet_stderr():
            self._bpf.cleanup()


def _kvm_modules() -> tuple[str, ...]:
    """What there is of kvm, with what makes one loading of it different from the next."""
    found = []
    for module in ("kvm", "kvm_amd", "kvm_intel"):
        with contextlib.suppress(OSError):
            found.append(f"{module}:{os.stat(f'/sys/module/{module}').st_ino}")
    return tuple(found)


def _offset(btf: Btf, candidates: tuple[tuple[str, str], ...]) -> int | None:
    for struct, member in candidates:
        offset = btf.offset(struct, member)
        if offset is not None:
            return offset
    return None
