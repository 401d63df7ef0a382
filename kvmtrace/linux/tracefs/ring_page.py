"""Binary pages of ``trace_pipe_raw`` and the ``format`` files that describe what is in them.

The layout is the kernel's own: kernel/trace/ring_buffer.c (compressed entry header) and
``events/header_page`` for the page's first fields. Pure: bytes and text in, records out.
"""

from __future__ import annotations

import re
import struct
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, NamedTuple

# kernel/trace/ring_buffer.c, top bits of the commit field: events were lost before this page, and
# their number follows the data.
_MISSED = 1 << 31
_STORED = 1 << 30

_PADDING, _TIME_EXTEND, _TIME_STAMP = 29, 30, 31
_TS_SHIFT = 27
_TS_MASK = (1 << _TS_SHIFT) - 1

_LITTLE = sys.byteorder == "little"
_U32 = struct.Struct("=I")
_U64 = struct.Struct("=Q")

_FIELD = re.compile(
    r"^[ \t]*field:([^;\n]*);[ \t]*offset:(\d+);[ \t]*size:(\d+);(?:[ \t]*signed:([01]);)?",
    re.MULTILINE,
)
_CODES = {1: "bB", 2: "hH", 4: "iI", 8: "qQ"}
_MAX_OFFSET = 1 << 16  # no entry is longer than a page


class _Field(NamedTuple):
    offset: int
    size: int
    name: str
    type: str
    array: bool
    signed: bool


def _fields(text: str) -> list[_Field]:
    """The fields that a ``format`` file declares, in order of their offsets."""
    found = []
    for declared, offset, size, signed in _FIELD.findall(text):
        array = declared.endswith("]")
        type_, _, name = (declared.rpartition("[")[0] if array else declared).rpartition(" ")
        if name:
            field = _Field(int(offset), int(size), name.lstrip("*"), type_, array, signed == "1")
            found.append(field)
    return sorted(found)


@dataclass(frozen=True, slots=True)
class PageLayout:
    """Where things are in a page: the commit field's size, the data's offset, the page's size."""

    commit_size: int
    data: int
    size: int

    @classmethod
    def parse(cls, header_page: str) -> PageLayout:
        """Parse ``events/header_page``; raises ValueError if it declares no layout."""
        fields = {field.name: field for field in _fields(header_page)}
        data, commit = fields.get("data"), fields.get("commit")
        if data is None or commit is None or not commit.size or not data.size:
            raise ValueError("events/header_page has no layout")
        return cls(commit.size, data.offset, data.offset + data.size)


class EventFormat:
    """One event's ``format``: turns the bytes of an entry into ``{field: value}``.

    Numbers of 1 to 8 bytes, ``__data_loc char[]`` strings and ``__data_loc u8[]`` bytes are
    decoded, structs are given as bytes, anything else is left out. ``common_*`` fields but
    ``common_pid`` are left out too. Raises ValueError for a text that is no format.
    """

    def __init__(self, text: str) -> None:
        self.name = _required(r"^name: (\S+)", text)
        self.id = int(_required(r"^ID: (\d+)", text))
        codes: list[str] = []
        names: list[str] = []
        self._dynamic: dict[str, bool] = {}  # {field: whether it is text}
        at = 0
        for offset, size, name, type_, array, signed in _fields(text.partition("print fmt:")[0]):
            is_dynamic = type_.startswith(("__data_loc char", "__data_loc u8"))
            wanted = name == "common_pid" or not name.startswith("common_")
            is_struct = type_.startswith("struct ")
            if not wanted or array or not at <= offset < _MAX_OFFSET:
                continue
            if size not in _CODES and not (is_struct and 0 < size < _MAX_OFFSET):
                continue
            if type_.startswith("__data_loc") and not is_dynamic:
                continue
            codes += ["x"] * (offset - at)
            code = _CODES.get(size, ("", ""))[0 if signed and not is_dynamic else 1]
            codes.append(f"{size}s" if is_struct else code)
            names.append(name)
            if is_dynamic:
                self._dynamic[name] = "char" in type_
            at = offset + size
        self._struct = struct.Struct("=" + "".join(codes))
        self.fields = tuple(names)

    def decode(self, entry: memoryview) -> dict[str, Any]:
        """The fields of one entry; raises ValueError where it is shorter than its format."""
        if len(entry) < self._struct.size:
            raise ValueError(f"{self.name}: entry of {len(entry)} bytes")
        record: dict[str, Any] = dict(
            zip(self.fields, self._struct.unpack_from(entry), strict=True)
        )
        for name, is_text in self._dynamic.items():
            where, length = record[name] & 0xFFFF, record[name] >> 16
            data = bytes(entry[where : where + length])
            record[name] = data.split(b"\0")[0].decode(errors="replace") if is_text else data
        return record


def event_id(entry: memoryview) -> int:
    """``common_type``, an entry's first two bytes: the ID of its ``format``."""
    return int.from_bytes(entry[:2], sys.byteorder)


def missed(page: bytes, layout: PageLayout) -> int:
    """How many events were overwritten before this page; -1 if the number is unknown."""
    commit = _commit(page, layout)
    if not commit & _MISSED:
        return 0
    end = layout.data + (commit & ~(_MISSED | _STORED))
    if not commit & _STORED or end + _U64.size > len(page):
        return -1
    return int(_U64.unpack_from(page, end)[0])


def entries(page: bytes, layout: PageLayout) -> Iterator[tuple[int, memoryview]]:
    """(time stamp, entry) of each event in a page, in order; stops at a damaged header."""
    if len(page) < _U64.size:
        return
    (stamp,) = _U64.unpack_from(page, 0)
    view = memoryview(page)
    at = layout.data
    end = min(at + (_commit(page, layout) & ~(_MISSED | _STORED)), len(page))
    while at + 4 <= end:
        (head,) = _U32.unpack_from(page, at)
        kind, delta = (head & 31, head >> 5) if _LITTLE else (head >> 27, head & _TS_MASK)
        at += 4
        if kind == _PADDING:
            if not delta or at + 4 > end:
                return
            at += _U32.unpack_from(page, at)[0]
            # rb_read_data_buffer: 1 stands for "none" in a discarded entry.
            stamp += delta if delta > 1 else 0
        elif kind in (_TIME_EXTEND, _TIME_STAMP):
            if at + 4 > end:
                return
            wide = (_U32.unpack_from(page, at)[0] << _TS_SHIFT) + delta
            if kind == _TIME_EXTEND:
                stamp += wide
            else:
                # 59 bits are kept; the top five are those of the page's own stamp.
                stamp = wide | (stamp >> 59 << 59)
            at += 4
        else:
            stamp += delta
            if kind:
                start, length = at, kind * 4
            else:
                if at + 4 > end:
                    return
                start, length = at + 4, _U32.unpack_from(page, at)[0] - 4
            if length <= 0 or start + length > end:
                return
            yield stamp, view[start : start + length]
            at = start + (length + 3) // 4 * 4


def _commit(page: bytes, layout: PageLayout) -> int:
    return int.from_bytes(page[8 : 8 + layout.commit_size], sys.byteorder) & 0xFFFFFFFF


def _required(pattern: str, text: str) -> str:
    match = re.search(pattern, text, re.MULTILINE)
    if match is None:
        raise ValueError(f"not an event format: no {pattern}")
    return match[1]
