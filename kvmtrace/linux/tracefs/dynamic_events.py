"""Dynamic events (``dynamic_events`` of tracefs): defined for us by the kernel, field by field.

The grammar is Documentation/trace/{fprobetrace,kprobetrace}.rst; what a kernel takes of it is
found out by asking. Its refusals stand in ``error_log``, which belongs to everybody: it is read,
never cleared, and our entries are known by the name of our group in them.
"""

from __future__ import annotations

import contextlib
import os
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from kvmtrace.linux.tracefs.mount import read_text

_ENTRY = re.compile(
    r"^\[ *[\d.]+\] \w+: error: (?P<reason>.*)\n +Command: (?P<command>.*)\n(?P<caret> *)\^",
    re.MULTILINE,
)
_COMMAND_COLUMN = len("  Command: ")
_OFFSET = re.compile(r"\{(\w+)\.([\w.]+)\}")

# A kretprobe needs an instance for every call that is under way, and misses calls without; so does
# an fprobe until it was made of function graphs (6.14). vCPUs sit in KVM_RUN by the hundred. As
# many as kernel/trace/trace_kprobe.c and trace_fprobe.c allow.
_INSTANCES = "4096"

WAYS = {"f": "fprobe event", "p": "kprobe event", "r": "kretprobe event"}

Offset = Callable[[str, str], int | None]
"""(struct, member) → byte offset, or None."""


@dataclass(frozen=True, slots=True)
class Field:
    """``name=form`` in a dynamic event.

    ``needed``: the probe is useless without. ``helper``: its value is known otherwise, too, so
    that a refusal need not be reported.
    """

    name: str
    forms: tuple[str, ...]
    needed: bool = False
    helper: bool = False


@dataclass(frozen=True, slots=True)
class Defined:
    """A dynamic event that exists. ``missing``: fields that were refused, and why."""

    name: str
    target: str
    way: str
    fields: tuple[str, ...]
    missing: tuple[tuple[str, str], ...]


@dataclass(frozen=True, slots=True)
class DefineError:
    """``why``: the kernel's own words; ``way_unknown``: it does not know this kind of probe."""

    why: str
    way_unknown: bool = False


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

        Ways are tried in order: fprobe (exact at return), then kprobe or kretprobe.
        """
        refused = DefineError("no kind of probe")
        for way in ("f", "r" if at == "return" else "p"):
            outcome = self._define(name, target, at, way, fields)
            if isinstance(outcome, Defined):
                return outcome
            if not outcome.way_unknown or way != "f":
                refused = outcome
                # A function that fprobe cannot find, kprobe will not find either; a field that
                # BTF cannot give at one it cannot give at the other.
                if not outcome.way_unknown and way == "f":
                    break
        return refused

    def _define(
        self, name: str, target: str, at: str, way: str, fields: Sequence[Field]
    ) -> Defined | DefineError:
        forms = {field.name: self._forms(field) for field in fields}
        missing: list[tuple[str, str]] = []
        place = f"{target}%return" if way == "f" and at == "return" else target
        instances = _INSTANCES if at == "return" else ""
        while True:
            taken = [field for field in fields if forms[field.name]]
            lacking = next((f for f in fields if f.needed and not forms[f.name]), None)
            if lacking is not None:
                why = dict(missing).get(lacking.name, "no form of it fits this kernel")
                return DefineError(f"{target}: {lacking.name}: {why}")
            head = f"{way}{instances}:{self._group}/{name} {place}"
            arguments = [f"{field.name}={forms[field.name][0]}" for field in taken]
            command = " ".join([head, *arguments])
            try:
                self._write(command)
            except OSError as error:
                reason, column = self._refusal(command)
                refusal = error.strerror
            else:
                names = tuple(field.name for field in taken)
                return Defined(name, target, WAYS[way], names, tuple(missing))
            if reason is None:
                # No word of it: this kernel does not parse this kind of probe at all.
                return DefineError(f"{target}: {refusal}", way_unknown=True)
            if instances and way == "f" and column <= len(way + instances):
                instances = ""  # it needs none, and knows no number of them
                continue
            culprit = _at_column(head, arguments, column)
            if culprit is None:
                lean = [field for field in taken if field.needed]
                if len(lean) == len(taken):
                    return DefineError(f"{target}: {reason}")
                for field in taken:
                    if not field.needed:
                        forms[field.name] = ()
                        _note(missing, field, reason)
                continue
            field = taken[culprit]
            if reason.startswith("No BTF entry") and len(forms[field.name]) == 1:
                return DefineError(f"{target}: {reason}")
            forms[field.name] = forms[field.name][1:]
            if not forms[field.name]:
                _note(missing, field, reason)

    def _forms(self, field: Field) -> tuple[str, ...]:
        return tuple(form for form in map(self._with_offsets, field.forms) if form is not None)

    def _with_offsets(self, form: str) -> str | None:
        for match in _OFFSET.finditer(form):
            offset = self._offset(match[1], match[2])
            if offset is None:
                return None
            form = form.replace(match[0], str(offset))
        return form

    def _write(self, command: str) -> None:
        descriptor = os.open(self._file, os.O_WRONLY | os.O_APPEND | os.O_CLOEXEC)
        try:
            os.write(descriptor, f"{command}\n".encode())
        finally:
            os.close(descriptor)

    def _refusal(self, command: str) -> tuple[str | None, int]:
        """(reason, column in the command) of what ``error_log`` says last about this command."""
        for entry in reversed(list(_ENTRY.finditer(read_text(f"{self._root}/error_log")))):
            if entry["command"] == command:
                return entry["reason"], len(entry["caret"]) - _COMMAND_COLUMN
        return None, 0

    def remove(self, name: str) -> bool:
        """Remove one event; False where someone still uses it."""
        with contextlib.suppress(FileNotFoundError):
            try:
                self._write(f"-:{self._group}/{name}")
            except FileNotFoundError:
                return True
            except OSError:
                return False
        return True

    def names(self) -> list[str]:
        """The events of this group that exist."""
        pattern = rf"^\w+:{re.escape(self._group)}/(\S+) "
        return re.findall(pattern, read_text(self._file), re.MULTILINE)


def groups(root: str) -> set[str]:
    """All groups that have dynamic events."""
    return set(re.findall(r"^\w+:(\w+)/", read_text(f"{root}/dynamic_events"), re.MULTILINE))


def _note(missing: list[tuple[str, str]], field: Field, reason: str) -> None:
    if not field.helper:
        missing.append((field.name, reason))


def _at_column(head: str, arguments: list[str], column: int) -> int | None:
    start = len(head) + 1
    for index, argument in enumerate(arguments):
        if start <= column <= start + len(argument):
            return index
        start += len(argument) + 1
    return None
