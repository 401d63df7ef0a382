"""BTF: made by hand, by a compiler, and damaged. The lab compares it with libbpf."""

from __future__ import annotations

import base64
import struct as packed
import sys
import zlib
from pathlib import Path

import pytest

from kvmtrace.errors import KvmtraceError
from kvmtrace.linux.btf import Btf

NAMES = (
    *("", "int", "task_struct", "state", "pid", "flags", "tgid", "task", "pid_t", "kvm"),
    *("kvm_run", "exit_reason", "memory_fault", "hwpoison", "kvm_destroy_vm", "arch", "stat"),
)
STRINGS = b"\0".join(name.encode() for name in NAMES) + b"\0"


def at(name: str) -> int:
    return STRINGS.index(b"\0" + name.encode() + b"\0") + 1 if name else 0


def head(name: str, kind: int, vlen: int = 0, size: int = 4, *, flag: bool = False) -> bytes:
    return packed.pack("=III", at(name), kind << 24 | vlen | flag << 31, size)


def member(name: str, bits: int, of: int = 1) -> bytes:
    """``of``: the number of its type."""
    return packed.pack("=III", at(name), of, bits)


def struct(name: str, *members: bytes, kind: int = 4, size: int = 64) -> bytes:
    return head(name, kind, len(members), size) + b"".join(members)


def blob(*types: bytes, magic: int = 0xEB9F, strings: bytes = STRINGS) -> bytes:
    body = b"".join(types)
    sizes = (len(body), len(body), len(strings))
    return packed.pack("=HBBIIIII", magic, 1, 0, 24, 0, *sizes) + body + strings


INT = head("int", 1) + packed.pack("=I", 32)
BEFORE = [
    INT,
    head("", 3) + bytes(12),
    head("task", 7),  # declared only: the whole name has to be the same
    struct("task", member("pid", 8 * 99)),
    head("pid_t", 8, size=1),
    head("", 13, 2) + bytes(16),
    head("state", 6, 3) + bytes(24),
    head("state", 19, 1) + bytes(12),
]
TASK = (
    head("task_struct", 4, 4, 64, flag=True)
    + member("state", 0)
    + member("flags", 1 << 24 | 64)
    + member("pid", 96)
    + member("tgid", 128)
)


# What gcc 12 (-gbtf) made of
#
#   struct stat { u32 exits; u32 halts; };
#   struct vcpu {
#           void *kvm;
#           int vcpu_id;
#           union { const struct stat stat; struct { u32 low, high; } arch; };
#           struct { u32 flags : 3; u32 mode : 5; volatile u32 cpu; };
#           struct stat stats[4];
#           u32 last;
#   };
#   int vcpu_run(struct vcpu *vcpu, u32 flags);
RECORDED = (
    "eNpdUT1Pw1AMdGgCKbQgscCCFImBBREBEhNDGZgZGBhLSEISkY/SJG0HRn4BCwsIflp3/gTn2Cgpls4++13uPTlf"
    "Pwbtk8SHIfgEN2RkmEgOsC29rXOO/hrSLoBq2qh7wps4UO60+k1TyZ/+sKM/+qcHt1hzDFg6OwXWWz/qEb2y5qL1"
    "6V0qx5l1JbXxvJZvzRHqDT9GPe6ALWCk/QZwr5y9v4FnYAgsgbn6L9tFNFffru7LGGtvd7z1OcSagVY1GPIb3oAd"
    "4L2zF6Z9pBfhg+Y/1HmZRHkYOEleUX1+RmXlVRQukqqk2EuR02JOcRLFcuJN/ZgeUy8qKSuCkPxJTbMmFUlAT7OM"
    "2IgnY/RpkUfOyhVsAk+vVNG0zsmtsokbPbiLE5/ETC74BfXfRHg="
)


def types(directory: Path, vmlinux: bytes, kvm: bytes | None = None) -> Btf:
    (directory / "vmlinux").write_bytes(vmlinux)
    if kvm is not None:
        (directory / "kvm").write_bytes(kvm)
    return Btf(str(directory))


@pytest.mark.parametrize(
    ("name", "found"),
    [("pid", 12), ("tgid", 16), ("state", 0), ("flags", None), ("int", None), ("pi", None)],
)
def test_a_member_is_found(tmp_path: Path, name: str, found: int | None) -> None:
    btf = types(tmp_path, blob(*BEFORE, TASK))
    assert btf.offset("task_struct", name) == found
    assert btf.offset("task_", name) is None
    assert (btf.size("task_struct"), btf.size("int")) == (64, None)


def test_structs_in_structs(tmp_path: Path) -> None:
    """Types 1 to 6: int, the outer struct, a typedef, an anonymous union, the inner, a const."""
    btf = types(
        tmp_path,
        blob(
            INT,
            struct("kvm", member("arch", 64, of=6), member("", 256, of=4), member("pid", 512)),
            head("stat", 8, size=5),
            struct("", member("flags", 0), member("task", 0, of=3), kind=5),
            struct("stat", member("tgid", 32)),
            head("", 10, size=3),
        ),
    )
    assert btf.offset("kvm", "arch.tgid") == 8 + 4
    assert btf.offset("kvm", "flags") == 32
    assert btf.offset("kvm", "task.tgid") == 32 + 4
    assert btf.offset("kvm", "pid.tgid") is None  # int
    assert btf.offset("kvm", "tgid") is None  # not anonymous


def test_a_function(tmp_path: Path) -> None:
    proto = head("", 13, 2) + packed.pack("=IIII", at("kvm"), 1, at("flags"), 1)
    btf = types(tmp_path, blob(INT, proto, head("kvm_destroy_vm", 12, size=2)))
    assert btf.arguments("kvm_destroy_vm") == ("kvm", "flags")
    assert btf.arguments("kvm") is None


@pytest.mark.skipif(sys.byteorder != "little", reason="recorded on x86-64")
def test_what_a_compiler_makes(tmp_path: Path) -> None:
    btf = types(tmp_path, zlib.decompress(base64.b64decode(RECORDED)))
    offsets = {"kvm": 0, "vcpu_id": 8, "stat.halts": 16, "arch.high": 16, "cpu": 24, "last": 60}
    assert {path: btf.offset("vcpu", path) for path in offsets} == offsets
    assert [btf.offset("vcpu", path) for path in ("flags", "high", "stats.exits")] == [None] * 3
    assert (btf.size("vcpu"), btf.size("stat")) == (64, 8)
    assert btf.arguments("vcpu_run") == ("vcpu", "flags")


def test_a_module_continues_vmlinux(tmp_path: Path) -> None:
    """Its types are numbered from 10 on here, and its strings begin where vmlinux's end."""
    own = b"\0gmem_file\0bindings\0"
    name, bindings = (len(STRINGS) + own.index(word) for word in (b"gmem_file", b"bindings"))
    kvm = (
        packed.pack("=IIIIII", name, 4 << 24 | 2, 16, at("pid"), 5, 32)
        + packed.pack("=III", bindings, 11, 64)
        + struct("stat", member("tgid", 32))
        + TASK
    )
    btf = types(tmp_path, blob(*BEFORE, TASK), blob(kvm, strings=own))
    assert btf.offset("gmem_file", "pid") == 4
    assert btf.offset("gmem_file", "bindings.tgid") == 8 + 4
    assert btf.offset("task_struct", "pid") == 12
    assert btf.offset("bindings", "pid") is None


def test_a_module_without_types_leaves_those_of_vmlinux(tmp_path: Path) -> None:
    assert types(tmp_path, blob(INT, TASK), b"").offset("task_struct", "pid") == 12


@pytest.mark.parametrize("kind", [4, 8])
def test_circles_end(tmp_path: Path, kind: int) -> None:
    circle = struct("", member("", 0, of=3)) if kind == 4 else head("", 8, size=3)
    btf = types(tmp_path, blob(INT, struct("task", member("", 0, of=3)), circle))
    assert btf.offset("task", "pid") is None


@pytest.mark.parametrize(
    "damaged",
    [b"", b"x" * 100, blob(TASK, magic=0x9FEB), blob(head("", 31), TASK), blob(TASK)[:40]],
)
def test_what_is_damaged_is_refused(tmp_path: Path, damaged: bytes) -> None:
    with pytest.raises(KvmtraceError, match="cannot be read"):
        types(tmp_path, damaged)
    with pytest.raises(KvmtraceError, match="offers no BTF"):
        Btf(str(tmp_path / "none"))
