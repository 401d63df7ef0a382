"""Dynamic events: define probes by writing to tracefs' ``dynamic_events``, field by field.

The grammar is in Documentation/trace/{fprobetrace,kprobetrace}.rst. Which part of it a kernel takes
is found by trying. The kernel writes its reasons to ``error_log``. That file belongs to all users
of tracefs: it is read and never cleared, and our entries are found by the whole command.
"""

from __future__ import annotations

import contextlib
import os
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from kvmtrace.linux.read import read_text

_ENTRY = re.compile(
    r"^\[ *[\d.]+\] \w+: error: (?P<reason>.*)\n +Command: (?P<command>.*)\n(?P<caret> *)\^",
    re.MULTILINE,
)
_COMMAND_COLUMN = len("  Command: ")
_OFFSET = re.compile(r"\{(\w+)\.([\w.]+)\}")

# A kretprobe needs an instance for every call that is under way, and misses calls without; so does
# an fprobe before 6.14. Threads may sleep in a function by the hundred, so this is the most that
# kernel/trace/trace_kprobe.c and trace_fprobe.c allow.
_INSTANCES = "4096"

PROBE_TYPES = {
    "f": "fprobe event",
    "p": "kprobe event",
    "r": "kretprobe event",
    "e": "event probe",
}

Offset = Callable[[str, str], int | None]
"""(struct, member) → byte offset, or None."""


@dataclass(frozen=True, slots=True)
class Field:
    """A field of a dynamic event, and the arguments that may yield it, best first.

    ``needed``: the probe is useless without it. ``helper``: its value can be found in another way,
    too, so a refusal need not be reported.
    """

    name: str
    alternatives: tuple[str, ...]
    needed: bool = False
    helper: bool = False


@dataclass(frozen=True, slots=True)
class Defined:
    """A dynamic event that exists. ``missing``: (field that was refused, reason)."""

    name: str
    target: str
    probe_type: str
    fields: tuple[str, ...]
    missing: tuple[tuple[str, str], ...]


@dataclass(frozen=True, slots=True)
class DefineError:
    """``why``: the kernel's own words. ``type_unknown``: it has no probes of this type."""

    why: str
    type_unknown: bool = False


class DynamicEvents:
    """The events of one group in one tracefs."""

    def __init__(self, root: str, group: str, offset: Offset = lambda _struct, _member: None):
        self._root = root
        self._group = group
        self._offset = offset
        self._file = f"{root}/dynamic_events"

    def define(
        self, name: str, target: str, at: str, fields: Sequence[Field]
    ) -> Defined | DefineError:
        """Define ``name`` on a function, with all of ``fields`` that can be had.

        ``at``: "entry" or "return". Types are tried in order: fprobe (exact at return), then kprobe
        or kretprobe.
        """
        refused = DefineError("no kind of probe")
        for probe_type in ("f", "r" if at == "return" else "p"):
            outcome = self._define(name, target, at, probe_type, fields)
            if isinstance(outcome, Defined):
                return outcome
            if not outcome.type_unknown or probe_type != "f":
                refused = outcome
                # A kprobe would fail for the same reason: it finds the same functions, and has
                # the same fields by BTF.
                if not outcome.type_unknown and probe_type == "f":
                    break
        return refused

    def define_from(
        self, name: str, event: str, condition: str, fields: Sequence[Field]
    ) -> Defined | DefineError:
        """Define ``name`` on another of these events, for its hits that meet ``condition``.

        ``fields``: of that event (``$field``), and what they point to (Linux 6.2).
        """
        return self._define(name, f"{self._group}.{event}", "entry", "e", fields, f"if {condition}")

    def _define(
        self,
        name: str,
        target: str,
        at: str,
        probe_type: str,
        fields: Sequence[Field],
        *tail: str,
    ) -> Defined | DefineError:
        alternatives = {field.name: self._alternatives(field) for field in fields}
        missing: list[tuple[str, str]] = []
        place = f"{target}%return" if probe_type == "f" and at == "return" else target
        instances = _INSTANCES if at == "return" else ""
        while True:
            taken = [field for field in fields if alternatives[field.name]]
            lacking = next((f for f in fields if f.needed and not alternatives[f.name]), None)
            if lacking is not None:
                why = dict(missing).get(lacking.name, "none of its alternatives fits this kernel")
                return DefineError(f"{target}: {lacking.name}: {why}")
            head = f"{probe_type}{instances}:{self._group}/{name} {place}"
            arguments = [f"{field.name}={alternatives[field.name][0]}" for field in taken]
            command = " ".join([head, *arguments, *tail])
            try:
                self._write(command)
            except OSError as error:
                reason, column = self._refusal(command)
                refusal = error.strerror
            else:
                names = tuple(field.name for field in taken)
                return Defined(name, target, PROBE_TYPES[probe_type], names, tuple(missing))
            if reason is None:
                # Nothing in error_log: this kernel does not parse this type of probe at all.
                return DefineError(f"{target}: {refusal}", type_unknown=True)
            if instances and probe_type == "f" and column <= len(probe_type + instances):
                instances = ""  # this kernel's fprobes need none, and take no number
                continue
            culprit = _at_column(head, arguments, column)
            if culprit is None:
                required_only = [field for field in taken if field.needed]
                if len(required_only) == len(taken):
                    return DefineError(f"{target}: {reason}")
                for field in taken:
                    if not field.needed:
                        alternatives[field.name] = ()
                        _record_missing(missing, field, reason)
                continue
            field = taken[culprit]
            if reason.startswith("No BTF entry") and len(alternatives[field.name]) == 1:
                return DefineError(f"{target}: {reason}")
            alternatives[field.name] = alternatives[field.name][1:]
            if not alternatives[field.name]:
                _record_missing(missing, field, reason)

    def _alternatives(self, field: Field) -> tuple[str, ...]:
        found = map(self._with_offsets, field.alternatives)
        return tuple(argument for argument in found if argument is not None)

    def _with_offsets(self, argument: str) -> str | None:
        for match in _OFFSET.finditer(argument):
            offset = self._offset(match[1], match[2])
            if offset is None:
                return None
            argument = argument.replace(match[0], str(offset))
        return argument

    def _write(self, command: str) -> None:
        descriptor = os.open(self._file, os.O_WRONLY | os.O_APPEND | os.O_CLOEXEC)
        try:
            os.write(descriptor, f"{command}\n".encode())
        finally:
            os.close(descriptor)

    def _refusal(self, command: str) -> tuple[str | None, int]:
        """(reason, column in the command) from the last entry of this command in ``error_log``."""
        for entry in reversed(list(_ENTRY.finditer(read_text(f"{self._root}/error_log")))):
            if entry["command"] == command:
                return entry["reason"], len(entry["caret"]) - _COMMAND_COLUMN
        return None, 0

    def remove(self, name: str) -> bool:
        """Remove one event; return False if it is still in use."""
        with contextlib.suppress(FileNotFoundError):
            try:
                self._write(f"-:{self._group}/{name}")
            except FileNotFoundError:
                return True
            except OSError:
                return False
        return True

    def names(self) -> list[str]:
        """The names of this group's events that exist."""
        pattern = rf"^\w+:{re.escape(self._group)}/(\S+) "
        return re.findall(pattern, read_text(self._file), re.MULTILINE)


def groups(root: str) -> set[str]:
    """All groups that have dynamic events in tracefs ``root``."""
    return set(re.findall(r"^\w+:(\w+)/", read_text(f"{root}/dynamic_events"), re.MULTILINE))


def _record_missing(missing: list[tuple[str, str]], field: Field, reason: str) -> None:
    if not field.helper:
        missing.append((field.name, reason))


def _at_column(head: str, arguments: list[str], column: int) -> int | None:
    start = len(head) + 1
    for index, argument in enumerate(arguments):
        if start <= column <= start + len(argument):
            return index
        start += len(argument) + 1
    return None
