"""How other commands ask a running ``kvmtrace serve`` what happened before, and follow it.

A Unix socket in a directory that only its owner can write to, so that nobody else on the host can
take the name first or crowd the queue. Both ends also check who the other one is: the log holds
addresses of other people's guests. It is for root, for the user that serve runs as, and for members
of the group ``kvmtrace`` where there is one.

Each client is sent a recording that does not end: what happened so far, a mark, and then what
happens. Each has a thread, so that one that stops reading holds up nobody else.
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import grp
import os
import socket
import stat
import struct
import threading
import time
from collections.abc import Callable, Iterator

NAME = "serve.sock"
"""A file in the directory of ``directory``, or a path."""
DIRECTORY = "/run/kvmtrace"
VARIABLE = "KVMTRACE_RUNTIME_DIR"
GROUP = "kvmtrace"
TIMEOUT = 10.0
MAX_CLIENTS = 16
"""Further clients are refused, and attach on their own."""

_RETRY = 0.2
_BACKLOG = 64
_CROWDED_SECONDS = 5.0
_LOCK_SECONDS = 5.0
_SO_PEERGROUPS = 59  # include/uapi/asm-generic/socket.h; not in the socket module


class FeedServer:
    """Lets ``answer(client)`` talk to each client that may ask, until ``close``.

    ``name``: as ``NAME``. Not ``started``: clients wait until ``start``. Raises OSError if the
    directory is not safe, or another serve is there.
    """

    def __init__(
        self,
        answer: Callable[[socket.socket], None],
        name: str | None = None,
        *,
        started: bool = True,
    ) -> None:
        self._answer = answer
        self._lock = threading.Lock()
        self._clients: dict[socket.socket, threading.Thread] = {}
        self._closed = False
        self._group: int | None = None
        self.path = _path(name or NAME, directory())
        self._socket = socket.socket(socket.AF_UNIX)
        try:
            self._group = _prepare(os.path.dirname(self.path))
            with _locked(os.path.dirname(self.path)):
                self._file = _bind(self._socket, self.path, self._group)
                self._socket.listen(_BACKLOG)
        except OSError:
            self._socket.close()
            raise
        self._thread = threading.Thread(target=self._serve, name="kvmtrace-door", daemon=True)
        if started:
            self.start()

    def start(self) -> None:
        """Begin to answer, with the privileges of the calling thread."""
        self._thread.start()

    def _serve(self) -> None:
        while True:
            try:
                client, _ = self._socket.accept()
            except OSError:
                if self._closed:
                    return
                time.sleep(_RETRY)  # no file descriptors left, for instance
                continue
            with self._lock:
                if not self._has_room() or not self._may_ask(client):
                    client.close()
                    continue
                thread = threading.Thread(
                    target=self._talk, args=(client,), name="kvmtrace-client", daemon=True
                )
                try:
                    thread.start()
                except RuntimeError:  # no thread is to be had (TasksMax)
                    client.close()
                else:
                    self._clients[client] = thread

    def _has_room(self) -> bool:
        """A client that has left takes no place, though its thread may not have noticed yet."""
        if len(self._clients) >= 4 * MAX_CLIENTS:
            return False
        return sum(not has_left(client) for client in self._clients) < MAX_CLIENTS

    def _may_ask(self, client: socket.socket) -> bool:
        if _trusted(client):
            return True
        return (
            self._group is not None
            and self._group in _groups(client)
            and _same_namespaces(_credentials(client)[0])
        )

    def _talk(self, client: socket.socket) -> None:
        # A client that went away, a source that died: neither is another client's fault.
        with client, contextlib.suppress(Exception):
            self._answer(client)
        with self._lock:
            del self._clients[client]

    def close(self) -> None:
        """Remove the socket, answer no more, and end what is being sent."""
        self._closed = True
        # While it listens, nobody takes the file for a left one: it is still ours.
        with contextlib.suppress(OSError):
            if _identity(self.path) == self._file:
                os.unlink(self.path)
        with contextlib.suppress(OSError):
            self._socket.shutdown(socket.SHUT_RDWR)
        self._socket.close()
        if self._thread.ident is not None:
            self._thread.join()
        with self._lock:
            clients = dict(self._clients)
            for client in clients:
                with contextlib.suppress(OSError):
                    client.shutdown(socket.SHUT_RDWR)
        deadline = time.monotonic() + _RETRY
        for thread in clients.values():
            thread.join(max(0.0, deadline - time.monotonic()))


def has_left(client: socket.socket) -> bool:
    """Whether a client, which never says anything, has closed its end."""
    try:
        return client.recv(1, socket.MSG_PEEK | socket.MSG_DONTWAIT) == b""
    except BlockingIOError:
        return False
    except OSError:
        return True


def directory() -> str:
    """Where a serve of this user has its socket.

    Raises OSError for a user without a directory of its own (``XDG_RUNTIME_DIR``).
    """
    if given := os.environ.get(VARIABLE):
        return given
    if os.geteuid() == 0:
        return DIRECTORY
    if own := os.environ.get("XDG_RUNTIME_DIR"):
        return os.path.join(own, os.path.basename(DIRECTORY))
    raise OSError(errno.ENOENT, f"neither root nor XDG_RUNTIME_DIR: set {VARIABLE}")


def knock(name: str | None = None) -> tuple[socket.socket, int] | None:
    """A connection to the ``kvmtrace serve`` of this host, and its pid.

    None if none runs that may be believed. A user's own serve is asked before root's.
    """
    places = []
    with contextlib.suppress(OSError):
        places.append(directory())
    if VARIABLE not in os.environ:
        places.append(DIRECTORY)
    for path in dict.fromkeys(_path(name or NAME, place) for place in places):
        client = socket.socket(socket.AF_UNIX)
        with contextlib.suppress(OSError):
            client.settimeout(TIMEOUT)
            _connect(client, path)
            if _trusted(client):
                return client, _credentials(client)[0]
        client.close()
    return None


def _path(name: str, place: str) -> str:
    # A NUL once made names abstract; it means nothing in a directory.
    return name if "/" in name else os.path.join(place, name.replace("\0", ""))


def _connect(client: socket.socket, path: str) -> None:
    """Connect, also where many do so at once. Raises OSError if nobody listens there."""
    deadline = time.monotonic() + _CROWDED_SECONDS
    while True:
        try:
            client.connect(path)
        except BlockingIOError:  # the queue is full: somebody is there
            if time.monotonic() >= deadline:
                raise
            time.sleep(0.01)
        else:
            return


# -- the socket's file


def _prepare(place: str) -> int | None:
    """Make the directory where it is missing; the id of the group that may enter, if any.

    Raises OSError where somebody else could put a socket in our place.
    """
    made = False
    with contextlib.suppress(FileExistsError):
        os.mkdir(place, 0o700)
        made = True
    descriptor = os.open(place, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC)
    try:
        found = os.fstat(descriptor)
        if found.st_uid not in (0, os.geteuid()):
            raise OSError(errno.EPERM, f"{place} belongs to another user (uid {found.st_uid})")
        if not made and place != DIRECTORY:
            # Somebody else's to arrange; in one like /tmp nobody can remove what is ours.
            if found.st_mode & 0o022 and not found.st_mode & stat.S_ISVTX:
                raise OSError(errno.EPERM, f"others may write to {place}")
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
        return grp.getgrnam(GROUP).gr_gid
    except (KeyError, OSError):
        return None


@contextlib.contextmanager
def _locked(place: str) -> Iterator[None]:
    """One serve at a time looks at what is in the directory and binds. Raises OSError."""
    descriptor = os.open(place, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    deadline = time.monotonic() + _LOCK_SECONDS
    try:
        while True:
            try:
                fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
                break
            except BlockingIOError:
                if time.monotonic() >= deadline:
                    raise OSError(errno.EAGAIN, f"{place} is locked by another process") from None
                time.sleep(0.01)
        yield
    finally:
        os.close(descriptor)


def _bind(listening: socket.socket, path: str, group: int | None) -> tuple[int, int]:
    """Bind, in place of a socket that a killed serve left; what identifies the file."""
    os.fchmod(listening.fileno(), 0o600)  # the file's mode, as unix_bind() takes it
    try:
        listening.bind(path)
    except OSError as error:
        if error.errno != errno.EADDRINUSE:
            raise
        _remove_left(path)
        listening.bind(path)
    if group is not None:
        os.chown(path, -1, group, follow_symlinks=False)
        os.chmod(path, 0o660)
    return _identity(path)


def _remove_left(path: str) -> None:
    """Raises OSError unless the file is a socket that nobody listens to."""
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


# -- who is at the other end


def _trusted(peer: socket.socket) -> bool:
    """Root or ourselves, and not of a container, which may have been given the directory."""
    pid, uid = _credentials(peer)
    return uid in (0, os.geteuid()) and _same_namespaces(pid)


def _same_namespaces(pid: int) -> bool:
    try:
        return all(
            os.stat(f"/proc/{pid}/ns/{kind}").st_ino == os.stat(f"/proc/self/ns/{kind}").st_ino
            for kind in ("pid", "user")
        )
    except PermissionError:
        # A member of the group may not look at root; a serve looks at the member.
        return os.geteuid() != 0
    except OSError:
        return False


def _credentials(peer: socket.socket) -> tuple[int, int]:
    """Process and user id of the peer, from the kernel."""
    pid, uid, _ = _ucred(peer)
    return pid, uid


def _ucred(peer: socket.socket) -> tuple[int, int, int]:
    size = struct.calcsize("3i")
    pid, uid, gid = struct.unpack(
        "3i", peer.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, size)
    )
    return pid, uid, gid


def _groups(peer: socket.socket) -> set[int]:
    """Every group of the peer; of more than 256 supplementary ones, none."""
    groups = {_ucred(peer)[2]}
    with contextlib.suppress(OSError):
        packed = peer.getsockopt(socket.SOL_SOCKET, _SO_PEERGROUPS, 1024)
        groups |= set(struct.unpack(f"{len(packed) // 4}I", packed))
    return groups
