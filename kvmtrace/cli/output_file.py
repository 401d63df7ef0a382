"""Files that commands write: recordings and bundles.

They are on the disk when a command ends. The reader of events never waits for the disk.
"""

from __future__ import annotations

import contextlib
import errno
import os
import secrets
import stat
import tempfile
import threading
import time
from collections.abc import Iterator
from types import TracebackType
from typing import IO, Any, Self

from kvmtrace.cli.console import discard
from kvmtrace.cli.signals import Interrupted, always, nobody_reads, stop
from kvmtrace.errors import KvmtraceError

# How long a disk may take after a signal, in seconds; with all else that must be less than 5.
SYNC_SECONDS = 2.0


class Output:
    """A file that only its owner can read: it holds addresses of other people's guests.

    The file is created immediately so that errors show early. ``place()`` gives it its name; with
    ``force`` the old file is replaced only then. Before that it has no name where the file system
    supports it (O_TMPFILE), so even a killed command leaves nothing behind.

    An old file must belong to this user: in a directory like /tmp, others may have put something
    at the path. /dev/stdout and pipes of this user are written to, not replaced.

    Raises KvmtraceError if the file cannot be created.
    """

    def __init__(self, path: str, force: bool, *, binary: bool = False) -> None:
        self._path = path
        self._force = force
        self._is_new = False
        self._temporary: str | None = None
        self._disk = _Disk(self._directory)
        try:
            descriptor = self._open()
        except FileExistsError:
            raise self._already_exists() from None
        except OSError as error:
            raise self._cannot_write(error) from error
        stop.clean_up.append(self._remove)
        mode, encoding = ("wb", None) if binary else ("w", "utf-8")
        self.file: IO[Any] = open(descriptor, mode, encoding=encoding)  # noqa: SIM115 (a context)

    def _open(self) -> int:
        flags = os.O_WRONLY | os.O_CLOEXEC
        if self._force:
            if _is_open_elsewhere(self._path):
                with stop.waiting(always):
                    return os.open(self._path, flags | os.O_TRUNC)
            if not _is_ours(self._path):
                raise KvmtraceError(f"{self._path} is not a file of this user", _USE_ANOTHER_FILE)
            if _is_pipe(self._path):
                with stop.waiting(always):
                    descriptor = os.open(self._path, flags | os.O_NOFOLLOW)
                found = os.fstat(descriptor)
                if found.st_uid != os.geteuid() or not stat.S_ISFIFO(found.st_mode):
                    os.close(descriptor)
                    raise KvmtraceError(f"{self._path} has just been replaced", _USE_ANOTHER_FILE)
                return descriptor
        else:
            _require_free(self._path)
        # A new file: the old one may be readable by everybody, or a link to somebody else's.
        self._is_new = True
        with contextlib.suppress(OSError):  # not on every file system
            return os.open(self._directory, flags | os.O_TMPFILE, 0o600)
        descriptor, self._temporary = tempfile.mkstemp(prefix=_PREFIX, dir=self._directory)
        return descriptor

    @property
    def _directory(self) -> str:
        return os.path.dirname(self._path) or "."

    @contextlib.contextmanager
    def writing(self) -> Iterator[None]:
        """Around writes to ``file``: a signal interrupts them if nobody reads.

        Errors become KvmtraceErrors with the path.
        """
        try:
            with stop.waiting(lambda: nobody_reads(self.file)):
                yield
        except BrokenPipeError:
            raise
        except OSError as error:
            raise self._failed(error) from error

    def place(self) -> None:
        """Put the file at its path, where it stays whatever happens."""
        with self.writing():
            self.file.flush()
        if not self._is_new:
            return
        try:
            if self._force:
                if not _is_ours(self._path):
                    raise KvmtraceError(f"{self._path} has just been replaced", _USE_ANOTHER_FILE)
                if self._temporary is None:
                    self._temporary = _link_temporary(self.file.fileno(), self._directory)
                os.replace(self._temporary, self._path)
            elif self._temporary is None:
                _link(self.file.fileno(), self._path)
            else:
                _rename_to_free(self._temporary, self._path)
        except FileExistsError:
            raise self._already_exists() from None
        except OSError as error:
            raise self._cannot_write(error) from error
        self._is_new, self._temporary = False, None

    def sync_soon(self) -> None:
        """Begin to write what is flushed to the disk; return at once."""
        self._disk.request(self.file.fileno())

    def sync(self) -> None:
        """Write all to the disk and wait for it, so that it survives a crash of the host.

        After a signal it waits ``SYNC_SECONDS`` at most.
        """
        with self.writing():
            self.file.flush()
        self._disk.request(self.file.fileno())
        given_up = None
        while not self._disk.wait(0.05):
            if stop.requested:
                given_up = given_up or time.monotonic() + SYNC_SECONDS
                if time.monotonic() >= given_up:
                    raise KvmtraceError(
                        f"{self._path}: the disk does not answer",
                        "what it has not confirmed is lost if the host goes down now",
                    )
        if self._disk.error is not None:
            raise self._failed(self._disk.error) from self._disk.error

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        with contextlib.ExitStack() as steps:
            steps.callback(self._remove)
            steps.callback(self._close, error is not None)
            if isinstance(error, Interrupted):
                discard(self.file)
            elif not self._is_new:
                try:
                    self.sync()
                except Interrupted:
                    discard(self.file)
                    raise
                except (KvmtraceError, OSError):
                    if error is None:
                        raise

    def _close(self, failed: bool) -> None:
        try:
            self.file.close()
        except OSError as failure:
            if not failed:
                raise self._failed(failure) from failure

    def _remove(self) -> None:
        """Remove the file unless it was put in place."""
        if self._temporary is not None:
            with contextlib.suppress(OSError):
                os.unlink(self._temporary)

    def _already_exists(self) -> KvmtraceError:
        hint = "--force replaces it" if _is_ours(self._path) else _USE_ANOTHER_FILE
        return KvmtraceError(f"{self._path} is already there", hint)

    def _cannot_write(self, error: OSError) -> KvmtraceError:
        return KvmtraceError(
            f"{self._path}: {error.strerror}", "name a file in a directory that can be written to"
        )

    def _failed(self, error: OSError) -> KvmtraceError:
        hint = "nothing was put there" if self._is_new else "what was written before is there"
        return KvmtraceError(f"{self._path}: {error.strerror}", hint)


_USE_ANOTHER_FILE = "name another file, or remove what is there"
_PREFIX = ".kvmtrace-"


class _Disk:
    """Writes a file and its directory to the disk (fsync), in a thread of its own.

    A disk can take seconds or hang; the thread that reads events must not wait for it.
    """

    def __init__(self, directory: str) -> None:
        self.error: OSError | None = None
        self._directory = directory
        self._requested = False
        self._busy = False
        self._changed = threading.Condition()

    def request(self, descriptor: int) -> None:
        """Begin an fsync, or do another one after the one under way."""
        with self._changed:
            self._requested = True
            if self._busy:
                return
            own = os.dup(descriptor)
            thread = threading.Thread(
                target=self._work, args=(own,), name="kvmtrace-disk", daemon=True
            )
            try:
                thread.start()
            except RuntimeError:  # no thread can be started: the kernel writes within a minute
                self._requested = False
                os.close(own)
            else:
                self._busy = True

    def wait(self, seconds: float) -> bool:
        """Wait up to ``seconds``; whether everything requested is done."""
        with self._changed:
            return self._changed.wait_for(lambda: not self._busy, seconds)

    def _work(self, descriptor: int) -> None:
        try:
            while self._take_request():
                _fsync(descriptor)
                with contextlib.suppress(PermissionError):  # a directory that cannot be read
                    _fsync_directory(self._directory)
        except OSError as error:
            self.error = self.error or error
            with self._changed:
                self._busy = False
                self._changed.notify_all()
        finally:
            os.close(descriptor)

    def _take_request(self) -> bool:
        with self._changed:
            self._busy, self._requested = self._requested, False
            self._changed.notify_all()
            return self._busy


def _fsync(descriptor: int) -> None:
    try:
        os.fsync(descriptor)
    except OSError as error:
        # Pipes, and file systems without fsync.
        if error.errno not in (errno.EINVAL, errno.ENOSYS, errno.EOPNOTSUPP, errno.EROFS):
            raise


def _fsync_directory(path: str) -> None:
    descriptor = os.open(path, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        _fsync(descriptor)
    finally:
        os.close(descriptor)


def _require_free(path: str) -> None:
    """Raise OSError if something is at the path, or nothing can be."""
    try:
        os.lstat(path)
    except FileNotFoundError:
        if os.path.basename(path):
            return
        raise
    raise FileExistsError(errno.EEXIST, os.strerror(errno.EEXIST), path)


def _link(descriptor: int, path: str) -> None:
    """Give a file without a name this one. Raises FileExistsError instead of replacing a file."""
    # With a src_dir_fd Python calls linkat(), which can follow the link in /proc.
    os.link(f"/proc/self/fd/{descriptor}", path, src_dir_fd=descriptor, follow_symlinks=True)


def _link_temporary(descriptor: int, directory: str) -> str:
    path = os.path.join(directory, _PREFIX + secrets.token_hex(8))
    _link(descriptor, path)
    return path


def _rename_to_free(path: str, new: str) -> None:
    """Rename a file. Raises FileExistsError instead of replacing one."""
    os.close(os.open(new, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o600))
    try:
        os.replace(path, new)
    except OSError:
        os.unlink(new)
        raise


def _is_open_elsewhere(path: str) -> bool:
    """Whether the path is like /dev/stdout, which another process reads, even if it is a file."""
    directory = os.path.realpath(os.path.dirname(path))
    return directory == "/dev" or directory.startswith("/proc/")


def _is_ours(path: str) -> bool:
    """Whether nothing is at the path, or a file, link or pipe of this user."""
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
