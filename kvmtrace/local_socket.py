"""The Unix socket of a running ``kvmtrace serve``: where it is, and who answers there.

The permissions of the socket and its directory decide who may connect: root or the user of the
serve, and the group ``kvmtrace``. A command checks in turn that it is root or its own user who
answers, outside of containers: what a serve reports decides what people do to VMs.
"""

from __future__ import annotations

import contextlib
import errno
import os
import socket
import struct
import time

NAME = "kvmtrace.sock"
"""A file in the directory of ``directory``, or a path."""
DIRECTORY = "/run/kvmtrace"
VARIABLE = "KVMTRACE_RUNTIME_DIR"
GROUP = "kvmtrace"
"""Its members may connect to the socket of root's serve."""
TIMEOUT = 10.0
START_TIMEOUT = 180.0
"""Of a service that its manager starts or restarts: TimeoutStartSec of kvmtrace.service."""
MANAGER = 1
"""The pid that SO_PEERCRED has for a socket that the service manager made."""
PID_HEADER = "Kvmtrace-Pid"
"""Of the answer with the events: who serves. The socket may have been made by a service manager."""

_QUEUE_SECONDS = 5.0


def directory() -> str:
    """Return the directory of this user's serve socket.

    Raises OSError for a user that has no such directory (``XDG_RUNTIME_DIR``).
    """
    if given := os.environ.get(VARIABLE):
        return given
    if os.geteuid() == 0:
        return DIRECTORY
    if own := os.environ.get("XDG_RUNTIME_DIR"):
        return os.path.join(own, os.path.basename(DIRECTORY))
    raise OSError(errno.ENOENT, f"neither root nor XDG_RUNTIME_DIR: set {VARIABLE}")


def connect(name: str | None = None) -> tuple[socket.socket, int] | None:
    """Connect to the ``kvmtrace serve`` of this host; the connection and who made the socket.

    That pid is the serve's, or ``MANAGER``. None if no trusted serve runs. A user's own serve is
    tried before root's.
    """
    directories = []
    with contextlib.suppress(OSError):
        directories.append(directory())
    if VARIABLE not in os.environ:
        directories.append(DIRECTORY)
    for path in dict.fromkeys(socket_path(name or NAME, parent) for parent in directories):
        client = socket.socket(socket.AF_UNIX)
        with contextlib.suppress(OSError):
            client.settimeout(TIMEOUT)
            _connect(client, path)
            if is_trusted_peer(client):
                return client, credentials(client)[0]
        client.close()
    return None


def socket_path(name: str, parent: str) -> str:
    """Return ``name`` if it is a path, else the file of that name in the directory ``parent``."""
    return name if "/" in name else os.path.join(parent, name)


def _connect(client: socket.socket, path: str) -> None:
    """Connect, waiting while the queue is full. Raises OSError if nobody listens there."""
    deadline = time.monotonic() + _QUEUE_SECONDS
    while True:
        try:
            client.connect(path)
        except BlockingIOError:  # the queue is full
            if time.monotonic() >= deadline:
                raise
            time.sleep(0.01)
        else:
            return


def is_closed(client: socket.socket) -> bool:
    """Whether the peer has closed its end; for peers that never send anything."""
    try:
        return client.recv(1, socket.MSG_PEEK | socket.MSG_DONTWAIT) == b""
    except BlockingIOError:
        return False
    except OSError:
        return True


def is_trusted_peer(peer: socket.socket) -> bool:
    """Whether the peer is root or our own user, outside of containers.

    A container may have the directory mounted.
    """
    pid, uid = credentials(peer)
    return uid in (0, os.geteuid()) and in_our_namespaces(pid)


def in_our_namespaces(pid: int) -> bool:
    """Whether a process is in our PID and user namespaces."""
    try:
        return all(
            os.stat(f"/proc/{pid}/ns/{kind}").st_ino == os.stat(f"/proc/self/ns/{kind}").st_ino
            for kind in ("pid", "user")
        )
    except PermissionError:
        # A member of the group may not read root's namespaces; the serve reads the member's.
        return os.geteuid() != 0
    except OSError:
        return False


def credentials(peer: socket.socket) -> tuple[int, int]:
    """Return the peer's pid and user id, from the kernel (SO_PEERCRED)."""
    size = struct.calcsize("3i")
    pid, uid, _ = struct.unpack("3i", peer.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, size))
    return pid, uid
