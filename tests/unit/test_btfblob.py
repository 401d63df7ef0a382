"""BTF read without libbpf; the lab compares it with libbpf on a real kernel's."""

from __future__ import annotations

import struct
from pathlib import Path

import pytest

from kvmtrace.linux import btfblob

NAMES = ["", "int", "task_struct", "state", "pid", "flags", "tgid", "task", "pid_t"]
STRINGS = b"\0".join(name.encode() for name in NAMES) + b"\0"


def at(name: str) -> int:
    return STRINGS.index(b"\0" + name.encode() + b"\0") + 1


def head(name: str, kind: int, vlen: int = 0, size: int = 4, *, flag: bool = False) -> bytes:
    place = at(name) if name else 0
    return struct.pack("=III", place, kind << 24 | vlen | flag << 31, size)


def member(name: str, bits: int) -> bytes:
    return struct.pack("=III", at(name), 1, bits)


def blob(*types: bytes, magic: int = 0xEB9F) -> bytes:
    body = b"".join(types)
    head_ = struct.pack("=HBBIIIII", magic, 1, 0, 24, 0, len(body), len(body), len(STRINGS))
    return head_ + body + STRINGS


INT = head("int", 1) + struct.pack("=I", 32)
BEFORE = [
    INT,
    head("", 3) + bytes(12),
    head("task", 7),  # declared only: the whole name has to be the same
    head("task", 4, 1) + member("pid", 8 * 99),
    head("pid_t", 8),
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


@pytest.mark.parametrize(
    ("name", "found"),
    [("pid", 12), ("tgid", 16), ("state", 0), ("flags", None), ("int", None), ("pi", None)],
)
def test_a_member_is_found(tmp_path: Path, name: str, found: int | None) -> None:
    path = tmp_path / "vmlinux"
    path.write_bytes(blob(*BEFORE, TASK))
    assert btfblob.offset("task_struct", name, str(path)) == found
    assert btfblob.offset("task_", name, str(path)) is None


@pytest.mark.parametrize(
    "damaged",
    [b"", b"x" * 100, blob(TASK, magic=0x9FEB), blob(head("", 31), TASK), blob(TASK)[:40]],
)
def test_what_is_not_understood_tells_nothing(tmp_path: Path, damaged: bytes) -> None:
    path = tmp_path / "vmlinux"
    path.write_bytes(damaged)
    assert btfblob.offset("task_struct", "pid", str(path)) is None
    assert btfblob.offset("task_struct", "pid", str(tmp_path / "none")) is None
