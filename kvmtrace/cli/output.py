"""Files that commands write: recordings and bundles."""

from __future__ import annotations

import contextlib
import os
import stat
import tempfile
from collections.abc import Iterator
from types import TracebackType
from typing import IO, Any, Self

from kvmtrace.cli.ending import Interrupted, always, discard, nobody_reads, stop
from kvmtrace.errors import KvmtraceError


class Output:
    """A file for its owner's eyes only: it holds addresses of other people's guests.

    The file is created immediately so that errors show early, and kept once ``place()`` was called.
    With ``force`` it is a new one that replaces what is there only then. What is there must be
    ours: in a directory like /tmp, others may have put something at the path. What is open already
    (/dev/stdout) and a pipe of our own are written to, not replaced.
    """

    def __init__(self, path: str, force: bool, *, binary: bool = False) -> None:
        self._path = path
        self._made: str | None = None
        try:
            descriptor = self._open(force)
        except FileExistsError:
            hint = "--force replaces it" if _is_ours(path) else _ANOTHER
            raise KvmtraceError(f"{path} is already there", hint) from None
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
            return descriptor
        if _is_open_elsewhere(self._path):
            with stop.waiting(always):
                return os.open(self._path, flags | os.O_TRUNC)
        if not _is_ours(self._path):
            raise KvmtraceError(f"{self._path} is not a file of this user", _ANOTHER)
        if _is_pipe(self._path):
            with stop.waiting(always):
                descriptor = os.open(self._path, flags | os.O_NOFOLLOW)
            found = os.fstat(descriptor)
            if found.st_uid != os.geteuid() or not stat.S_ISFIFO(found.st_mode):
                os.close(descriptor)
                raise KvmtraceError(f"{self._path} has just been replaced", _ANOTHER)
            return descriptor
        # A new one: the old one may be open to everybody, or a link to somebody else's.
        directory = os.path.dirname(self._path) or "."
        descriptor, self._made = tempfile.mkstemp(prefix=".kvmtrace-", dir=directory)
        return descriptor

    @contextlib.contextmanager
    def writing(self) -> Iterator[None]:
        """Around writes to ``file``: a signal ends them if nobody reads; errors name the path."""
        try:
            with stop.waiting(lambda: nobody_reads(self.file)):
                yield
        except BrokenPipeError:
            raise
        except OSError as error:
            raise self._failed(error) from error

    def place(self) -> None:
        """From here on it is at its path, whatever happens."""
        with self.writing():
            self.file.flush()
        if self._made not in (None, self._path):
            try:
                os.replace(self._made, self._path)
            except OSError as error:
                raise self._refused(error) from error
        self._made = None

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        if isinstance(error, Interrupted):
            discard(self.file)
        try:
            self.file.close()
        except OSError as failure:
            if error is None:
                raise self._failed(failure) from failure
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

    def _failed(self, error: OSError) -> KvmtraceError:
        return KvmtraceError(f"{self._path}: {error.strerror}", "what was written before is there")


_ANOTHER = "name another file, or remove what is there"


def _is_open_elsewhere(path: str) -> bool:
    """Whether it is something like /dev/stdout, also where that is a file: its opener reads it."""
    directory = os.path.realpath(os.path.dirname(path))
    return directory == "/dev" or directory.startswith("/proc/")


def _is_ours(path: str) -> bool:
    """Whether nothing is there, or a file, a link or a pipe of this user."""
    try:
        found = os.lstat(path)
    except FileNotFoundError:
        return True
    except OSError:
        return False
    kinds = (stat.S_IFREG, stat.S_IFLNK, stat.S_IFIFO)
    return found.st_uid == os.geteuid() and stat.S_IFMT(found.st_mode) in kinds


def _is_pipe(path: str) -> bool:
    try:
        return stat.S_ISFIFO(os.lstat(path).st_mode)
    except OSError:
        return False
