"""What this host offers, as data. Reads only; every path can be put elsewhere (for tests)."""

from __future__ import annotations

import os
import re
from dataclasses import dataclass

TRACEFS = ("/sys/kernel/tracing", "/sys/kernel/debug/tracing")

# include/uapi/linux/capability.h
CAP_SYS_ADMIN = 21
CAP_SYS_RESOURCE = 24
CAP_PERFMON = 38
CAP_BPF = 39


@dataclass(frozen=True, slots=True)
class Privilege:
    """What this process may do. ``capabilities``: CapEff as a bit set."""

    euid: int
    capabilities: int

    def has(self, capability: int) -> bool:
        """Whether a capability (CAP_*) is effective; CAP_SYS_ADMIN implies the two newer ones."""
        if self.capabilities >> capability & 1:
            return True
        return capability in (CAP_BPF, CAP_PERFMON) and self.has(CAP_SYS_ADMIN)

    @property
    def may_trace(self) -> bool:
        """Whether it is worth trying: kernels' own policies may refuse later."""
        return self.has(CAP_SYS_ADMIN) or (self.has(CAP_BPF) and self.has(CAP_PERFMON))


def privilege(status: str = "/proc/self/status") -> Privilege:
    """This process's effective user and capabilities."""
    match = re.search(r"^CapEff:\s*([0-9a-f]+)", _read(status), re.MULTILINE)
    return Privilege(os.geteuid(), int(match[1], 16) if match else 0)


def tracefs(candidates: tuple[str, ...] = TRACEFS) -> str | None:
    """Where tracefs is mounted, or None."""
    for path in candidates:
        if os.path.exists(f"{path}/README"):
            return path
    return None


_SYMBOLIC = re.compile(r"__print_symbolic\(\s*REC->(\w+)\s*,")
_PAIR = re.compile(r'\{\s*(-?(?:0[xX][0-9a-fA-F]+|\d+))U?L*\s*,\s*"((?:[^"\\]|\\.)*)"\s*\}')


def symbolic_tables(event_format: str) -> dict[str, dict[int, str]]:
    """{field: {number: string}} of a trace event's ``format`` text (its ``__print_symbolic``).

    The kernel puts its enums' numbers there (TRACE_DEFINE_ENUM); a name that it left in place
    is left out here, and prints as a number.
    """
    _, _, print_format = event_format.partition("print fmt:")
    starts = list(_SYMBOLIC.finditer(print_format))
    tables: dict[str, dict[int, str]] = {}
    for index, start in enumerate(starts):
        end = starts[index + 1].start() if index + 1 < len(starts) else len(print_format)
        pairs = _PAIR.findall(print_format, start.end(), end)
        tables[start[1]] = {int(number, 0): text for number, text in pairs}
    return tables


def memory_failure_names(root: str | None = None) -> tuple[dict[int, str], dict[int, str]]:
    """Page types and results of ras:memory_failure_event as this very kernel prints them.

    ``root``: tracefs. Both empty where tracefs is not there.
    """
    root = root or tracefs() or TRACEFS[0]
    tables = symbolic_tables(_read(f"{root}/events/ras/memory_failure_event/format"))
    return tables.get("type", {}), tables.get("result", {})


def _read(path: str) -> str:
    try:
        with open(path, encoding="utf-8", errors="replace") as file:
            return file.read()
    except OSError:
        return ""
