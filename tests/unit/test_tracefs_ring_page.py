"""Binary ring pages: made-up ones for the rules, recorded ones for the truth."""

from __future__ import annotations

import base64
import json
import struct
from pathlib import Path
from typing import Any

import pytest

from kvmtrace.linux.tracefs import ring_page
from kvmtrace.linux.tracefs.ring_page import EventFormat, PageLayout

RECORDINGS = sorted((Path(__file__).parent.parent / "recordings" / "ftrace").glob("*.json"))

FORMAT = """name: thing
ID: 1733
format:
\tfield:unsigned short common_type;\toffset:0;\tsize:2;\tsigned:0;
\tfield:unsigned char common_flags;\toffset:2;\tsize:1;\tsigned:0;
\tfield:unsigned char common_preempt_count;\toffset:3;\tsize:1;\tsigned:0;
\tfield:int common_pid;\toffset:4;\tsize:4;\tsigned:1;

\tfield:unsigned long __probe_ip;\toffset:8;\tsize:8;\tsigned:0;
\tfield:u64 slots[64];\toffset:16;\tsize:8;\tsigned:0;
\tfield:__data_loc char[] comm;\toffset:24;\tsize:4;\tsigned:1;
\tfield:__data_loc u8[] blob;\toffset:28;\tsize:4;\tsigned:0;
\tfield:s32 ret;\toffset:33;\tsize:4;\tsigned:1;

print fmt: "(%lx) ret=%d", REC->__probe_ip, REC->ret
"""
LAYOUT = PageLayout(commit_size=8, data=16, size=4096)


def page(*parts: bytes, stamp: int = 1000, flags: int = 0) -> bytes:
    data = b"".join(parts)
    return (struct.pack("=QQ", stamp, len(data) | flags) + data).ljust(4096, b"\0")


def event(delta: int, entry: bytes) -> bytes:
    entry = entry.ljust((len(entry) + 3) // 4 * 4, b"\0")
    if len(entry) <= 112:
        return struct.pack("=I", delta << 5 | len(entry) // 4) + entry
    return struct.pack("=II", delta << 5, len(entry) + 4) + entry


def stamps(data: bytes) -> list[int]:
    return [ts for ts, _ in ring_page.entries(data, LAYOUT)]


def test_a_format_gives_numbers_strings_and_bytes_and_leaves_the_rest() -> None:
    known = EventFormat(FORMAT)
    assert (known.name, known.id) == ("thing", 1733)
    assert known.fields == ("common_pid", "__probe_ip", "comm", "blob", "ret")
    entry = bytearray(48)
    struct.pack_into("=HBBi", entry, 0, 1733, 0, 0, 77)
    struct.pack_into("=Q", entry, 8, 2**64 - 1)
    struct.pack_into("=I", entry, 24, 37 | 8 << 16)
    struct.pack_into("=I", entry, 28, 45 | 3 << 16)
    struct.pack_into("=i", entry, 33, -133)
    entry[37:48] = b"qemu\0xyz\1\0\2"
    assert ring_page.event_id(memoryview(entry)) == 1733
    assert known.decode(memoryview(entry)) == {
        "common_pid": 77,
        "__probe_ip": 2**64 - 1,
        "comm": "qemu",
        "blob": b"\1\0\2",
        "ret": -133,
    }
    with pytest.raises(ValueError, match="entry of 20 bytes"):
        known.decode(memoryview(entry)[:20])


def test_a_text_that_is_no_format_is_refused() -> None:
    with pytest.raises(ValueError, match="not an event format"):
        EventFormat("")


def test_header_page() -> None:
    text = (
        "\tfield: u64 timestamp;\toffset:0;\tsize:8;\tsigned:0;\n"
        "\tfield: local_t commit;\toffset:8;\tsize:8;\tsigned:1;\n"
        "\tfield: int overwrite;\toffset:8;\tsize:1;\tsigned:1;\n"
        "\tfield: char data;\toffset:16;\tsize:16368;\tsigned:1;\n"
    )
    assert PageLayout.parse(text) == PageLayout(8, 16, 16384)


def test_time_is_the_sum_of_deltas() -> None:
    assert stamps(page(event(0, b"abcd"), event(5, b"abcd"), event(7, b"x" * 200))) == [
        1000,
        1005,
        1012,
    ]


def test_long_and_short_entries_are_whole() -> None:
    found = [
        bytes(e)
        for _, e in ring_page.entries(page(event(0, b"abcd"), event(0, b"y" * 200)), LAYOUT)
    ]
    assert found == [b"abcd", b"y" * 200]


def test_time_extends_and_absolute_stamps() -> None:
    extend = struct.pack("=II", 3 << 5 | 30, 2)
    absolute = struct.pack("=II", 9 << 5 | 31, 1)
    base = 5 << 59 | 1000
    data = page(
        event(1, b"abcd"), extend, event(0, b"abcd"), absolute, event(2, b"abcd"), stamp=base
    )
    assert stamps(data) == [base + 1, base + 1 + (2 << 27) + 3, (5 << 59) + (1 << 27) + 9 + 2]


def test_discarded_entries_keep_their_time() -> None:
    discarded = struct.pack("=II", 4 << 5 | 29, 8) + b"\0" * 4
    without_time = struct.pack("=II", 1 << 5 | 29, 8) + b"\0" * 4
    assert stamps(page(event(1, b"abcd"), discarded, without_time, event(2, b"abcd"))) == [
        1001,
        1007,
    ]


def test_padding_ends_a_page() -> None:
    assert stamps(page(event(1, b"abcd"), struct.pack("=I", 29), event(2, b"abcd"))) == [1001]


def test_missed_events() -> None:
    some = event(1, b"abcd")
    assert ring_page.missed(page(some), LAYOUT) == 0
    assert ring_page.missed(page(some, flags=1 << 31), LAYOUT) == -1
    stored = bytearray(page(some, flags=3 << 30))
    struct.pack_into("=Q", stored, 16 + len(some), 4711)
    assert ring_page.missed(bytes(stored), LAYOUT) == 4711
    assert ring_page.missed(bytes(stored)[: 16 + len(some)], LAYOUT) == -1
    assert stamps(bytes(stored)) == [1001]


@pytest.mark.parametrize("size", range(16))
def test_less_than_a_header_is_no_page(size: int) -> None:
    assert stamps(bytes(size)) == []


@pytest.mark.parametrize("cut", range(16, 60))
def test_a_damaged_page_ends_early(cut: int) -> None:
    data = page(event(1, b"abcd"), event(2, b"z" * 150))[:cut]
    list(ring_page.entries(data, LAYOUT))


@pytest.mark.parametrize("path", RECORDINGS, ids=lambda path: path.stem)
def test_recorded_pages_decode_to_their_last_byte(path: Path) -> None:
    recording: dict[str, Any] = json.loads(path.read_text())
    layout = PageLayout.parse(recording["header_page"])
    formats = {}
    for probe, text in recording["formats"].items():
        known = EventFormat(text)
        formats[known.id] = (probe, known)
    counts: dict[str, int] = {}
    for _, encoded in recording["pages"]:
        data = base64.b64decode(encoded)
        used = 0
        for ts, entry in ring_page.entries(data, layout):
            probe, known = formats[ring_page.event_id(entry)]
            counts[probe] = counts.get(probe, 0) + 1
            assert known.decode(entry)["common_pid"] > 0
            assert abs(ts - recording["pages_ns"]) < 3600 * 10**9
            used = len(data) - len(entry)
        assert used
    assert counts == recording["counts"]


@pytest.mark.parametrize(
    "line",
    [
        "field:" + "a" * 5000,
        "field:" * 1000,
        "field:;\toffset:8;\tsize:8;\tsigned:0;",
        "field:u64 far;\toffset:99999999999;\tsize:8;\tsigned:0;",
        "field:u64 odd;\toffset:8;\tsize:7;\tsigned:0;",
        "field:u64;\toffset:8;\tsize:8;\tsigned:0;",
    ],
)
def test_a_line_that_makes_no_sense_costs_that_field(line: str) -> None:
    known = EventFormat(FORMAT.replace("\tfield:u64 slots", f"\t{line}\n\tfield:u64 slots"))
    assert known.fields == ("common_pid", "__probe_ip", "comm", "blob", "ret")


def test_a_page_without_a_layout_is_an_error() -> None:
    with pytest.raises(ValueError, match="header_page"):
        PageLayout.parse("\tfield: u64 timestamp;\toffset:0;\tsize:8;\tsigned:0;\n")


@pytest.mark.parametrize("sizes", [(8, 0), (0, 16)])
def test_a_page_without_room_is_no_layout(sizes: tuple[int, int]) -> None:
    commit, data = sizes
    with pytest.raises(ValueError, match="header_page"):
        PageLayout.parse(
            f"\tfield: local_t commit;\toffset:8;\tsize:{commit};\tsigned:1;\n"
            f"\tfield: char data;\toffset:0;\tsize:{data};\tsigned:1;\n"
        )
