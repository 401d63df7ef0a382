"""Nameless temporary files, for text that may not fit into memory."""

from __future__ import annotations

import contextlib
import gzip
import io
import tempfile
from collections.abc import Iterator
from typing import IO, cast

from kvmtrace.errors import KvmtraceError


@contextlib.contextmanager
def spooling() -> Iterator[None]:
    """Turn OSError of temporary files into a KvmtraceError that names their directory."""
    try:
        yield
    except OSError as error:
        raise KvmtraceError(
            f"{tempfile.gettempdir()}: {error.strerror}", "TMPDIR names another directory"
        ) from error


class LongText:
    """Text that is written to ``file`` once, and read from ``reading()`` once."""

    def __init__(self) -> None:
        with spooling():
            self._file = tempfile.TemporaryFile()  # noqa: SIM115 (lives as long as this)
            # /tmp may be memory, and events shrink to a tenth.
            self._packed = gzip.GzipFile(fileobj=self._file, mode="wb", compresslevel=1)
        self.file: IO[str] = io.TextIOWrapper(cast(IO[bytes], self._packed), encoding="utf-8")

    def reading(self) -> tuple[IO[bytes], int]:
        """Return a file to read from, and its length in bytes. Ends writing."""
        with spooling():
            self.file.flush()
            size = self._packed.tell()
            self.file.close()
            self._file.seek(0)
        return cast(IO[bytes], gzip.GzipFile(fileobj=self._file, mode="rb")), size

    def close(self) -> None:
        with contextlib.suppress(OSError):  # of writes that are still buffered
            self._file.close()
