"""Copies of one eBPF program on one function, each with a number of its own.

The kernel skips a program that is preempted on the same CPU (kernel/bpf/trampoline.c), copies of it
not. C asks for its number by calling a helper that there is none of; before a copy is loaded, that
call is made the number.
"""

from __future__ import annotations

import struct

COPY_NUMBER_HELPER = 0x6B000000
"""The helper's number; beyond all that the kernel has."""

COPIES = {"run": 3, "gmem": 3, "faultin": 3, "sigbus": 3}
DEFAULT_COPIES = 2
"""How many of each probe: as many threads of one CPU, all of them busy with it, lose nothing."""

# include/uapi/linux/bpf.h: struct bpf_insn
_INSN = struct.Struct("<BBhi")
_CALL = 0x85
_MOV64_IMM = 0xB7
_RESULT = 0  # the register


class Code:
    """A program as it was compiled, in place: ``code`` is the memory (bytes) it is loaded from."""

    def __init__(self, code: memoryview) -> None:
        self._code = code
        self.size = len(code)
        insns = enumerate(_INSN.iter_unpack(bytes(code)))
        self._calls = [
            place * _INSN.size
            for place, (opcode, _, _, number) in insns
            if opcode == _CALL and number == COPY_NUMBER_HELPER
        ]

    def copies(self, probe: str) -> int:
        """How many there should be; 1 where it does not ask which it is."""
        return COPIES.get(probe, DEFAULT_COPIES) if self._calls else 1

    def set_copy_number(self, copy: int) -> None:
        """What is loaded next is this copy."""
        for at in self._calls:
            self._code[at : at + _INSN.size] = _INSN.pack(_MOV64_IMM, _RESULT, 0, copy)
