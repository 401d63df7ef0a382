"""Copies of a program differ in their number and in nothing else."""

from __future__ import annotations

import struct

from kvmtrace.sources.bpf.copies import (
    COPIES,
    COPY_NUMBER_HELPER,
    DEFAULT_COPIES,
    PLACEHOLDERS,
    Code,
)

# include/uapi/linux/bpf.h: opcode, src_reg and dst_reg, offset, immediate
GET_TID = struct.pack("<BBhi", 0x85, 0, 0, 14)
ASK = struct.pack("<BBhi", 0x85, 0, 0, COPY_NUMBER_HELPER)
LOAD = struct.pack("<BBhi", 0x18, 0x01, 0, COPY_NUMBER_HELPER)  # a constant that looks like it
EXIT = struct.pack("<BBhi", 0x95, 0, 0, 0)


def mov(number: int) -> bytes:
    """r0 = number"""
    return struct.pack("<BBhi", 0xB7, 0, 0, number)


def test_each_copy_has_its_number() -> None:
    memory = bytearray(GET_TID + ASK + LOAD + ASK + EXIT)
    code = Code(memoryview(memory))
    assert code.copies("run") == COPIES["run"]
    assert code.copies("vm_new") == DEFAULT_COPIES
    for number in range(3):
        code.set_copy_number(number)
        assert memory == GET_TID + mov(number) + LOAD + mov(number) + EXIT


def test_a_program_without_a_number_has_no_copies() -> None:
    memory = bytearray(GET_TID + LOAD + EXIT)
    code = Code(memoryview(memory))
    assert code.copies("run") == 1
    code.set_copy_number(0)
    assert memory == GET_TID + LOAD + EXIT


def load(number: int, source: int = 0) -> bytes:
    """r1 = number, or the map of that descriptor"""
    low, high = number & 0xFFFFFFFF, number >> 32
    return struct.pack("<BBHI", 0x18, 1 | source << 4, 0, low) + struct.pack("<BBHI", 0, 0, 0, high)


def test_addresses_take_their_placeholders_place() -> None:
    first, second = PLACEHOLDERS.values()
    memory = bytearray(load(first) + load(7) + load(second) + load(first) + EXIT)
    code = Code(memoryview(memory))
    assert code.placeholders() == {first, second}
    code.set_addresses({first: 0xFFFF888812345678, second: 0xFFFFFFFF81000000})
    assert memory == (
        load(0xFFFF888812345678)
        + load(7)
        + load(0xFFFFFFFF81000000)
        + load(0xFFFF888812345678)
        + EXIT
    )
    assert code.placeholders() == set()


def test_what_was_made_of_a_placeholder_is_seen() -> None:
    first = PLACEHOLDERS["kvm_running_vcpu"]
    assert Code(memoryview(bytearray(load(first + 8) + EXIT))).placeholders() == {first + 8}


def test_maps_have_their_places() -> None:
    memory = bytearray(GET_TID + load(5, source=1) + load(5) + load(6, source=1) + EXIT)
    code = Code(memoryview(memory))
    assert list(code.map_places()) == [(8, 5), (40, 6)]
    for at, _ in code.map_places():
        code.set_map(at, 0x7FFF)
    wanted = load(0x7FFF, source=1)
    assert memory == GET_TID + wanted + load(5) + wanted + EXIT
