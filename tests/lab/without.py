"""Machines that lack software: it is removed from the root's overlay at boot.

This takes seconds, where a root per missing package would have to be built and kept.
"""

from __future__ import annotations

from collections.abc import Iterable

from tests.lab.errors import LabError
from tests.lab.root import LIBRARY

# Debian packages. libbpf is removed as well, which is the harder case: most hosts without bcc have
# it, as iproute2 depends on it.
_PACKAGES = {"bcc": "python3-bpfcc libbpfcc libbpf1 bpftrace"}
# Roots of other architectures are only unpacked, so dpkg may fail there.
_FILES = {"bcc": "/usr/lib/python3/dist-packages/bcc /usr/lib/*/libbcc.so* /usr/lib/*/libbpf.so*"}
_LIBRARIES = ("prometheus_client", "rich", "textual")


def commands(names: Iterable[str]) -> list[str]:
    """Shell commands that remove these from a machine, and fail if one can still be imported."""
    lines = []
    for name in names:
        if name in _PACKAGES:
            purge = f"dpkg --purge --force-depends {_PACKAGES[name]}"
            lines.append(f"{{ {purge} || rm -r {_FILES[name]}; }} 2>&1")
        elif name in _LIBRARIES:
            lines.append(f"rm -r {LIBRARY}/{name}")
        else:
            raise LabError(f"the lab cannot remove {name} from a machine")
        lines.append(f"! python3 -c 'import {name}' 2>/dev/null")
    return lines
