"""The contents of kernels.toml."""

from __future__ import annotations

import functools
import tomllib
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from tests.lab import programs
from tests.lab.errors import LabError

FILE = Path(__file__).with_name("kernels.toml")
PROJECT = Path(__file__).parents[2]


@dataclass(frozen=True)
class Arch:
    """How to run QEMU for an architecture."""

    name: str
    qemu: str
    qemu_package: str
    options: tuple[str, ...]
    console: str
    kvm_modules: tuple[str, ...]
    qemu_suites: tuple[str, ...] = ()
    qemu_firmware: tuple[str, ...] = ()
    ras_options: tuple[str, ...] = ()
    nested_options: tuple[str, ...] = ()
    cpus: dict[str, str] = field(default_factory=dict)

    @property
    def foreign(self) -> bool:
        """Whether this host cannot run programs of the architecture."""
        return self.name != host_arch()


@dataclass(frozen=True)
class Root:
    """A root file system: a Debian suite and the packages installed in it.

    ``service``: systemd boots it. It has what kvmtrace's Debian package depends on, and nothing of
    PyPI.
    """

    name: str
    suite: str
    packages: tuple[str, ...]
    service: bool = False


@dataclass(frozen=True)
class Row:
    """A kernel of kernels.toml and the root that it runs.

    ``modules``: False for a kernel whose module package the suite no longer has; the machine's root
    is then its initramfs.
    """

    name: str
    arch: Arch
    root: Root
    suite: str
    flavour: str
    version: str
    why: str
    modules: bool = True


@functools.cache
def host_arch() -> str:
    """Debian's name for this host's architecture."""
    return programs.output(["dpkg", "--print-architecture"]).strip()


def _keywords(table: dict[str, Any]) -> dict[str, Any]:
    return {
        key.replace("-", "_"): tuple(value) if isinstance(value, list) else value
        for key, value in table.items()
    }


@functools.cache
def roots() -> dict[str, Root]:
    """All roots of kernels.toml by name."""
    data = tomllib.loads(FILE.read_text())
    return {name: Root(name=name, **_keywords(table)) for name, table in data["roots"].items()}


@functools.cache
def rows() -> dict[str, Row]:
    """All kernels of kernels.toml by name."""
    data = tomllib.loads(FILE.read_text())
    arches = {name: Arch(name=name, **_keywords(table)) for name, table in data["arch"].items()}
    found = {}
    for name, table in data["kernels"].items():
        fields = _keywords(table)
        fields["arch"] = arches[table["arch"]]
        fields["root"] = roots()[table["root"]]
        found[name] = Row(name=name, **fields)
    return found


def row(name: str) -> Row:
    """The kernel called `name`; LabError if there is none."""
    try:
        return rows()[name]
    except KeyError:
        raise LabError(f"no kernel {name!r} in {FILE.name}; there is {', '.join(rows())}") from None
