"""Damaged input for parsers of data from kernels, firmware, files and peers.

All data is drawn as arguments of a test, so that a failure is printed in a form that can be kept as
an ``@example``.
"""

from __future__ import annotations

import functools
import os
import re
import tempfile
from collections.abc import Sequence
from pathlib import Path

from hypothesis import strategies as st

LONG = 1 << 17
"""Bytes of a long input, which shows work that grows faster than the input."""

TOKENS = (
    *(b"", b"\0", b"\n", b"\r", b"\t", b" ", b" " * 70, b"\xff", b"\x80", b"\x1b[2J", b"\x0b"),
    *("\u2028\u202e\u0301\x85\ud800".encode("utf-8", "surrogatepass"), "\u0663".encode()),
    *(b"0", b"-1", b"00", b"0x", b"07", b"1e9", b"255", b"65536", b"4294967295"),
    *(b"18446744073709551615", b"18446744073709551616", b"9" * 5000, b"f" * 17, b"-"),
    *(b":", b";", b",", b"=", b"{", b"}", b'"', b"\\", b"/", b"[", b"]", b"(", b")"),
)
_EDGES = (0, 1, 0x7F, 0x80, 0xFF)
_STEP = 6
_NUMBER = re.compile(rb"(?:0x)?[0-9a-f]+")


@st.composite
def damaged(draw: st.DrawFn, seeds: Sequence[bytes], tokens: Sequence[bytes] = TOKENS) -> bytes:
    """One of ``seeds``, changed at a few places, cut, or spliced with another one."""
    seed = draw(st.sampled_from(seeds))
    # One draw only: a draw takes longer than most parsers.
    return _changed(seed, draw(st.binary(max_size=5 * _STEP)), seeds, tokens)


def _changed(seed: bytes, changes: bytes, seeds: Sequence[bytes], tokens: Sequence[bytes]) -> bytes:
    """Apply ``changes``, six bytes each: kind, place (two bytes), length, token, value."""
    data = bytearray(seed)
    for kind, high, low, length, which, value in zip(
        *(changes[at::_STEP] for at in range(_STEP)), strict=False
    ):
        start = (high << 8 | low) % (len(data) + 1)
        end = min(len(data), start + length % 17)
        match kind % 9:
            case 0:
                data[start:end] = tokens[which % len(tokens)]
            case 1 if start < len(data):
                data[start] ^= 1 << value % 8
            case 2 if start < len(data):
                data[start] = _EDGES[which % len(_EDGES)]
            case 3:
                data[start:end] = bytes((value, which, length))
            case 4:
                del data[start:end]
            case 5:
                del data[start:]
            case 6:
                data[start:] = seeds[which % len(seeds)][start:]
            case 7:
                data[end:end] = data[start:end] * (value % 20)
            case 8:
                # Replace a number that the parser reads.
                number = _NUMBER.search(data, start)
                if number is not None:
                    data[number.start() : number.end()] = tokens[which % len(tokens)]
    return bytes(data)


@st.composite
def long(draw: st.DrawFn, seeds: Sequence[bytes], tokens: Sequence[bytes] = TOKENS) -> bytes:
    """Repeat a piece of a seed up to ``LONG`` bytes, to find work that grows faster."""
    seed = draw(damaged(seeds, tokens))
    start = draw(st.integers(0, len(seed)))
    unit = seed[start : start + draw(st.integers(1, 60))] + draw(st.sampled_from(tokens)) or b" "
    head, tail = (seed[:start], seed[start:]) if draw(st.booleans()) else (b"", b"")
    return head + unit * (LONG // len(unit)) + tail


@functools.cache
def _directory() -> tempfile.TemporaryDirectory[str]:
    return tempfile.TemporaryDirectory(prefix="kvmtrace-property-")


def placed(data: bytes, name: str = "file") -> str:
    """Write a file and return its path, which is the same for every example."""
    path = Path(_directory().name, name)
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(data)
    return os.fspath(path)


def directory() -> str:
    """The directory of ``placed``."""
    return _directory().name
