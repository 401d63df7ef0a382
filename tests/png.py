"""Pictures small enough for a repository: few colours, and a text that goes along with them."""

from __future__ import annotations

import struct
import zlib
from collections import Counter
from collections.abc import Iterator

_MAGIC = b"\x89PNG\r\n\x1a\n"
_RGB = 2
_PALETTE = 3
_COLOURS = 48


def small(png: bytes, about: str) -> bytes:
    """An RGB picture as a browser makes it, with its commonest colours only.

    ``about``: kept in the picture, read by ``about_of``. Raises ValueError for other pictures.
    """
    chunks = list(_chunks(png))
    width, height, depth, kind, *_, interlaced = struct.unpack(">IIBBBBB", chunks[0][1])
    if (depth, kind, interlaced) != (8, _RGB, 0):
        raise ValueError(f"not 8-bit RGB: depth {depth}, kind {kind}, interlaced {interlaced}")
    raw = zlib.decompress(b"".join(data for name, data in chunks if name == b"IDAT"))
    lines = [_pixels(line) for line in _unfiltered(raw, width * 3, height)]
    counts = Counter(pixel for line in lines for pixel in line)
    kept = [colour for colour, _ in counts.most_common(_COLOURS)]
    index = {colour: kept.index(_nearest(colour, kept)) for colour in counts}
    body = b"".join(b"\0" + bytes(map(index.__getitem__, line)) for line in lines)
    head = struct.pack(">IIBBBBB", width, height, 8, _PALETTE, 0, 0, 0)
    parts = (
        (b"IHDR", head),
        (b"tEXt", b"Comment\0" + about.encode("latin-1")),
        (b"PLTE", b"".join(kept)),
        (b"IDAT", zlib.compress(body, 9)),
        (b"IEND", b""),
    )
    return _MAGIC + b"".join(_chunk(name, data) for name, data in parts)


def about_of(png: bytes) -> str | None:
    """The text that ``small`` put into a picture; None without one."""
    texts = [data for name, data in _chunks(png) if name == b"tEXt"]
    return texts[0].partition(b"\0")[2].decode("latin-1") if texts else None


def _chunks(png: bytes) -> Iterator[tuple[bytes, bytes]]:
    at = len(_MAGIC)
    while at < len(png):
        (length,) = struct.unpack_from(">I", png, at)
        yield png[at + 4 : at + 8], png[at + 8 : at + 8 + length]
        at += 12 + length


def _chunk(name: bytes, data: bytes) -> bytes:
    check = zlib.crc32(name + data)
    return struct.pack(">I", len(data)) + name + data + struct.pack(">I", check)


def _pixels(line: bytes) -> list[bytes]:
    return [line[at : at + 3] for at in range(0, len(line), 3)]


def _nearest(colour: bytes, kept: list[bytes]) -> bytes:
    return min(kept, key=lambda one: sum((a - b) ** 2 for a, b in zip(colour, one, strict=True)))


def _unfiltered(raw: bytes, stride: int, height: int) -> Iterator[bytes]:
    """The lines of a picture of three bytes a pixel (PNG 1.2, 6: Filter Algorithms)."""
    above = bytes(stride)
    for row in range(height):
        at = row * (stride + 1)
        kind, line = raw[at], bytearray(raw[at + 1 : at + 1 + stride])
        for n in range(stride if kind else 0):
            left, corner = (line[n - 3], above[n - 3]) if n >= 3 else (0, 0)
            line[n] = (line[n] + _predicted(kind, left, above[n], corner)) & 0xFF
        above = bytes(line)
        yield above


def _predicted(kind: int, left: int, up: int, corner: int) -> int:
    match kind:
        case 1:
            return left
        case 2:
            return up
        case 3:
            return (left + up) // 2
        case _:
            guess = left + up - corner
            return min((left, up, corner), key=lambda one: abs(guess - one))
