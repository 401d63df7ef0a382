"""Temporary files, without a name, for what may be too long to be held in memory."""

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
    """Around what makes, writes and reads such files: an error names their directory."""
    try:
        yield
    except OSError as error:
        raise KvmtraceError(
            f"{tempfile.gettempdir()}: {error.strerror}", "TMPDIR names another directory"
        ) from error


class LongText:
    """Text that is written once to ``file``, then read once from ``reading()``."""

    def __init__(self) -> None:
        with spooling():
            self._file = tempfile.TemporaryFile()  # noqa: SIM115 (lives as long as this)
            # Events repeat: a tenth of their size, and /tmp may be memory.
            self._packed = gzip.GzipFile(fileobj=self._file, mode="wb", compresslevel=1)
        self.file: IO[str] = io.TextIOWrapper(cast(IO[bytes], self._packed), encoding="utf-8")

    def reading(self) -> tuple[IO[bytes], int]:
        """A file to read it from, and its length in bytes. Nothing can be written any more."""
        with spooling():
            self.file.flush()
            size = self._packed.tell()
            self.file.close()
            self._file.seek(0)
        return cast(IO[bytes], gzip.GzipFile(fileobj=self._file, mode="rb")), size

    def close(self) -> None:
        """Give its room back."""
        with contextlib.suppress(OSError):  # what could not be written before
            self._file.close()
