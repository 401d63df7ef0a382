"""Copies of one eBPF program on one function, each with a number of its own.

The kernel skips a program while it is preempted on the same CPU (kernel/bpf/trampoline.c), but not
its copies. In C a program gets its copy number by calling a helper that does not exist. Before a
copy is loaded, that call is replaced by the number.
"""

from __future__ import annotations

import struct

COPY_NUMBER_HELPER = 0x6B000000
"""The helper's number, beyond all helpers of the kernel."""

COPIES = {"run": 3, "gmem": 3, "faultin": 3, "sigbus": 3}
DEFAULT_COPIES = 2
"""Copies by probe: no call is lost while fewer threads of a CPU are preempted in the program."""

# include/uapi/linux/bpf.h: struct bpf_insn
_INSN = struct.Struct("<BBhi")
_CALL = 0x85
_MOV64_IMM = 0xB7
_RESULT = 0  # the register


class Code:
    """A compiled program, changed in place: ``code`` is the memory that it is loaded from."""

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
        """How many copies to attach; 1 if the program does not use its copy number."""
        return COPIES.get(probe, DEFAULT_COPIES) if self._calls else 1

    def set_copy_number(self, copy: int) -> None:
        """Make this the copy that is loaded next."""
        for at in self._calls:
            self._code[at : at + _INSN.size] = _INSN.pack(_MOV64_IMM, _RESULT, 0, copy)
