"""Attach programs that leave after one comparison, as a measure: what being attached costs.

``WAY NUMBER`` as arguments; prints "attached" and stays until its standard input is closed.
Imports nothing of tests, so that a machine of the lab can run its text (``python3 -c``).
"""

from __future__ import annotations

import ctypes
import os
import struct
import sys
from pathlib import Path

from kvmtrace.linux.btf import Btf
from kvmtrace.linux.tracefs import mount
from kvmtrace.sources.bpf import loader as bpf_loader
from kvmtrace.sources.bpf.compiler import CompiledProgram, CompiledPrograms
from kvmtrace.sources.bpf.loader import Loader
from kvmtrace.sources.bpf.system_call import LIBC

EVENT, FUNCTION = "kvm:kvm_userspace_exit", "kvm_arch_vcpu_ioctl_run"


def _instruction(opcode: int, registers: int = 0, offset: int = 0, number: int = 0) -> bytes:
    return struct.pack("<BBhi", opcode, registers, offset, number)


_LEAVE = b"".join(
    (
        _instruction(0x65, 1, 0, -1),  # if r1 s> -1: goes on at the next one, as both ways end
        _instruction(0xB7),  # r0 = 0
        _instruction(0x95),  # exit
    )
)
_SIGN_EXTEND = _instruction(0x67, 1, 0, 32) + _instruction(0xC7, 1, 0, 32)
# r1 = the errno: the second argument of the raw tracepoint, what follows the only argument of the
# function, the last field of the trace event.
_BY_ARGUMENT = _instruction(0x79, 0x11, 8) + _SIGN_EXTEND + _LEAVE
_BY_FIELD = _instruction(0x61, 0x11, 12) + _SIGN_EXTEND + _LEAVE

PROGRAMS = CompiledPrograms(
    "by hand",
    {},
    {
        "raw_tracepoint": CompiledProgram(_BY_ARGUMENT, ()),
        "fexit": CompiledProgram(_BY_ARGUMENT, ()),
        "tracepoint": CompiledProgram(_BY_FIELD, ()),
    },
)


def attach(loader: Loader, way: str) -> int:
    """One more program; its descriptor. Raises OSError."""
    if way == "raw_tracepoint":
        return loader.attach_raw_tracepoint(way, EVENT.partition(":")[2])
    if way == "tracepoint":
        number = mount.event_id(mount.event_format(EVENT, mount.tracefs() or ""))
        assert number is not None
        return loader.attach_tracepoint(way, number)
    function = Btf().function(FUNCTION)
    assert function is not None
    return loader.attach_function(way, function, entry=False, copy=0)


def count_all_events() -> None:
    """As ``perf stat -a -e 'kvm:*'`` does: every tracepoint of kvm is counted on every CPU."""
    for path in sorted(Path(mount.tracefs() or "").glob("events/kvm/*/id")):
        for cpu in range(os.cpu_count() or 1):
            event = bpf_loader._PerfEvent(type=2, config=int(path.read_text()))
            event.size = ctypes.sizeof(event)
            words = map(ctypes.c_long, (-1, cpu, -1, 0))
            number = bpf_loader._PERF_EVENT_OPEN[os.uname().machine]
            if LIBC.syscall(ctypes.c_long(number), ctypes.byref(event), *words) < 0:
                raise OSError(ctypes.get_errno(), str(path))


def main() -> None:
    """As the module says."""
    loader = Loader(PROGRAMS, {})
    if sys.argv[1] == "perf":
        count_all_events()
    else:
        for _ in range(int(sys.argv[2])):
            attach(loader, sys.argv[1])
    print("attached", flush=True)
    sys.stdin.read()


if __name__ == "__main__":
    main()
