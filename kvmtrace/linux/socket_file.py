"""A listening Unix socket in a directory that nobody else can write to.

The file has the mode 0600, or where root's directory is opened to a group 0660. The stale file of a
killed process is replaced; one that somebody listens to, or that is no socket, never.
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import grp
import os
import socket
import stat
import time
from collections.abc import Iterator

from kvmtrace import local_socket

# To a full queue a client that does not wait cannot connect.
_QUEUE = 1024
_LOCK_SECONDS = 5.0


class SocketFile:
    """The socket of a serve as a file: it listens from now on, and is removed by ``close``.

    ``name``: as ``local_socket.NAME``. Raises OSError if the directory is not safe, or another
    serve listens there.
    """

    def __init__(self, name: str | None = None) -> None:
        self.path = local_socket.socket_path(name or local_socket.NAME, local_socket.directory())
        self.listening = socket.socket(socket.AF_UNIX)
        try:
            parent = os.path.dirname(self.path)
            group = _prepare(parent)
            with _locked(parent):
                self._file = _bind(self.listening, self.path, group)
                self.listening.listen(_QUEUE)
        except OSError:
            self.listening.close()
            raise
        self.listening.setblocking(False)

    def remove(self) -> None:
        """Remove the file. While we listen, no other serve takes it for a stale one."""
        with contextlib.suppress(OSError):
            if _identity(self.path) == self._file:
                os.unlink(self.path)

    def close(self) -> None:
        """Remove the file and stop listening. May be called twice."""
        self.remove()
        self.listening.close()


def _prepare(parent: str) -> int | None:
    """Make the directory if it is missing; return the id of the group that may enter, if any.

    Raises OSError if another user could replace our socket.
    """
    made = False
    with contextlib.suppress(FileExistsError):
        os.mkdir(parent, 0o700)
        made = True
    descriptor = os.open(parent, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC)
    try:
        found = os.fstat(descriptor)
        if found.st_uid not in (0, os.geteuid()):
            raise OSError(errno.EPERM, f"{parent} belongs to another user (uid {found.st_uid})")
        if not made and parent != local_socket.DIRECTORY:
            # Its owner sets its mode. In one like /tmp nobody else can remove our socket.
            if found.st_mode & 0o022 and not found.st_mode & stat.S_ISVTX:
                raise OSError(errno.EPERM, f"others may write to {parent}")
            return None
        group = _group()
        if group is not None:
            os.fchown(descriptor, -1, group)
        os.fchmod(descriptor, 0o750)
        return group
    finally:
        os.close(descriptor)


def _group() -> int | None:
    if os.geteuid() != 0:
        return None
    try:
        return grp.getgrnam(local_socket.GROUP).gr_gid
    except (KeyError, OSError):
        return None


@contextlib.contextmanager
def _locked(parent: str) -> Iterator[None]:
    """Hold the lock of the directory: one serve at a time checks it and binds. Raises OSError."""
    descriptor = os.open(parent, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    deadline = time.monotonic() + _LOCK_SECONDS
    try:
        while True:
            try:
                fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
                break
            except BlockingIOError:
                if time.monotonic() >= deadline:
                    raise OSError(errno.EAGAIN, f"{parent} is locked by another process") from None
                time.sleep(0.01)
        yield
    finally:
        os.close(descriptor)


def _bind(listening: socket.socket, path: str, group: int | None) -> tuple[int, int]:
    """Bind, replacing the stale socket of a killed serve; return the file's device and inode."""
    os.fchmod(listening.fileno(), 0o600)  # the file's mode, as unix_bind() takes it
    try:
        listening.bind(path)
    except OSError as error:
        if error.errno != errno.EADDRINUSE:
            raise
        _remove_stale(path)
        listening.bind(path)
    if group is not None:
        os.chown(path, -1, group, follow_symlinks=False)
        os.chmod(path, 0o660)
    return _identity(path)


def _remove_stale(path: str) -> None:
    """Remove a socket that nobody listens to. Raises OSError if the file is anything else."""
    if not stat.S_ISSOCK(os.lstat(path).st_mode):
        raise OSError(errno.EEXIST, f"{path} is there, and is not a socket")
    with socket.socket(socket.AF_UNIX) as client:
        client.setblocking(False)
        try:
            client.connect(path)
        except ConnectionRefusedError:
            os.unlink(path)
            return
        except BlockingIOError:
            pass
    raise OSError(errno.EADDRINUSE, "another kvmtrace serve answers them")


def _identity(path: str) -> tuple[int, int]:
    found = os.lstat(path)
    return found.st_dev, found.st_ino
