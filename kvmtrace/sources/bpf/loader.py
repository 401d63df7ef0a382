"""Compiled eBPF programs in the kernel: maps made, programs loaded, attached and run.

All by bpf(2) and perf_event_open(2): neither bcc nor libbpf is in this process.
"""

from __future__ import annotations

import contextlib
import ctypes
import errno
import fcntl
import os
from collections.abc import Mapping
from ctypes import c_char, c_int32, c_uint32, c_uint64
from dataclasses import dataclass

from kvmtrace.linux.btf import FunctionType
from kvmtrace.sources.bpf.compiler import CompiledPrograms
from kvmtrace.sources.bpf.copies import Code
from kvmtrace.sources.bpf.kernel_map import NAME_LENGTH, KernelMap
from kvmtrace.sources.bpf.system_call import LIBC, bpf, bpf_charged

# include/uapi/linux/bpf.h: enum bpf_cmd, bpf_prog_type, bpf_attach_type
_PROG_LOAD, _TEST_RUN, _RAW_TRACEPOINT_OPEN = 5, 10, 17
_OBJ_INFO, _BTF_FD, _BTF_NEXT_ID = 15, 19, 23
_KPROBE, _TRACEPOINT, _RAW_TRACEPOINT, _TRACING = 2, 5, 17, 26
_FENTRY, _FEXIT = 24, 25

_LOG_SIZE = 1 << 20

_PMU = "/sys/bus/event_source/devices/kprobe"

# include/uapi/linux/perf_event.h; perf_event_open is not in libc
_PERF_EVENT_OPEN = {"x86_64": 298, "aarch64": 241}
_PERF_TYPE_TRACEPOINT = 2
_PERF_FLAG_FD_CLOEXEC = 8
_PERF_SET_BPF, _PERF_ENABLE = 0x40042408, 0x2400  # ioctl(2)


class _Load(ctypes.Structure):
    _fields_ = (
        ("prog_type", c_uint32),
        ("insn_cnt", c_uint32),
        ("insns", c_uint64),
        ("license", c_uint64),
        ("log_level", c_uint32),
        ("log_size", c_uint32),
        ("log_buf", c_uint64),
        ("kern_version", c_uint32),
        ("prog_flags", c_uint32),
        ("prog_name", c_char * (NAME_LENGTH + 1)),
        ("prog_ifindex", c_uint32),
        ("expected_attach_type", c_uint32),
        ("prog_btf_fd", c_uint32),
        ("func_info_rec_size", c_uint32),
        ("func_info", c_uint64),
        ("func_info_cnt", c_uint32),
        ("line_info_rec_size", c_uint32),
        ("line_info", c_uint64),
        ("line_info_cnt", c_uint32),
        ("attach_btf_id", c_uint32),
        ("attach_btf_obj_fd", c_uint32),
        ("pad", c_uint32),
    )


class _RawTracepoint(ctypes.Structure):
    _fields_ = (("name", c_uint64), ("prog_fd", c_uint32), ("pad", c_uint32))


class _TestRun(ctypes.Structure):
    _fields_ = (
        ("prog_fd", c_uint32),
        ("retval", c_uint32),
        ("data_size_in", c_uint32),
        ("data_size_out", c_uint32),
        ("data_in", c_uint64),
        ("data_out", c_uint64),
        ("repeat", c_uint32),
        ("duration", c_uint32),
        ("ctx_size_in", c_uint32),
        ("ctx_size_out", c_uint32),
        ("ctx_in", c_uint64),
        ("ctx_out", c_uint64),
        ("flags", c_uint32),
        ("cpu", c_uint32),
        ("batch_size", c_uint32),
        ("pad", c_uint32),
    )


class _Id(ctypes.Structure):
    _fields_ = (("id", c_uint32), ("next_id", c_uint32), ("open_flags", c_uint32))


class _Info(ctypes.Structure):
    _fields_ = (("bpf_fd", c_uint32), ("info_len", c_uint32), ("info", c_uint64))


class _BtfInfo(ctypes.Structure):
    """struct bpf_btf_info."""

    _fields_ = (
        ("btf", c_uint64),
        ("btf_size", c_uint32),
        ("id", c_uint32),
        ("name", c_uint64),
        ("name_len", c_uint32),
        ("kernel_btf", c_uint32),
    )


class _PerfEvent(ctypes.Structure):
    """struct perf_event_attr."""

    _fields_ = (
        ("type", c_uint32),
        ("size", c_uint32),
        ("config", c_uint64),
        ("sample_period", c_uint64),
        ("sample_type", c_uint64),
        ("read_format", c_uint64),
        ("flags", c_uint64),
        ("wakeup_events", c_uint32),
        ("bp_type", c_uint32),
        ("kprobe_func", c_uint64),
        ("probe_offset", c_uint64),
        ("rest", c_uint64 * 5),
        ("more", c_int32 * 2),
    )


class LoadError(OSError):
    """The kernel refused a program; ``log``: what its verifier says, the last word."""

    def __init__(self, number: int, log: str) -> None:
        super().__init__(number, os.strerror(number))
        self.log = log


@dataclass(slots=True)
class _Program:
    """One program as it was compiled, its maps and addresses filled in."""

    instructions: bytearray
    code: Code


class Loader:
    """The maps and programs of one compilation. ``close`` detaches all.

    ``addresses``: by placeholder, see ``copies``. Raises OSError if maps cannot be made.
    """

    def __init__(self, compiled: CompiledPrograms, addresses: Mapping[int, int]) -> None:
        self.maps: dict[str, KernelMap] = {}
        self._programs: dict[str, _Program] = {}
        self._descriptors: list[int] = []
        self._links: dict[int, int] = {}  # by program on a raw tracepoint
        self._types: dict[str, int] = {}  # descriptor of a module's BTF, by module
        try:
            for name, definition in compiled.maps.items():
                self.maps[name] = KernelMap(name, definition)
        except OSError:
            self.close()
            raise
        self._addresses = addresses
        self.add(compiled)

    def add(self, compiled: CompiledPrograms) -> None:
        """Add programs that use the same maps; those that are there already stay."""
        for name in compiled.programs.keys() - self._programs.keys():
            program = compiled.programs[name]
            instructions = bytearray(program.code)
            code = Code(memoryview(instructions))
            for place, map_name in program.maps:
                code.set_map(place, self.maps[map_name].fd)
            code.set_addresses(self._addresses)
            self._programs[name] = _Program(instructions, code)

    def __contains__(self, name: str) -> bool:
        return name in self._programs

    def copies(self, name: str, probe: str) -> int:
        """How many copies of a program ``probe`` should have (see ``copies``)."""
        return self._programs[name].code.copies(probe)

    # Each returns the program's file descriptor, and raises OSError or LoadError. What they open
    # is closed by ``close``.

    def attach_function(self, name: str, target: FunctionType, *, entry: bool, copy: int) -> int:
        """By fentry or fexit."""
        self._programs[name].code.set_copy_number(copy)
        module = self._types_of(target.module) if target.module else 0
        program = self._load(name, _TRACING, _FENTRY if entry else _FEXIT, target.type_id, module)
        self._keep(bpf(_RAW_TRACEPOINT_OPEN, _RawTracepoint(0, program)))
        return program

    def attach_raw_tracepoint(self, name: str, event: str, *, copy: int = 0) -> int:
        """At an event, by its name without the system."""
        self._programs[name].code.set_copy_number(copy)
        program = self.load(name)
        text = ctypes.create_string_buffer(event.encode())
        link = bpf(_RAW_TRACEPOINT_OPEN, _RawTracepoint(ctypes.addressof(text), program))
        self._links[program] = self._keep(link)
        return program

    def attach_tracepoint(self, name: str, event_id: int) -> int:
        """At an event, by its number in tracefs; preemption is off while such a program runs."""
        program = self._load(name, _TRACEPOINT)
        self._attach_event(_PerfEvent(type=_PERF_TYPE_TRACEPOINT, config=event_id), program)
        return program

    def attach_kprobe(self, name: str, function: str, *, entry: bool) -> int:
        """By kprobe or kretprobe."""
        program = self._load(name, _KPROBE)
        try:
            kind = int(_text(f"{_PMU}/type"))
            # "config:0": the bit that asks for a kretprobe
            bit = 0 if entry else 1 << int(_text(f"{_PMU}/format/retprobe").partition(":")[2])
        except ValueError as error:
            raise OSError(errno.EOPNOTSUPP, os.strerror(errno.EOPNOTSUPP)) from error
        text = ctypes.create_string_buffer(function.encode())
        event = _PerfEvent(type=kind, config=bit, kprobe_func=ctypes.addressof(text))
        self._attach_event(event, program)
        return program

    def load(self, name: str) -> int:
        """A raw tracepoint's program, attached to nothing: ``run`` calls it."""
        return self._load(name, _RAW_TRACEPOINT)

    def run(self, program: int, arguments: tuple[int, ...]) -> None:
        """Run a program of ``load`` once (BPF_PROG_TEST_RUN, Linux 5.10)."""
        context = (c_uint64 * 12)(*arguments)
        size, at = ctypes.sizeof(context), ctypes.addressof(context)
        bpf(_TEST_RUN, _TestRun(prog_fd=program, ctx_size_in=size, ctx_in=at))

    def _load(
        self, name: str, kind: int, attach_type: int = 0, type_id: int = 0, types: int = 0
    ) -> int:
        instructions = self._programs[name].instructions
        memory = (c_char * len(instructions)).from_buffer(instructions)
        words = ctypes.create_string_buffer(b"GPL")
        load = _Load(
            prog_type=kind,
            insn_cnt=len(instructions) // 8,
            insns=ctypes.addressof(memory),
            license=ctypes.addressof(words),
            prog_name=name.encode()[:NAME_LENGTH],
            expected_attach_type=attach_type,
            attach_btf_id=type_id,
            attach_btf_obj_fd=types,
        )
        try:
            return self._keep(bpf_charged(_PROG_LOAD, load))
        except OSError as error:
            # Once more, to hear why. It costs memory and time that a program that loads need not.
            log = ctypes.create_string_buffer(_LOG_SIZE)
            load.log_level, load.log_size, load.log_buf = 1, _LOG_SIZE, ctypes.addressof(log)
            with contextlib.suppress(OSError):
                return self._keep(bpf(_PROG_LOAD, load))
            raise LoadError(error.errno or 0, _last_word(log.value)) from error

    def _attach_event(self, event: _PerfEvent, program: int) -> None:
        """One event on one CPU is enough: the program runs on all (kernel/trace/trace_event_perf.c,
        bpf_trace.c)."""
        event.size, event.sample_period, event.wakeup_events = ctypes.sizeof(event), 1, 1
        number = _PERF_EVENT_OPEN.get(os.uname().machine, 241)
        arguments = (ctypes.byref(event), *map(ctypes.c_long, (-1, 0, -1, _PERF_FLAG_FD_CLOEXEC)))
        opened = int(LIBC.syscall(ctypes.c_long(number), *arguments))
        if opened < 0:
            failed = ctypes.get_errno()
            raise OSError(failed, os.strerror(failed))
        self._keep(opened)
        fcntl.ioctl(opened, _PERF_SET_BPF, program)
        fcntl.ioctl(opened, _PERF_ENABLE, 0)

    def _types_of(self, module: str) -> int:
        """A descriptor of a module's BTF. Raises FileNotFoundError."""
        if module not in self._types:
            self._types[module] = self._keep(_open_types(module))
        return self._types[module]

    def _keep(self, descriptor: int) -> int:
        self._descriptors.append(descriptor)
        return descriptor

    def detach(self, program: int) -> None:
        """Undo ``attach_raw_tracepoint``."""
        for descriptor in (self._links.pop(program), program):
            self._descriptors.remove(descriptor)
            os.close(descriptor)

    def close(self) -> None:
        """Detach all programs, and delete the maps."""
        for descriptor in reversed(self._descriptors):
            os.close(descriptor)
        self._descriptors.clear()
        for one in self.maps.values():
            one.close()
        self.maps.clear()


def _open_types(module: str) -> int:
    name = ctypes.create_string_buffer(64)
    at = _Id()
    while True:
        try:
            bpf(_BTF_NEXT_ID, at)
        except FileNotFoundError:
            raise FileNotFoundError(errno.ENOENT, os.strerror(errno.ENOENT)) from None
        at = _Id(at.next_id)
        try:
            descriptor = bpf(_BTF_FD, at)
        except FileNotFoundError:
            continue  # unloaded meanwhile
        info = _BtfInfo(name=ctypes.addressof(name), name_len=ctypes.sizeof(name))
        try:
            bpf(_OBJ_INFO, _Info(descriptor, ctypes.sizeof(info), ctypes.addressof(info)))
        except OSError:
            os.close(descriptor)
            raise
        if info.kernel_btf and name.value.decode() == module:
            return descriptor
        os.close(descriptor)


def _last_word(log: bytes) -> str:
    """Why the verifier refuses a program: its last line but for its statistics."""
    lines = [line.strip() for line in log.decode(errors="replace").splitlines()]
    return next((line for line in reversed(lines) if line and not _is_statistics(line)), "")


def _is_statistics(line: str) -> bool:
    return line.startswith(("processed ", "verification time", "stack depth", "max_states"))


def _text(path: str) -> str:
    """Raises ValueError where the kernel has no such file."""
    try:
        with open(path) as file:
            return file.read().strip()
    except OSError as error:
        raise ValueError(str(error)) from error
