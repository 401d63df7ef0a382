"""Serve the log of a session to other commands, over the socket of ``feed_socket``.

Clients: root, the user that serve runs as, and members of the group ``kvmtrace`` where that group
exists. Each client is sent a recording that does not end: the backlog, a mark, and then new events.
Each client has a thread, so that one that stops reading does not block the others.
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import grp
import os
import socket
import stat
import threading
import time
from collections.abc import Callable, Iterator

from kvmtrace import feed_socket
from kvmtrace.session.session import Session
from kvmtrace.sources.recording import Writer

GROUP = "kvmtrace"
MAX_CLIENTS = 16
"""Further clients are refused, and attach on their own."""

_READ_SECONDS = 1.0
_RETRY = 0.2
_QUEUE = 64
_LOCK_SECONDS = 5.0


def send_log(session: Session, client: socket.socket) -> None:
    """Send a client the session's backlog and then its events, until the client closes."""
    subscriber = session.subscribe()
    try:
        with client.makefile("w", encoding="utf-8") as file:
            writer = Writer(file, session.host())
            writer.write(subscriber.backlog, session.probes())
            subscriber.backlog = []
            writer.mark()
            while not feed_socket.is_closed(client):
                file.flush()
                writer.write(subscriber.read(_READ_SECONDS), session.probes())
    finally:
        session.unsubscribe(subscriber)


class FeedServer:
    """Run ``answer(client)`` for each permitted client, in a thread of its own, until ``close``.

    ``name``: as ``feed_socket.NAME``. Not ``started``: clients wait until ``start``. Raises OSError
    if the directory is not safe, or another serve listens there.
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
        self.path = feed_socket.socket_path(name or feed_socket.NAME, feed_socket.directory())
        self._socket = socket.socket(socket.AF_UNIX)
        try:
            self._group = _prepare(os.path.dirname(self.path))
            with _locked(os.path.dirname(self.path)):
                self._file = _bind(self._socket, self.path, self._group)
                self._socket.listen(_QUEUE)
        except OSError:
            self._socket.close()
            raise
        self._thread = threading.Thread(target=self._serve, name="kvmtrace-feed", daemon=True)
        if started:
            self.start()

    def start(self) -> None:
        """Begin to accept clients, with the privileges of the calling thread."""
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
                if not self._has_room() or not self._is_permitted(client):
                    client.close()
                    continue
                thread = threading.Thread(
                    target=self._talk, args=(client,), name="kvmtrace-client", daemon=True
                )
                try:
                    thread.start()
                except RuntimeError:  # no more threads (TasksMax)
                    client.close()
                else:
                    self._clients[client] = thread

    def _has_room(self) -> bool:
        """Whether another client may connect.

        A client that closed its end does not count, though its thread may not have ended yet.
        """
        if len(self._clients) >= 4 * MAX_CLIENTS:
            return False
        return sum(not feed_socket.is_closed(client) for client in self._clients) < MAX_CLIENTS

    def _is_permitted(self, client: socket.socket) -> bool:
        if feed_socket.is_trusted_peer(client):
            return True
        return (
            self._group is not None
            and self._group in feed_socket.groups(client)
            and feed_socket.in_our_namespaces(feed_socket.credentials(client)[0])
        )

    def _talk(self, client: socket.socket) -> None:
        # A client that closed, or a source that failed, must not affect other clients.
        with client, contextlib.suppress(Exception):
            self._answer(client)
        with self._lock:
            del self._clients[client]

    def close(self) -> None:
        """Remove the socket, accept no more clients, and disconnect those there are."""
        self._closed = True
        # While we listen, no other serve takes the file for a stale one.
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


# -- the socket's file


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
        if not made and parent != feed_socket.DIRECTORY:
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
        return grp.getgrnam(GROUP).gr_gid
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
