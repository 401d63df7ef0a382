"""The names under which a server on loopback answers: its own, and no others.

A web page can have its own name resolve to 127.0.0.1, and read the answers in a browser on this
host (DNS rebinding). It cannot do so with addresses or with the names known here.
"""

from __future__ import annotations

import ipaddress
import re
import socket
from collections.abc import Iterable

OTHER_NAME = (
    "not served under this host name: use an address or localhost, or serve --allow-host NAME\n"
)


class HostNames:
    """The names of a server on loopback, besides localhost and that of this host."""

    def __init__(self, names: Iterable[str]) -> None:
        own = ("localhost", socket.gethostname(), *names)
        self._names = frozenset(name.lower().rstrip(".") for name in own)

    def has(self, host: str) -> bool:
        """Whether to answer a request with this Host header; an empty one names nothing else."""
        if not host:
            return True
        name = re.sub(r":[0-9]*$", "", host).lower().rstrip(".")
        return name in self._names or name.endswith(".localhost") or _is_address(name)


def is_loopback(address: str) -> bool:
    """Whether an IP address is reached from this host only."""
    found = ipaddress.ip_address(address.partition("%")[0])
    mapped = found.ipv4_mapped if isinstance(found, ipaddress.IPv6Address) else None
    return (mapped or found).is_loopback


def _is_address(name: str) -> bool:
    try:
        ipaddress.ip_address(name.removeprefix("[").removesuffix("]"))
    except ValueError:
        return False
    return True
