"""Copies of a program differ in their number and in nothing else."""

from __future__ import annotations

import struct

from kvmtrace.sources.bpf.copies import COPIES, COPY_NUMBER_HELPER, DEFAULT_COPIES, Code

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
