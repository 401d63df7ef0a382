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
    try:
        mode = "r:" if file.seekable() else "r|"
        archive = tarfile.open(fileobj=file, mode=cast(Any, mode))  # noqa: SIM115 (read later)
        for number, member in enumerate(archive):
            if os.path.basename(member.name) == MEMBER and member.isfile():
                content = archive.extractfile(member)
                assert content is not None
                return io.BufferedReader(_Reader(content, file))
            if number >= _MAX_MEMBERS:
                break
    except (tarfile.TarError, EOFError, zlib.error) as error:
        raise OSError(errno.EIO, f"a damaged archive: {error}") from error
    raise OSError(errno.ENOENT, f"an archive without {MEMBER}")


class _Reader(io.RawIOBase):
    """What a file has after ``start``, with OSError for whatever its unpacking raises.

    ``outer``: the file that everything comes from, which is closed with it.
    """

    def __init__(self, inner: IO[bytes], outer: IO[bytes], start: bytes = b"") -> None:
        self._inner, self._outer, self._start = inner, outer, start

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return not self._start and self._outer.seekable() and self._inner.seekable()

    def seek(self, offset: int, whence: int = os.SEEK_SET) -> int:
        with _as_os_error():
            return self._inner.seek(offset, whence)

    def tell(self) -> int:
        return self._inner.tell()

    def fileno(self) -> int:
        return self._outer.fileno()

    def readinto(self, buffer: Any) -> int:
        if self._start:
            size = min(len(buffer), len(self._start))
            buffer[:size], self._start = self._start[:size], self._start[size:]
            return size
        with _as_os_error():
            # Not more than there is now, of a pipe.
            read = getattr(self._inner, "read1", self._inner.read)
            data = read(len(buffer))
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
    except (EOFError, zlib.error, tarfile.TarError) as error:
        raise OSError(errno.EIO, "what is compressed is cut off or damaged") from error
