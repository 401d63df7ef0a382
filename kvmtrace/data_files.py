"""Where the files are that are not Python: bpf/, dashboards/ and assets/."""

from __future__ import annotations

from pathlib import Path

from kvmtrace.errors import KvmtraceError


def directory(name: str) -> Path:
    """The directory of that name. Raises KvmtraceError if this installation lacks it.

    A wheel has it inside the package; a checkout (and an editable install of it) may have it beside
    the package.
    """
    package = Path(__file__).resolve().parent
    for parent in (package, package.parent):
        if (parent / name).is_dir():
            return parent / name
    raise KvmtraceError(f"this installation has no {name}/ directory", "install kvmtrace again")
