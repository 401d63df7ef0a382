"""Where tracefs is mounted, what the kernel offers there, and ``format`` files of trace events."""

from __future__ import annotations

import os
import re
from collections.abc import Iterable
from dataclasses import dataclass

from kvmtrace.linux.read import read_text
from kvmtrace.probes import POISON_EVENTS

TRACEFS = ("/sys/kernel/tracing", "/sys/kernel/debug/tracing")


@dataclass(frozen=True, slots=True)
class Tracefs:
    """``readable``: lockdown permits it. ``dynamic_events``, ``fprobes``: what the kernel has."""

    path: str
    readable: bool
    dynamic_events: bool
    fprobes: bool


def tracing(candidates: tuple[str, ...] = TRACEFS) -> Tracefs | None:
    """The tracefs that is mounted, or None."""
    path = tracefs(candidates)
    if path is None:
        return None
    readme = read_text(f"{path}/README")
    return Tracefs(
        path,
        readable=bool(readme),
        dynamic_events=os.access(f"{path}/dynamic_events", os.W_OK)
        or os.access(f"{path}/kprobe_events", os.W_OK),
        fprobes=re.search(r"^[ \t]*f\[:", readme, re.MULTILINE) is not None,
    )


def tracefs(candidates: tuple[str, ...] = TRACEFS) -> str | None:
    """Where tracefs is mounted, or None."""
    for path in candidates:
        if os.path.exists(f"{path}/README"):
            return path
    return None


_SYMBOLIC = re.compile(r"__print_symbolic\(\s*REC->(\w+)\s*,")
_PAIR = re.compile(
    r'\{\s*(-?(?:0[xX][0-9a-fA-F]{1,16}|[0-9]{1,20}))U?L*\s*,\s*"((?:[^"\\]|\\.)*)"\s*\}'
)


def symbolic_tables(event_format: str) -> dict[str, dict[int, str]]:
    """{field: {number: string}} of a trace event's ``format`` text (its ``__print_symbolic``).

    The kernel replaces enums by their numbers there (TRACE_DEFINE_ENUM). Where it left a name in
    place, the pair is left out, and the value prints as a number.
    """
    _, _, print_format = event_format.partition("print fmt:")
    starts = list(_SYMBOLIC.finditer(print_format))
    tables: dict[str, dict[int, str]] = {}
    for index, start in enumerate(starts):
        end = starts[index + 1].start() if index + 1 < len(starts) else len(print_format)
        pairs = _PAIR.findall(print_format, start.end(), end)
        tables[start[1]] = {_number(number): text for number, text in pairs}
    return tables


def _number(text: str) -> int:
    return int(text, 16 if "x" in text.lower() else 10)


def memory_failure_names(root: str | None = None) -> tuple[dict[int, str], dict[int, str]]:
    """Page types and results of memory_failure_event as this kernel prints them.

    ``root``: tracefs. Both are empty without tracefs.
    """
    root = root or tracefs() or TRACEFS[0]
    event = tracepoint(POISON_EVENTS, root)
    tables = symbolic_tables(event_format(event, root)) if event else {}
    return tables.get("type", {}), tables.get("result", {})


def tracepoint(targets: Iterable[str], root: str) -> str | None:
    """The first ``system:event`` of these that the tracefs at ``root`` has."""
    return next((target for target in targets if event_format(target, root)), None)


def event_format(target: str, root: str) -> str:
    """The ``format`` of ``system:event``; "" where it cannot be read."""
    return read_text(f"{root}/events/{target.replace(':', '/')}/format")


def event_id(event_format: str) -> int | None:
    """The number of an event that perf_event_open(2) takes; None if its ``format`` has none."""
    match = _ID.search(event_format)
    return int(match[1]) if match else None


def field_places(event_format: str) -> dict[str, tuple[int, int]]:
    """{field: (offset, size)} in an event's ``format`` text."""
    fields = event_format.partition("print fmt:")[0]
    return {
        declared.rpartition(" ")[2]: (int(offset), int(size))
        for declared, offset, size in _FIELD.findall(fields)
    }


_ID = re.compile(r"^ID: ([0-9]{1,9})$", re.MULTILINE)
_FIELD = re.compile(
    r"^[ \t]*field:([^;\n]*);[ \t]*offset:([0-9]{1,9});[ \t]*size:([0-9]{1,9});", re.MULTILINE
)
