"""TCP sockets that listen: where, and the error if that fails."""

from __future__ import annotations

import errno
import socket

from kvmtrace.errors import KvmtraceError, UsageError

# Prometheus' list of ports has no free one below 10000. This one is Core Lightning's, which hardly
# runs on a host of VMs.
LOOPBACK = "127.0.0.1"
DEFAULT_LISTEN = f"{LOOPBACK}:9750"

_QUEUE = 128


def parse_listen(listen: str) -> tuple[str, int]:
    """``HOST:PORT``, ``[V6]:PORT``, ``:PORT`` (every address) or ``PORT`` (loopback).

    → (host, port); 0: any free port. Raises UsageError for anything else.
    """
    host, colon, port = listen.rpartition(":")
    if not colon:
        host = LOOPBACK
    if host.startswith("[") and host.endswith("]"):
        host = host[1:-1]
        valid = ":" in host
    else:
        valid = not set(host) & set("[]:/ @")
    # isdecimal alone takes digits of other scripts, and int() would then agree.
    if not (valid and port.isascii() and port.isdecimal() and int(port) < 65536):
        raise UsageError(
            f"cannot listen on {listen!r}: not [HOST:]PORT",
            "examples: 9750, 127.0.0.1:9750, [::1]:9750, or :9750 for every address",
        )
    return host, int(port)


def check_listen(listen: str) -> None:
    """Raise the error that ``listening_at`` would raise, before there is anything to serve."""
    listening_at(listen).close()


def listening_at(listen: str) -> socket.socket:
    """A socket that listens on ``listen`` (see ``parse_listen``). Raises KvmtraceError."""
    host, port = parse_listen(listen)
    both_families = not host and socket.has_dualstack_ipv6()
    try:
        (family, _, _, _, address), *_ = socket.getaddrinfo(
            "::" if both_families else host or None,
            port,
            type=socket.SOCK_STREAM,
            flags=socket.AI_PASSIVE,
        )
        listening = socket.create_server(
            address,
            family=family,
            backlog=_QUEUE,
            dualstack_ipv6=both_families,
        )
    except OSError as error:
        raise _cannot_listen(listen, error) from None
    listening.setblocking(False)
    return listening


def _cannot_listen(listen: str, error: OSError) -> KvmtraceError:
    reasons: dict[int | None, tuple[str, str]] = {
        errno.EADDRINUSE: (
            "port in use",
            "is another kvmtrace serve running? name another port with --listen HOST:PORT",
        ),
        errno.EACCES: ("not permitted", "ports below 1024 need root; take a higher one"),
        errno.EADDRNOTAVAIL: ("not an address of this host", "ip address lists them"),
    }
    if isinstance(error, socket.gaierror):
        why, hint = "unknown host", "give an address of this host, for example 127.0.0.1"
    elif error.errno in reasons:
        why, hint = reasons[error.errno]
    else:
        why, hint = error.strerror or str(error), ""
    return KvmtraceError(f"cannot listen on {listen}: {why}", hint)
