"""Valid input, damaged: for what is read from kernels, firmware, files and peers.

Everything is drawn as arguments of a test, so that what it finds is printed in a form that can be
kept as an ``@example``.
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
"""Bytes of a long input; what takes a millisecond for a kilobyte may take a second for it."""

TOKENS = (
    *(b"", b"\0", b"\n", b"\r", b"\t", b" ", b" " * 70, b"\xff", b"\x80", b"\x1b[2J", b"\x0b"),
    *("\u2028\u202e\u0301\x85\ud800".encode("utf-8", "surrogatepass"), "\u0663".encode()),
    *(b"0", b"-1", b"00", b"0x", b"07", b"1e9", b"255", b"65536", b"4294967295"),
    *(b"18446744073709551615", b"18446744073709551616", b"9" * 5000, b"f" * 17, b"-"),
    *(b":", b";", b",", b"=", b"{", b"}", b'"', b"\\", b"/", b"[", b"]", b"(", b")"),
)
_EDGES = (0, 1, 0x7F, 0x80, 0xFF)


@st.composite
def damaged(draw: st.DrawFn, seeds: Sequence[bytes], tokens: Sequence[bytes] = TOKENS) -> bytes:
    """One of ``seeds``, changed at a few places, cut, or spliced with another one."""
    data = bytearray(draw(st.sampled_from(seeds)))
    for _ in range(draw(st.integers(0, 5))):
        start = draw(st.integers(0, len(data)))
        end = min(len(data), start + draw(st.integers(0, 16)))
        match draw(st.integers(0, 8)):
            case 0 if start < len(data):
                data[start] ^= 1 << draw(st.integers(0, 7))
            case 1 if start < len(data):
                data[start] = draw(st.sampled_from(_EDGES))
            case 2:
                data[start:end] = draw(st.sampled_from(tokens))
            case 3:
                data[start:end] = draw(st.binary(max_size=12))
            case 4:
                del data[start:end]
            case 5:
                del data[start:]
            case 6:
                data[start:] = draw(st.sampled_from(seeds))[start:]
            case 7:
                data[end:end] = data[start:end] * draw(st.integers(1, 20))
            case 8:
                # A number that the parser reads.
                numbers = list(re.finditer(rb"(?:0x)?[0-9a-f]+", data[start : start + 200]))
                if numbers:
                    at = draw(st.sampled_from(numbers))
                    data[start + at.start() : start + at.end()] = draw(st.sampled_from(tokens))
    return bytes(data)


@st.composite
def long(draw: st.DrawFn, seeds: Sequence[bytes], tokens: Sequence[bytes] = TOKENS) -> bytes:
    """A piece of a seed again and again, ``LONG`` bytes of it: work that grows faster shows."""
    seed = draw(damaged(seeds, tokens))
    start = draw(st.integers(0, len(seed)))
    unit = seed[start : start + draw(st.integers(1, 60))]
    unit += draw(st.sampled_from(tokens))
    unit = unit or b" "
    head, tail = (seed[:start], seed[start:]) if draw(st.booleans()) else (b"", b"")
    return head + unit * (LONG // len(unit)) + tail


@functools.cache
def _directory() -> tempfile.TemporaryDirectory[str]:
    return tempfile.TemporaryDirectory(prefix="kvmtrace-property-")


def placed(data: bytes, name: str = "file") -> str:
    """The path of a file with this content, the same for every example."""
    path = Path(_directory().name, name)
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(data)
    return os.fspath(path)


def directory() -> str:
    """Where ``placed`` puts its files."""
    return _directory().name
