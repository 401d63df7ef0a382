"""Send entries with fields to systemd's journal (its native protocol, JOURNAL_NATIVE_PROTOCOL)."""

from __future__ import annotations

import os
import socket
from collections.abc import Mapping

SOCKET = "/run/systemd/journal/socket"
IDENTIFIER = "kvmtrace"


def is_stream(descriptor: int) -> bool:
    """Whether a descriptor leads to the journal: $JOURNAL_STREAM has its device and inode."""
    try:
        found = os.fstat(descriptor)
    except OSError:
        return False
    return os.environ.get("JOURNAL_STREAM") == f"{found.st_dev}:{found.st_ino}"


def send(fields: Mapping[str, str], address: str = SOCKET) -> bool:
    """Send one entry; return whether the journal took it.

    ``fields``: MESSAGE, PRIORITY and others, in capitals. Never waits: a journal that does not
    read must not stop the caller.
    """
    entry = b"".join(_field(*one) for one in {"SYSLOG_IDENTIFIER": IDENTIFIER, **fields}.items())
    try:
        with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM | socket.SOCK_CLOEXEC) as client:
            client.setblocking(False)
            client.sendto(entry, address)
    except OSError:
        return False
    return True


def _field(name: str, value: str) -> bytes:
    data = value.encode(errors="replace")
    # With the length in front a value may have line breaks: no value can begin a field.
    return name.encode() + b"\n" + len(data).to_bytes(8, "little") + data + b"\n"
