"""Where the files are that are not Python: BPF sources and dashboards.

A wheel carries them inside the package; a checkout (and an editable install of it) beside it.
"""

from __future__ import annotations

from pathlib import Path

from kvmtrace.errors import KvmtraceError

_PACKAGE = Path(__file__).resolve().parent


def bpf_dir() -> Path:
    """The directory with the BPF programs and the stand-in kernel headers."""
    return _data("bpf")


def dashboards_dir() -> Path:
    """The directory with Grafana dashboards and alert rules."""
    return _data("dashboards")


def _data(name: str) -> Path:
    for parent in (_PACKAGE, _PACKAGE.parent):
        path = parent / name
        if path.is_dir():
            return path
    raise KvmtraceError(f"this installation has no {name}/ directory", "install kvmtrace again")
