"""Machines that lack what a host may lack: taken out of the root's overlay at boot, in seconds.

Rather than roots of their own, each of which would be built and kept for what it does not have.
"""

from __future__ import annotations

from collections.abc import Iterable

from tests.lab.errors import LabError
from tests.lab.root import LIBRARY

# Debian packages. iproute2 depends on libbpf, so most hosts without bcc have it: the machine that
# does not is the harder one.
_PACKAGES = {"bcc": "python3-bpfcc libbpfcc libbpf1 bpftrace"}
# Roots of other architectures are only unpacked: dpkg finds not all there that it needs.
_FILES = {"bcc": "/usr/lib/python3/dist-packages/bcc /usr/lib/*/libbcc.so* /usr/lib/*/libbpf.so*"}
_LIBRARIES = ("prometheus_client", "rich", "textual")


def commands(names: Iterable[str]) -> list[str]:
    """Shell commands that take these out of a machine, and fail if they are still there."""
    lines = []
    for name in names:
        if name in _PACKAGES:
            purge = f"dpkg --purge --force-depends {_PACKAGES[name]}"
            lines.append(f"{{ {purge} || rm -r {_FILES[name]}; }} 2>&1")
        elif name in _LIBRARIES:
            lines.append(f"rm -r {LIBRARY}/{name}")
        else:
            raise LabError(f"no machine can be had without {name}")
        lines.append(f"! python3 -c 'import {name}' 2>/dev/null")
    return lines
