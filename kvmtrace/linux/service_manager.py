"""Report to the service manager that the service is ready, alive or ending (sd_notify(3)).

And take the sockets that it listens on for the service (sd_listen_fds(3)).
"""

from __future__ import annotations

import os
import socket

MESSAGE_BYTES = 4096


def notify(**states: str) -> bool:
    """Send states, for instance ``READY="1"``; return whether a service manager took them.

    Without $NOTIFY_SOCKET, or with one that nobody reads, nothing is sent: a service must not end
    because its manager does not listen.
    """
    address = os.environ.get("NOTIFY_SOCKET", "")
    if not address.startswith(("/", "@")):
        return False
    text = "\n".join(f"{name}={' '.join(value.split())}" for name, value in states.items())
    try:
        with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM | socket.SOCK_CLOEXEC) as client:
            client.setblocking(False)
            client.connect(f"\0{address[1:]}" if address[0] == "@" else address)
            client.send(text.encode(errors="replace")[:MESSAGE_BYTES])
    except OSError:
        return False
    return True


_FIRST = 3
_LISTEN = ("LISTEN_PID", "LISTEN_FDS", "LISTEN_FDNAMES")


def passed_sockets() -> list[socket.socket]:
    """The listening stream sockets that the manager passed, in its order; each may be taken once.

    Others of its descriptors are closed. None of them is inherited by children.
    """
    pid, count, _ = (os.environ.pop(name, "") for name in _LISTEN)
    if pid != str(os.getpid()) or not count.isdecimal():
        return []
    found = []
    for descriptor in range(_FIRST, _FIRST + int(count)):
        try:
            os.set_inheritable(descriptor, False)
            one = socket.socket(fileno=descriptor)
        except OSError:  # no socket
            continue
        if one.type == socket.SOCK_STREAM and one.getsockopt(
            socket.SOL_SOCKET, socket.SO_ACCEPTCONN
        ):
            one.setblocking(False)
            found.append(one)
        else:
            one.close()
    return found


def watchdog_seconds() -> float | None:
    """Return how often to report that the service is alive; None if the manager does not watch.

    That is half of $WATCHDOG_USEC, as sd_watchdog_enabled(3) recommends.
    """
    if os.environ.get("WATCHDOG_PID", str(os.getpid())) != str(os.getpid()):
        return None
    try:
        microseconds = int(os.environ["WATCHDOG_USEC"])
    except (KeyError, ValueError):
        return None
    return microseconds / 2e6 if microseconds > 0 else None
