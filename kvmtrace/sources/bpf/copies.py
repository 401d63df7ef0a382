"""What is filled into a compiled program before it is loaded: numbers that a compiler cannot know.

The kernel skips a program while it is preempted on the same CPU (kernel/bpf/trampoline.c), but not
its copies. In C a program gets its copy number by calling a helper that does not exist. Before a
copy is loaded, that call is replaced by the number. Addresses of the kernel's variables differ from
boot to boot: C has placeholders for them, which are replaced as well.
"""

from __future__ import annotations

import struct
from collections.abc import Iterator, Mapping

COPY_NUMBER_HELPER = 0x6B000000
"""The helper's number, beyond all helpers of the kernel."""

COPIES = {"run": 3, "gmem": 3, "faultin": 3, "sigbus": 12}
DEFAULT_COPIES = 2
"""Copies by probe: no call is lost while fewer threads of a CPU are preempted in the program.

A copy costs time at each call: ``sigbus`` is rarely called, and VMMs that ignore it call it without
end. Eight of them on one CPU were counted exactly by twelve copies, and four were not by three.
"""

PLACEHOLDERS = {
    "kvm_running_vcpu": 0x6B766D7472616301,
    "__per_cpu_offset": 0x6B766D7472616302,
}
"""By variable of the kernel: the number that stands for its address (``SYM_…`` in bpf/)."""

# include/uapi/linux/bpf.h: struct bpf_insn
INSTRUCTION = struct.Struct("<BBhi")
_CALL = 0x85
_MOV64_IMM = 0xB7
_LOAD_IMM64 = 0x18  # takes two instructions, half of the number in each
_PSEUDO_MAP = 1  # instead of a number, the descriptor of a map
_RESULT = 0  # the register
_LOW = 0xFFFFFFFF


class Code:
    """A compiled program, changed in place: ``code`` is the memory that it is loaded from."""

    def __init__(self, code: memoryview) -> None:
        self._code = code
        insns = enumerate(INSTRUCTION.iter_unpack(bytes(code)))
        self._calls = [
            place * INSTRUCTION.size
            for place, (opcode, _, _, number) in insns
            if opcode == _CALL and number == COPY_NUMBER_HELPER
        ]

    def copies(self, probe: str) -> int:
        """How many copies to attach; 1 if the program does not use its copy number."""
        return COPIES.get(probe, DEFAULT_COPIES) if self._calls else 1

    def set_copy_number(self, copy: int) -> None:
        """Make this the copy that is loaded next."""
        for at in self._calls:
            INSTRUCTION.pack_into(self._code, at, _MOV64_IMM, _RESULT, 0, copy)

    def map_places(self) -> Iterator[tuple[int, int]]:
        """(place, descriptor) of every map that the program uses."""
        for at, source, number in self._loads():
            if source == _PSEUDO_MAP:
                yield at, number & _LOW

    def set_map(self, at: int, descriptor: int) -> None:
        """Make the place ``at`` of ``map_places`` use this map."""
        opcode, registers, offset, _ = INSTRUCTION.unpack_from(self._code, at)
        INSTRUCTION.pack_into(self._code, at, opcode, registers, offset, descriptor)

    def placeholders(self) -> set[int]:
        """Numbers in the program that stand for something, or look like it."""
        some = next(iter(PLACEHOLDERS.values()))
        return {
            number
            for _, source, number in self._loads()
            if not source and number >> 16 == some >> 16
        }

    def set_addresses(self, addresses: Mapping[int, int]) -> None:
        """Put addresses in the place of their placeholders."""
        for at, source, number in list(self._loads()):
            if not source and number in addresses:
                address = addresses[number]
                for place, half in ((at, address & _LOW), (at + INSTRUCTION.size, address >> 32)):
                    struct.pack_into("<I", self._code, place + 4, half)

    def _loads(self) -> Iterator[tuple[int, int, int]]:
        """(place, source register, number) of every instruction that loads 64 bits."""
        at = 0
        while at < len(self._code):
            opcode, registers, _, low = INSTRUCTION.unpack_from(self._code, at)
            if opcode == _LOAD_IMM64:
                high = INSTRUCTION.unpack_from(self._code, at + INSTRUCTION.size)[3]
                yield at, registers >> 4, (high & _LOW) << 32 | low & _LOW
                at += INSTRUCTION.size
            at += INSTRUCTION.size
