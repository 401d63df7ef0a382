"""kernels.toml as objects."""

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
    """How QEMU is to look for one architecture."""

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
        """Whether this host cannot run its programs."""
        return self.name != host_arch()


@dataclass(frozen=True)
class Root:
    """A root file system: a suite and what is installed."""

    name: str
    suite: str
    packages: tuple[str, ...]


@dataclass(frozen=True)
class Row:
    """One line of the matrix: a kernel and the root it runs.

    ``modules``: its module package is needed. Without, it is taken where the suite has none, and
    the machine has its root in its initramfs.
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
    """Debian's name of this host's architecture."""
    return programs.output(["dpkg", "--print-architecture"]).strip()


def _keywords(table: dict[str, Any]) -> dict[str, Any]:
    return {
        key.replace("-", "_"): tuple(value) if isinstance(value, list) else value
        for key, value in table.items()
    }


@functools.cache
def rows() -> dict[str, Row]:
    """Every kernel of kernels.toml by name."""
    data = tomllib.loads(FILE.read_text())
    arches = {name: Arch(name=name, **_keywords(table)) for name, table in data["arch"].items()}
    roots = {name: Root(name=name, **_keywords(table)) for name, table in data["roots"].items()}
    found = {}
    for name, table in data["kernels"].items():
        fields = _keywords(table)
        fields["arch"] = arches[table["arch"]]
        fields["root"] = roots[table["root"]]
        found[name] = Row(name=name, **fields)
    return found


def row(name: str) -> Row:
    """The kernel called `name`."""
    try:
        return rows()[name]
    except KeyError:
        raise LabError(f"no kernel {name!r} in {FILE.name}; there is {', '.join(rows())}") from None
