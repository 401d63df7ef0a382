"""BTF without libbpf: where a member of a struct is, read from the kernel's blob itself.

For hosts where libbpf (btf.py) is not installed; one walk over all types, a fraction of a second.
The format is Documentation/bpf/btf.rst.
"""

from __future__ import annotations

import struct
import sys
from collections.abc import Iterator

VMLINUX = "/sys/kernel/btf/vmlinux"

_MAGIC = 0xEB9F
_HEADER = struct.Struct("=HBBIIIII")  # magic, version, flags, length, types (at, bytes), strings
_TYPE = struct.Struct("=III")  # name, info, size or type
_MEMBER = struct.Struct("=III")  # name, type, offset in bits
_STRUCT = 4

# include/uapi/linux/btf.h: bytes behind a type's head, by kind: (once, for each of vlen)
_BEHIND = {
    1: (4, 0),  # INT
    3: (12, 0),  # ARRAY
    4: (0, 12),  # STRUCT
    5: (0, 12),  # UNION
    6: (0, 8),  # ENUM
    13: (0, 8),  # FUNC_PROTO
    14: (4, 0),  # VAR
    15: (0, 12),  # DATASEC
    17: (4, 0),  # DECL_TAG
    19: (0, 12),  # ENUM64
}
# PTR, FWD, TYPEDEF, VOLATILE, CONST, RESTRICT, FUNC, FLOAT, TYPE_TAG: the head is all.
_HEAD_ONLY = frozenset((2, 7, 8, 9, 10, 11, 12, 16, 18))


def offset(name: str, member: str, path: str = VMLINUX) -> int | None:
    """Byte offset of a struct's own member (not of an anonymous struct in it).

    None where there is no BTF, no such member, or a kind of type that is not known here.
    """
    try:
        with open(path, "rb") as file:
            blob = file.read()
        return _offset(blob, name.encode(), member.encode())
    except (OSError, ValueError, struct.error):
        return None


def _offset(blob: bytes, name: bytes, member: bytes) -> int | None:
    magic, _, _, header, at, length, strings, size = _HEADER.unpack_from(blob)
    if magic != _MAGIC:
        raise ValueError(f"no BTF of a {sys.byteorder}-endian kernel")
    text = blob[header + strings : header + strings + size]

    def named(place: int, wanted: bytes) -> bool:
        return text.startswith(wanted + b"\0", place)

    for where, kind_flag, count in _structs(blob, header + at, header + at + length):
        if named(_TYPE.unpack_from(blob, where)[0], name):
            for one in range(count):
                own, _, bits = _MEMBER.unpack_from(blob, where + 12 * (one + 1))
                if named(own, member):
                    is_bit_field = kind_flag and bits >> 24
                    return None if is_bit_field or bits % 8 else (bits & 0xFFFFFF) // 8
    return None


def _structs(blob: bytes, at: int, end: int) -> Iterator[tuple[int, bool, int]]:
    """(where, kind_flag, number of members) of every struct."""
    while at < end:
        _, info, _ = _TYPE.unpack_from(blob, at)
        kind, count = info >> 24 & 0x1F, info & 0xFFFF
        if kind == _STRUCT:
            yield at, bool(info >> 31), count
        if kind in _BEHIND:
            once, each = _BEHIND[kind]
            at += once + each * count
        elif kind not in _HEAD_ONLY:
            raise ValueError(f"BTF kind {kind}")
        at += _TYPE.size
