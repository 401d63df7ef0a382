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
    # Nine tenths of a line need not be looked at: three times as fast as with the address in it.
    name_to_end = re.compile(rb" (" + wanted + rb")(?:\t\[(\w+)\])?$", re.MULTILINE)
    address_and_kind = re.compile(rb"([0-9a-f]+) " + kinds)
    found: dict[str, Symbol] = {}
    with open(path, "rb") as file:
        text = file.read()
    for match in name_to_end.finditer(text):
        begun = text.rfind(b"\n", 0, match.start()) + 1
        start = address_and_kind.fullmatch(text, begun, match.start())
        if start:
            symbol = Symbol(match[2].decode() if match[2] else None, int(start[1], 16))
            found.setdefault(match[1].decode(), symbol)
    return found
