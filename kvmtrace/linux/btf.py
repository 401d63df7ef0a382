"""BTF: what this kernel's structs and functions look like, asked of the kernel itself.

A thin layer over libbpf's own API (``/usr/include/bpf/btf.h``) through ctypes; libbpf comes with
bcc. Names of structs are looked up in vmlinux and in the kvm module (split BTF), whichever has
them.
"""

from __future__ import annotations

import ctypes
import functools
import os

from kvmtrace.errors import KvmtraceError

# include/uapi/linux/btf.h
_KIND_PTR, _KIND_STRUCT, _KIND_UNION, _KIND_ENUM, _KIND_FWD = 2, 4, 5, 6, 7
_KIND_TYPEDEF, _KIND_VOLATILE, _KIND_CONST, _KIND_RESTRICT = 8, 9, 10, 11
_KIND_FUNC, _KIND_FUNC_PROTO, _KIND_TYPE_TAG = 12, 13, 18
_MODIFIERS = {_KIND_TYPEDEF, _KIND_VOLATILE, _KIND_CONST, _KIND_RESTRICT, _KIND_TYPE_TAG}

SYS_BTF = "/sys/kernel/btf"


class _Type(ctypes.Structure):
    _fields_ = (
        ("name_off", ctypes.c_uint32),
        ("info", ctypes.c_uint32),
        ("size_or_type", ctypes.c_uint32),
    )

    @property
    def kind(self) -> int:
        return int(self.info >> 24) & 0x1F

    @property
    def vlen(self) -> int:
        return int(self.info) & 0xFFFF

    @property
    def kind_flag(self) -> bool:
        return bool(self.info >> 31)


class _Member(ctypes.Structure):
    _fields_ = (
        ("name_off", ctypes.c_uint32),
        ("type", ctypes.c_uint32),
        ("offset", ctypes.c_uint32),
    )


class _Param(ctypes.Structure):
    _fields_ = (("name_off", ctypes.c_uint32), ("type", ctypes.c_uint32))


@functools.cache
def libbpf() -> ctypes.CDLL:
    """libbpf, which comes with bcc. Raises KvmtraceError where it is missing."""
    for name in ("libbpf.so.1", "libbpf.so.0"):
        try:
            lib = ctypes.CDLL(name)
        except OSError:
            continue
        for function in ("btf__parse", "btf__parse_split", "btf__type_by_id"):
            getattr(lib, function).restype = ctypes.c_void_p
        lib.btf__name_by_offset.restype = ctypes.c_char_p
        lib.libbpf_set_print(None)
        return lib
    raise KvmtraceError(
        "libbpf is not installed, so the kernel's types cannot be read",
        "it comes with bcc: apt install python3-bpfcc (or dnf install python3-bcc)",
    )


class Btf:
    """The types of the running kernel and of its kvm module.

    Raises KvmtraceError where the kernel has no BTF or libbpf is missing.
    """

    def __init__(self, root: str = SYS_BTF, modules: tuple[str, ...] = ("kvm",)) -> None:
        lib = libbpf()
        base = lib.btf__parse(os.fsencode(f"{root}/vmlinux"), None)
        if not base:
            raise KvmtraceError(
                "this kernel offers no BTF (type information)",
                f"a kernel built with CONFIG_DEBUG_INFO_BTF has {root}/vmlinux",
            )
        self._all = [ctypes.c_void_p(base)]
        for module in modules:
            path = f"{root}/{module}"
            if os.path.exists(path):
                split = lib.btf__parse_split(os.fsencode(path), self._all[0])
                if split:
                    self._all.insert(0, ctypes.c_void_p(split))
        self._lib = lib

    def close(self) -> None:
        """Free libbpf's copies; the object is of no use afterwards."""
        for btf in self._all:
            self._lib.btf__free(btf)
        self._all.clear()

    def offset(self, struct: str, path: str) -> int | None:
        """Byte offset of ``path`` ("a.b.c", nested structs, not pointers) in ``struct``.

        Members of anonymous structs and unions are found as C finds them. None where the struct
        or a member is not there, or is a bit field.
        """
        found = self._find(struct, _KIND_STRUCT)
        if found is None:
            return None
        btf, type_id = found
        total = 0
        for name in path.split("."):
            step = self._member(btf, self._strip(btf, type_id), name)
            if step is None:
                return None
            offset, type_id = step
            total += offset
        return total

    def size(self, struct: str) -> int | None:
        """Size of a struct in bytes; None where it is not there."""
        found = self._find(struct, _KIND_STRUCT)
        return self._type(*found).size_or_type if found else None

    def arguments(self, function: str) -> tuple[str, ...] | None:
        """Names of a function's parameters in order; None where BTF does not know it."""
        found = self._find(function, _KIND_FUNC)
        if found is None:
            return None
        btf, type_id = found
        proto_id = self._type(btf, type_id).size_or_type
        proto = self._type(btf, proto_id)
        start = self._address(btf, proto_id) + ctypes.sizeof(_Type)
        params = (_Param * proto.vlen).from_address(start)
        return tuple(self._name(btf, param.name_off) for param in params)

    def _find(self, name: str, kind: int) -> tuple[ctypes.c_void_p, int] | None:
        for btf in self._all:
            type_id = self._lib.btf__find_by_name_kind(btf, name.encode(), kind)
            if type_id > 0:
                return btf, type_id
        return None

    def _address(self, btf: ctypes.c_void_p, type_id: int) -> int:
        address = self._lib.btf__type_by_id(btf, type_id)
        if not address:
            raise KvmtraceError(f"BTF has no type {type_id}", "the kernel's BTF looks damaged")
        return int(address)

    def _type(self, btf: ctypes.c_void_p, type_id: int) -> _Type:
        return _Type.from_address(self._address(btf, type_id))

    def _name(self, btf: ctypes.c_void_p, offset: int) -> str:
        return str((self._lib.btf__name_by_offset(btf, offset) or b"").decode())

    def _strip(self, btf: ctypes.c_void_p, type_id: int) -> int:
        while self._type(btf, type_id).kind in _MODIFIERS:
            type_id = self._type(btf, type_id).size_or_type
        return type_id

    def _member(self, btf: ctypes.c_void_p, type_id: int, name: str) -> tuple[int, int] | None:
        struct = self._type(btf, type_id)
        if struct.kind not in (_KIND_STRUCT, _KIND_UNION):
            return None
        start = self._address(btf, type_id) + ctypes.sizeof(_Type)
        for member in (_Member * struct.vlen).from_address(start):
            bits = member.offset & 0xFFFFFF if struct.kind_flag else member.offset
            own = self._name(btf, member.name_off)
            if own == name:
                is_bit_field = struct.kind_flag and member.offset >> 24
                return None if is_bit_field or bits % 8 else (bits // 8, member.type)
            if not own:
                inner = self._member(btf, self._strip(btf, member.type), name)
                if inner is not None:
                    return bits // 8 + inner[0], inner[1]
        return None
