"""Programs in this kernel, as far as it lets us: loaded, run, attached, detached."""

from __future__ import annotations

import errno
import os
import struct
from collections.abc import Iterator

import pytest

from kvmtrace.linux.btf import FunctionType
from kvmtrace.sources.bpf.compiler import CompiledProgram, CompiledPrograms, MapDefinition
from kvmtrace.sources.bpf.copies import PLACEHOLDERS
from kvmtrace.sources.bpf.loader import Loader, LoadError

PLACEHOLDER = PLACEHOLDERS["kvm_running_vcpu"]


def instruction(opcode: int, registers: int = 0, offset: int = 0, number: int = 0) -> bytes:
    return struct.pack("<BBhI", opcode, registers, offset, number)


EXIT = instruction(0x95)
RETURN_0 = instruction(0xB7) + EXIT
# value of the map's first row = (placeholder or argument, see below)
STORE = b"".join(
    (
        instruction(0x62, 10, -4, 0),  # *(u32 *)(fp - 4) = 0
        instruction(0xBF, 0xA2),  # r2 = fp
        instruction(0x07, 2, 0, 0xFFFFFFFC),  # r2 += -4
        instruction(0x18, 0x11),  # r1 = the map
        instruction(0),
        instruction(0x85, 0, 0, 1),  # bpf_map_lookup_elem
        instruction(0x15, 0, 3, 0),  # if r0 == 0 goto the end
        instruction(0x18, 1, 0, PLACEHOLDER & 0xFFFFFFFF),
        instruction(0, 0, 0, PLACEHOLDER >> 32),
        instruction(0x7B, 0x10),  # *(u64 *)r0 = r1
    )
)
COMPILED = CompiledPrograms(
    "by hand",
    {"result": MapDefinition(2, 4, 8, 1, 0), "ring": MapDefinition(27, 0, 0, 1 << 16, 0)},
    {
        "store": CompiledProgram(STORE + RETURN_0, ((24, "result"),)),
        "wrong": CompiledProgram(instruction(0xBF, 0x50) + EXIT, ()),  # r0 = r5
        "fn_x": CompiledProgram(RETURN_0, ()),
        "kp_x": CompiledProgram(RETURN_0, ()),
    },
)
ADDRESS = 0xFFFFFFFF81234567


@pytest.fixture
def loader() -> Iterator[Loader]:
    try:
        made = Loader(COMPILED, {PLACEHOLDER: ADDRESS})
        made.load("store")
    except OSError as error:
        pytest.skip(f"this kernel does not let us load programs: {error}")
    yield made
    made.close()


def descriptors() -> int:
    return len(os.listdir("/proc/self/fd"))


def test_a_program_is_run(loader: Loader) -> None:
    loader.run(loader.load("store"), (1, 2))
    assert loader.maps["result"].lookup(bytes(4)) == ADDRESS.to_bytes(8, "little")


def test_it_has_its_name(loader: Loader) -> None:
    assert "store" in loader
    assert "other" not in loader
    assert loader.copies("store", "run") == 1


def test_the_verifier_says_why(loader: Loader) -> None:
    with pytest.raises(LoadError) as raised:
        loader.load("wrong")
    assert raised.value.errno in (errno.EACCES, errno.EINVAL)
    assert "R5" in raised.value.log


def test_a_tracepoint_that_there_is_and_one_that_there_is_not(loader: Loader) -> None:
    program = loader.attach_raw_tracepoint("store", "sched_switch")
    with open(f"/proc/self/fdinfo/{program}") as info:
        assert "prog_type:\t17" in info.read()
    with pytest.raises(FileNotFoundError):
        loader.attach_raw_tracepoint("store", "no_such_event")


def test_one_program_is_detached(loader: Loader) -> None:
    before = descriptors()
    first, second = (loader.attach_raw_tracepoint("store", "sched_switch") for _ in range(2))
    loader.detach(first)
    with pytest.raises(OSError, match="Bad file descriptor"):
        os.fstat(first)
    os.fstat(second)
    loader.detach(second)
    assert descriptors() == before


def test_what_cannot_be_attached_is_an_error_of_its_own(loader: Loader) -> None:
    with pytest.raises(OSError, match="No such file"):
        loader.attach_function("fn_x", FunctionType("no_such_module", 1, ()), entry=True, copy=0)
    with pytest.raises(OSError, match=r"."):
        loader.attach_function("fn_x", FunctionType(None, 1 << 30, ()), entry=False, copy=0)
    with pytest.raises(OSError, match=r"."):
        loader.attach_kprobe("kp_x", "no_such_function", entry=True)
    with pytest.raises(OSError, match=r"."):
        loader.attach_tracepoint("kp_x", 1 << 20)


def test_closing_leaves_nothing_open(loader: Loader) -> None:
    before = descriptors()
    other = Loader(COMPILED, {})
    other.attach_raw_tracepoint("store", "sched_switch")
    with pytest.raises(LoadError):
        other.load("wrong")
    other.close()
    other.close()
    assert descriptors() == before
