"""Open a recording as people hand it on: a file, a bundle, compressed or not, or standard input."""

from __future__ import annotations

import contextlib
import errno
import gzip
import io
import os
import sys
import tarfile
import zlib
from collections.abc import Iterator
from typing import IO, Any, cast

STANDARD_INPUT = "-"
MEMBER = "events.jsonl"
"""The recording's file name in a bundle (``views.bundle``)."""

_GZIP = b"\x1f\x8b"
_TAR_MAGIC_AT, _TAR_MAGIC = 257, b"ustar"
_BLOCK = tarfile.BLOCKSIZE
_MAX_MEMBERS = 1000
_PACKED_TWICE = 2  # a bundle that was compressed once more


def open_packed(path: str) -> IO[bytes]:
    """The bytes of the recording in the file; "-" is standard input.

    Raises OSError: it cannot be opened, or is a bundle without a recording. Reading raises OSError
    if what is compressed is damaged or cut off.
    """
    file = _standard_input() if path == STANDARD_INPUT else open(path, "rb")  # noqa: SIM115
    try:
        return _unpacked(file)
    except BaseException:
        file.close()
        raise


def _standard_input() -> IO[bytes]:
    if sys.stdin is not None and sys.stdin.isatty():
        raise OSError(errno.EINVAL, "a terminal: nothing is piped in")
    try:
        # Not sys.stdin's own buffer: closing the recording must not close that.
        return open(os.dup(sys.stdin.fileno()), "rb")
    except (AttributeError, ValueError, OSError):
        if (stream := getattr(sys.stdin, "buffer", None)) is not None:
            return io.BytesIO(stream.read())  # made up, by tests
        raise OSError(errno.EBADF, "closed") from None


def _unpacked(file: IO[bytes]) -> IO[bytes]:
    for _ in range(_PACKED_TWICE):
        start, file = _look(file, len(_GZIP))
        if start != _GZIP:
            break
        file = io.BufferedReader(_Reader(cast(IO[bytes], gzip.GzipFile(fileobj=file)), file))
    if start[:1] in (b"{", b""):
        return file
    start, file = _look(file, _TAR_MAGIC_AT + len(_TAR_MAGIC))
    return _member(file) if start[_TAR_MAGIC_AT:] == _TAR_MAGIC else file


def _look(file: IO[bytes], size: int) -> tuple[bytes, IO[bytes]]:
    """The first bytes, and a file that still has them."""
    start = file.read(size)
    if file.seekable():
        file.seek(0)
        return start, file
    return start, io.BufferedReader(_Reader(file, file, start))


def _member(file: IO[bytes]) -> IO[bytes]:
    """The recording in an archive.

    Not by ``tarfile.open``, which loses what it has read where an archive is cut off.
    """
    at = 0
    for _ in range(_MAX_MEMBERS):
        header = _exactly(file, _BLOCK)
        at += _BLOCK
        if not header.strip(b"\0"):
            break
        try:
            entry = tarfile.TarInfo.frombuf(header, "utf-8", "surrogateescape")
        except tarfile.TarError as error:
            raise OSError(errno.EIO, f"a damaged archive: {error}") from error
        if os.path.basename(entry.name) == MEMBER and entry.isreg():
            return io.BufferedReader(_Reader(file, file, begin=at, size=entry.size))
        blocks = -(-entry.size // _BLOCK)
        for _ in range(blocks):
            _exactly(file, _BLOCK)
        at += blocks * _BLOCK
    raise OSError(errno.ENOENT, f"an archive without {MEMBER}")


def _exactly(file: IO[bytes], size: int) -> bytes:
    data = file.read(size)
    if len(data) < size:
        raise OSError(errno.EIO, _CUT_OFF)
    return data


_CUT_OFF = "it is cut off or damaged"


class _Reader(io.RawIOBase):
    """What a file has after ``start``, with OSError for whatever its unpacking raises.

    ``outer``: the file that everything comes from, which is closed with it. ``begin``, ``size``:
    only these bytes of ``inner``, which is there now.
    """

    def __init__(
        self,
        inner: IO[bytes],
        outer: IO[bytes],
        start: bytes = b"",
        *,
        begin: int = 0,
        size: int | None = None,
    ) -> None:
        self._inner, self._outer, self._start = inner, outer, start
        self._begin, self._size, self._left = begin, size, size

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return not self._start and self._outer.seekable() and self._inner.seekable()

    def seek(self, offset: int, whence: int = os.SEEK_SET) -> int:
        if whence != os.SEEK_SET:
            raise io.UnsupportedOperation
        with _as_os_error():
            self._inner.seek(self._begin + offset)
        self._left = None if self._size is None else max(0, self._size - offset)
        return offset

    def tell(self) -> int:
        return self._inner.tell() - self._begin

    def fileno(self) -> int:
        return self._outer.fileno()

    def readinto(self, buffer: Any) -> int:
        if self._start:
            size = min(len(buffer), len(self._start))
            buffer[:size], self._start = self._start[:size], self._start[size:]
            return size
        size = len(buffer) if self._left is None else min(len(buffer), self._left)
        if not size:
            return 0
        with _as_os_error():
            # Not more than there is now, of a pipe.
            read = getattr(self._inner, "read1", self._inner.read)
            data = read(size)
        if self._left is not None:
            if not data:
                raise OSError(errno.EIO, _CUT_OFF)
            self._left -= len(data)
        buffer[: len(data)] = data
        return len(data)

    def close(self) -> None:
        if not self.closed:
            with contextlib.suppress(OSError, ValueError):
                self._inner.close()
            self._outer.close()
        super().close()


@contextlib.contextmanager
def _as_os_error() -> Iterator[None]:
    try:
        yield
    except (EOFError, zlib.error) as error:
        raise OSError(errno.EIO, _CUT_OFF) from error
