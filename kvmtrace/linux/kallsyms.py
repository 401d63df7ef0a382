"""/proc/kallsyms: which functions and variables this kernel and its modules have, and where."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass

from kvmtrace.probes import specs

PATH = "/proc/kallsyms"


@dataclass(frozen=True, slots=True)
class Symbol:
    """``module``: None if built in. ``address``: 0 where addresses are not shown."""

    module: str | None
    address: int


@dataclass(frozen=True, slots=True)
class Symbols:
    """Functions that probes may attach to: {name: module, "" for vmlinux}.

    ``hidden``: the addresses were zeros, as they are for those who may not see them.
    """

    modules: Mapping[str, str]
    hidden: bool


def read_symbols(names: Iterable[str], path: str = PATH) -> dict[str, Symbol]:
    """The first symbol of each of ``names`` that this kernel has. Raises OSError."""
    return _read(names, rb"\w", path)


def symbols(names: Iterable[str], path: str = PATH) -> Symbols | None:
    """Which functions of these ``names`` the kernel has; None where there is no kallsyms."""
    try:
        found = _read(names, rb"[tTwW]", path)
    except OSError:
        return None
    return Symbols(
        {name: symbol.module or "" for name, symbol in found.items()},
        hidden=bool(found) and not any(symbol.address for symbol in found.values()),
    )


def functions(machine: str | None = None) -> tuple[str, ...]:
    """Every function that some probe may attach to."""
    return tuple(
        target for spec in specs(machine) if not spec.is_tracepoint for target in spec.targets
    )


def _read(names: Iterable[str], kinds: bytes, path: str) -> dict[str, Symbol]:
    wanted = b"|".join(re.escape(name.encode()) for name in names)
    line = re.compile(
        rb"^([0-9a-f]+) " + kinds + rb" (" + wanted + rb")(?:\t\[(\w+)\])?$", re.MULTILINE
    )
    found: dict[str, Symbol] = {}
    with open(path, "rb") as file:
        for address, name, module in line.findall(file.read()):
            found.setdefault(name.decode(), Symbol(module.decode() or None, int(address, 16)))
    return found
