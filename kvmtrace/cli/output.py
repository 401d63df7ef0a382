"""Files that commands write: recordings and bundles."""

from __future__ import annotations

import contextlib
import os
import stat
import tempfile
from typing import IO, Any, Self

from kvmtrace.cli.ending import stop
from kvmtrace.errors import KvmtraceError


class Output:
    """A file for its owner's eyes only: it holds addresses of other people's guests.

    It is made at once, so that what is wrong with it is told at once, and stays once it was put in
    place (with ``force``: of what stood there, which is left alone until then).
    """

    def __init__(self, path: str, force: bool, *, binary: bool = False) -> None:
        self._path = path
        self._made: str | None = None
        try:
            descriptor = self._open(force)
        except FileExistsError:
            raise KvmtraceError(f"{path} is already there", "--force replaces it") from None
        except OSError as error:
            raise self._refused(error) from error
        stop.clean_up.append(self._remove)
        mode, encoding = ("wb", None) if binary else ("w", "utf-8")
        self.file: IO[Any] = open(descriptor, mode, encoding=encoding)  # noqa: SIM115 (a context)

    def _open(self, force: bool) -> int:
        flags = os.O_WRONLY | os.O_CLOEXEC
        if not force:
            descriptor = os.open(self._path, flags | os.O_CREAT | os.O_EXCL, 0o600)
            self._made = self._path
        elif _is_stream(self._path):
            descriptor = os.open(self._path, flags | os.O_TRUNC)
        else:
            # A new one: the old one may be open to everybody, or a link to somebody else's.
            directory = os.path.dirname(self._path) or "."
            descriptor, self._made = tempfile.mkstemp(prefix=".kvmtrace-", dir=directory)
        return descriptor

    def place(self) -> None:
        """From here on it is at its path, whatever happens."""
        self.file.flush()
        if self._made not in (None, self._path):
            try:
                os.replace(self._made, self._path)
            except OSError as error:
                raise self._refused(error) from error
        self._made = None

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        try:
            self.file.close()
        finally:
            self._remove()

    def _remove(self) -> None:
        """Unless it was put in place."""
        if self._made is not None:
            with contextlib.suppress(OSError):
                os.unlink(self._made)

    def _refused(self, error: OSError) -> KvmtraceError:
        return KvmtraceError(
            f"{self._path}: {error.strerror}", "name a file in a directory that can be written to"
        )


def _is_stream(path: str) -> bool:
    """Whether it is written to rather than replaced: a pipe, a terminal, /dev/stdout.

    The latter also where it is a file: whoever opened it reads that one.
    """
    directory = os.path.realpath(os.path.dirname(path))
    if directory == "/dev" or directory.startswith("/proc/"):
        return True
    try:
        return not stat.S_ISREG(os.stat(path).st_mode)
    except OSError:
        return False
