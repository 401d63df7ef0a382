"""BTF: the layout of this kernel's structs and functions, read from the kernel's own blobs.

The format is Documentation/bpf/btf.rst. Reading vmlinux's 5 MB takes a tenth of a second.
"""

from __future__ import annotations

import contextlib
import struct
import sys
from array import array
from collections.abc import Iterator
from dataclasses import dataclass

from kvmtrace.errors import KvmtraceError

SYS_BTF = "/sys/kernel/btf"

_MAGIC = 0xEB9F
_HEADER = struct.Struct("=HBBIIIII")  # magic, version, flags, length, types (at, bytes), strings

# include/uapi/linux/btf.h. A type's head is three words (name; kind and number; size or type).
_STRUCT, _UNION, _FUNC = 4, 5, 12
_MODIFIERS = {8, 9, 10, 11, 18}  # TYPEDEF, VOLATILE, CONST, RESTRICT, TYPE_TAG
_HEAD = 3
# Words after the head by kind: once, and for each member, parameter or value.
_AFTER = {
    1: (1, 0),  # INT
    2: (0, 0),  # PTR
    3: (3, 0),  # ARRAY
    _STRUCT: (0, 3),
    _UNION: (0, 3),
    6: (0, 2),  # ENUM
    7: (0, 0),  # FWD
    8: (0, 0),
    9: (0, 0),
    10: (0, 0),
    11: (0, 0),
    _FUNC: (0, 0),
    13: (0, 2),  # FUNC_PROTO
    14: (1, 0),  # VAR
    15: (0, 3),  # DATASEC
    16: (0, 0),  # FLOAT
    17: (1, 0),  # DECL_TAG
    18: (0, 0),
    19: (0, 3),  # ENUM64
}
_MAX_DEPTH = 32  # of types in types; damaged BTF may have circles


@dataclass(frozen=True, slots=True)
class FunctionType:
    """A function in BTF. ``module``: None if built in. ``type_id``: in that BTF.

    ``arguments``: the names of its parameters.
    """

    module: str | None
    type_id: int
    arguments: tuple[str, ...]


class Btf:
    """The types of the running kernel and of its kvm module.

    Raises KvmtraceError if the kernel has no BTF that can be read.
    """

    def __init__(self, root: str = SYS_BTF) -> None:
        try:
            vmlinux = _Blob(f"{root}/vmlinux")
        except FileNotFoundError as error:
            raise KvmtraceError(
                "this kernel offers no BTF (type information)",
                f"a kernel built with CONFIG_DEBUG_INFO_BTF has {root}/vmlinux",
            ) from error
        except (OSError, ValueError) as error:
            raise KvmtraceError(
                "this kernel's BTF (type information) cannot be read",
                "`kvmtrace doctor` shows what can be done without it",
                str(error),
            ) from error
        self._blobs = [vmlinux]
        # There is none where kvm is built in or not loaded.
        with contextlib.suppress(OSError, ValueError):
            self._blobs.append(_Blob(f"{root}/kvm", vmlinux))

    @property
    def has_kvm(self) -> bool:
        """Whether kvm is a module that is loaded."""
        return len(self._blobs) > 1

    def offset(self, struct: str, path: str) -> int | None:
        """Byte offset of ``path`` ("a.b.c", nested structs, not pointers) in ``struct``.

        Members of anonymous structs and unions are found as C finds them. None if the struct or a
        member is not there, or is a bit field.
        """
        found = self._find(struct, _STRUCT)
        if found is None:
            return None
        blob, type_id = found
        total = 0
        for name in path.split("."):
            step = blob.member(type_id, name.encode())
            if step is None:
                return None
            total += step[0]
            type_id = step[1]
        return total

    def size(self, struct: str) -> int | None:
        """Size of a struct in bytes; None if it is not there."""
        found = self._find(struct, _STRUCT)
        return found[0].size_or_type(found[1]) if found else None

    def arguments(self, function: str) -> tuple[str, ...] | None:
        """Names of a function's parameters in order; None if BTF does not have it."""
        found = self.function(function)
        return found.arguments if found else None

    def function(self, name: str) -> FunctionType | None:
        """What BTF has of a function; None if nothing."""
        found = self._find(name, _FUNC)
        if found is None:
            return None
        blob, type_id = found
        arguments = blob.parameters(blob.size_or_type(type_id))
        if arguments is None:
            return None
        return FunctionType("kvm" if blob is not self._blobs[0] else None, type_id, arguments)

    def _find(self, name: str, kind: int) -> tuple[_Blob, int] | None:
        for blob in self._blobs:
            type_id = blob.find(name.encode(), kind)
            if type_id is not None:
                return blob, type_id
        return None


class _Blob:
    """The types and strings of one file. Raises OSError, ValueError.

    A module's (split BTF) continue those of vmlinux, ``base``: IDs of types and places of strings.
    """

    def __init__(self, path: str, base: _Blob | None = None) -> None:
        with open(path, "rb") as file:
            data = file.read()
        try:
            magic, _, _, header, at, length, strings, size = _HEADER.unpack_from(data)
        except struct.error as error:
            raise ValueError(str(error)) from error
        if magic != _MAGIC:
            raise ValueError(f"no BTF of a {sys.byteorder}-endian kernel")
        self._base = base
        self._first_id = base.end_id if base else 1
        self._first_text = base.end_text if base else 0
        self._text = data[header + strings : header + strings + size]
        self.end_text: int = self._first_text + len(self._text)
        self._words = array("I", data[header + at : header + at + length])
        # Where each type is, and the first type of a name (as its place among the strings).
        self._starts = array("I")
        self._named: dict[int, dict[int, int]] = {_STRUCT: {}, _FUNC: {}}
        self._index()
        self.end_id: int = self._first_id + len(self._starts)

    def _index(self) -> None:
        words, starts, named = self._words, self._starts, self._named
        at, end = 0, len(words)
        try:
            while at < end:
                info = words[at + 1]
                kind = info >> 24 & 0x1F
                once, each = _AFTER[kind]
                if kind in named:
                    named[kind].setdefault(words[at], self._first_id + len(starts))
                starts.append(at)
                at += _HEAD + once + each * (info & 0xFFFF)
        except (IndexError, KeyError) as error:
            raise ValueError(f"BTF has a type that is not known here: {error}") from error
        if at != end:
            raise ValueError("BTF ends within a type")

    def find(self, name: bytes, kind: int) -> int | None:
        """The first type of this name and kind in this blob."""
        named = self._named[kind]
        return next((named[at] for at in self._places(name) if at in named), None)

    def member(self, type_id: int, name: bytes, depth: int = 0) -> tuple[int, int] | None:
        """(byte offset, type) of a member of a struct or union; None for a bit field."""
        found = self._resolve(type_id)
        if found is None or depth > _MAX_DEPTH:
            return None
        words, at = found
        info = words[at + 1]
        if info >> 24 & 0x1F not in (_STRUCT, _UNION):
            return None
        kind_flag = info >> 31
        for one in range(at + _HEAD, at + _HEAD + 3 * (info & 0xFFFF), 3):
            own, type_id, offset = words[one : one + 3]
            bits = offset & 0xFFFFFF if kind_flag else offset
            if own and self._is_named(own, name):
                is_bit_field = kind_flag and offset >> 24
                return None if is_bit_field or bits % 8 else (bits // 8, type_id)
            if not own:
                inner = self.member(type_id, name, depth + 1)
                if inner is not None:
                    return bits // 8 + inner[0], inner[1]
        return None

    def parameters(self, type_id: int) -> tuple[str, ...] | None:
        """The names of a function prototype's parameters."""
        found = self._type(type_id)
        if found is None:
            return None
        words, at = found
        first, count = at + _HEAD, words[at + 1] & 0xFFFF
        return tuple(self._name(words[one]) for one in range(first, first + 2 * count, 2))

    def size_or_type(self, type_id: int) -> int:
        """The third word of a type's head."""
        found = self._type(type_id)
        return found[0][found[1] + 2] if found else 0

    def _type(self, type_id: int) -> tuple[array[int], int] | None:
        """A type's words and where it begins in them; None for ``void`` and unknown types."""
        if self._base and type_id < self._first_id:
            return self._base._type(type_id)
        if not self._first_id <= type_id < self.end_id:
            return None
        return self._words, self._starts[type_id - self._first_id]

    def _resolve(self, type_id: int) -> tuple[array[int], int] | None:
        """As ``_type``, past typedefs and qualifiers."""
        for _ in range(_MAX_DEPTH):
            found = self._type(type_id)
            if found is None or found[0][found[1] + 1] >> 24 & 0x1F not in _MODIFIERS:
                return found
            type_id = found[0][found[1] + 2]
        return None

    def _places(self, name: bytes) -> Iterator[int]:
        """Where strings begin that are ``name``; one may be the end of another."""
        if self._base:
            yield from self._base._places(name)
        at = self._text.find(name + b"\0")
        while at >= 0:
            yield self._first_text + at
            at = self._text.find(name + b"\0", at + 1)

    def _is_named(self, place: int, name: bytes) -> bool:
        if self._base and place < self._first_text:
            return self._base._is_named(place, name)
        return self._text.startswith(name + b"\0", place - self._first_text)

    def _name(self, place: int) -> str:
        if self._base and place < self._first_text:
            return self._base._name(place)
        at = place - self._first_text
        return self._text[at : self._text.find(b"\0", at)].decode(errors="replace")
