"""Lines that come from outside, checked: an event, or the state of the probes.

Every field has its declared type and is in range, and strings are cleaned like names from /proc.
"""

from __future__ import annotations

import dataclasses
import functools
import types
import typing
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, TypeVar

from kvmtrace.events import KINDS, LAST_NS, Event, HwError, Lost, Owner, from_record
from kvmtrace.probes import Probe
from kvmtrace.sanitize import clean

if TYPE_CHECKING:
    from _typeshed import DataclassInstance

# What decoding a line that is no such thing may raise.
WRONG = (KeyError, TypeError, ValueError, AttributeError, RecursionError)

_UNKNOWN = {"where": "unknown_events", "count": 1}

_ANY = range(1 << 64)
UNWRITABLE = "unwritable_events"
"""Where an event is lost that no reader would take."""

# A time has to fit into a calendar, and 2**lsb is a size.
TIMES = range(LAST_NS + 1)
_DIFFERENCES = range(-LAST_NS, LAST_NS + 1)
_RANGES = {
    "ts": TIMES,
    "lsb": range(64),
    "count": range(1, 1 << 64),
    "step_ns": _DIFFERENCES,
    "offset_ns": _DIFFERENCES,
}

UNSTEPPED = "unstepped_ts"
"""In a line after a step of the wall clock: ``ts`` by the clock as it stood before all steps."""


class MalformedLine(ValueError):
    """Says in words what is wrong with a line."""


class Decoder:
    """Lines in, events out.

    ``probes``, ``ts``: of when the last event was recorded (0: there was none).
    """

    def __init__(self) -> None:
        self.probes: tuple[Probe, ...] = ()
        self.ts = 0

    def event(self, record: Mapping[str, Any]) -> Event | None:
        """The event of a line, None if it is of the probes. Raises Malformed.

        What only a newer kvmtrace knows of is counted as lost: the rest can still be read.
        """
        kind = record.get("kind")
        if not isinstance(kind, str):
            raise MalformedLine("not an event")
        if UNSTEPPED in record:
            record = {**record, "ts": record[UNSTEPPED]}
        try:
            if kind == "probes":
                self.probes = tuple(build(Probe, probe) for probe in record["probes"])
                return None
            if kind in KINDS:
                event = checked(from_record(record))
            else:
                event = build(Lost, {"ts": record.get("ts", self.ts), **_UNKNOWN})
        except MalformedLine:
            raise
        except WRONG as error:
            raise MalformedLine(f"not a whole {kind!r}") from error
        self.ts = event.ts
        return event


def version_of(header: Mapping[str, Any]) -> str | None:
    """The kvmtrace that wrote it; None if it does not say."""
    version = header.get("version")
    return clean(version) or None if isinstance(version, str) else None


_T = TypeVar("_T", bound="DataclassInstance")


@functools.cache
def _hints(cls: type[DataclassInstance]) -> dict[str, tuple[Any, range, bool, bool]]:
    """{field: its declared type, its range, whether that may be None, an integer}."""
    hints = typing.get_type_hints(cls)
    found = {}
    for field in dataclasses.fields(cls):
        hint = hints[field.name]
        within = _RANGES.get(field.name, _ANY)
        if field.name == "count" and issubclass(cls, HwError):
            within = _ANY  # drivers pass on what a register says, 0 included
        kinds = typing.get_args(hint) if isinstance(hint, types.UnionType) else (hint,)
        found[field.name] = hint, within, types.NoneType in kinds, int in kinds
    return found


def build(cls: type[_T], record: Mapping[str, Any]) -> _T:
    """A dataclass from the fields that it knows of. Raises ``WRONG``."""
    names = _hints(cls).keys()
    return checked(cls(**{name: value for name, value in record.items() if name in names}))


def checked(value: _T) -> _T:
    """The dataclass with every field of its declared type, in range, and its strings cleaned.

    Raises MalformedLine, or another of ``WRONG``. Writers of lines use it as well: one number that
    no reader takes must not cost all that comes after it.
    """
    changes: dict[str, Any] = {}
    for name, (hint, within, may_be_none, may_be_int) in _hints(type(value)).items():
        item = getattr(value, name)
        # Most fields: a recording may have millions of events.
        if (item is None and may_be_none) or (type(item) is int and may_be_int and item in within):
            continue
        checked_item = _checked_item(name, item, hint, within)
        if checked_item is not item:
            changes[name] = checked_item
    return dataclasses.replace(value, **changes) if changes else value


def _checked_item(name: str, item: Any, hint: Any, within: range = _ANY) -> Any:
    if typing.get_origin(hint) is tuple:
        inner = typing.get_args(hint)
        if inner[1:] == (...,):
            return tuple(_checked_item(name, one, inner[0]) for one in item)
        pairs = zip(item, inner, strict=True)
        return tuple(_checked_item(name, one, its_hint) for one, its_hint in pairs)
    allowed = typing.get_args(hint) if isinstance(hint, types.UnionType) else (hint,)
    # To Python, true is the integer 1.
    if not isinstance(item, allowed) or (isinstance(item, bool) and bool not in allowed):
        raise MalformedLine(f"{name} is of the wrong type")
    if isinstance(item, str):
        cleaned = clean(item)
        return None if not cleaned and type(None) in allowed else cleaned
    if isinstance(item, Owner):
        return checked(item)
    if isinstance(item, int) and item not in within:
        raise MalformedLine(f"{name} is out of range")
    return item
