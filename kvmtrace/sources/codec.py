"""Events as lines of a recording, and lines from outside, checked: an event, or the probes' state.

Every field must have its declared type and be in range. Strings are cleaned like names from /proc.
"""

from __future__ import annotations

import dataclasses
import functools
import types
import typing
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, TypeVar

from kvmtrace.events import KINDS, LAST_NS, Event, HwError, Lost, Owner
from kvmtrace.probes import Probe
from kvmtrace.sanitize import clean

if TYPE_CHECKING:
    from _typeshed import DataclassInstance

# What decoding a malformed line may raise.
DECODE_ERRORS = (KeyError, TypeError, ValueError, AttributeError, RecursionError)

_UNKNOWN = {"where": "unknown_events", "count": 1}

_ANY = range(1 << 64)
UNWRITABLE = "unwritable_events"
"""Place of the Lost for an event that no reader would accept."""

# A time must fit into a calendar, and 2**lsb is a size.
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
"""A line's ``ts`` without the steps of the wall clock; in lines after a step."""


class MalformedLine(ValueError):
    """A line that cannot be decoded; the text says why."""


class Decoder:
    """Decodes the lines of one recording.

    ``probes``: their state after the last line. ``ts``: of the last event; 0 before the first.
    """

    def __init__(self) -> None:
        self.probes: tuple[Probe, ...] = ()
        self.ts = 0

    def event(self, record: Mapping[str, Any]) -> Event | None:
        """Return the event of a line; None for a line of the probes. Raises MalformedLine.

        An event kind of a newer kvmtrace becomes a Lost: the other lines can still be read.
        """
        kind = record.get("kind")
        if not isinstance(kind, str):
            raise MalformedLine("not an event")
        if UNSTEPPED in record:
            record = {**record, "ts": record[UNSTEPPED]}
        try:
            if kind == "probes":
                self.probes = tuple(dataclass_from(Probe, probe) for probe in record["probes"])
                return None
            if kind in KINDS:
                event = checked(from_record(record))
            else:
                event = dataclass_from(Lost, {"ts": record.get("ts", self.ts), **_UNKNOWN})
        except MalformedLine:
            raise
        except DECODE_ERRORS as error:
            raise MalformedLine(f"not a whole {kind!r}") from error
        self.ts = event.ts
        return event


def to_record(event: Event) -> dict[str, Any]:
    """Return a JSON-ready dict, without fields that are None. The inverse of ``from_record``."""
    record: dict[str, Any] = {"kind": event.kind}
    for name in _fields(event.kind)[0]:
        value = getattr(event, name)
        if value is None:
            continue
        if isinstance(value, Owner):
            value = _owner_record(value)
        elif isinstance(value, tuple):
            value = [_owner_record(x) if isinstance(x, Owner) else list(x) for x in value]
        record[name] = value
    return record


def from_record(record: Mapping[str, Any]) -> Event:
    """Rebuild an event. Unknown fields are ignored: a newer recording must still replay.

    Raises KeyError for an unknown kind, TypeError if a required field is missing.
    """
    cls = KINDS[record["kind"]]
    names, optional = _fields(cls.kind)
    # to_record leaves out None, also for fields without a default.
    values: dict[str, Any] = dict.fromkeys(optional)
    values |= {name: record[name] for name in names if name in record}
    if "owner" in values:
        values["owner"] = _owner_from(values["owner"])
    if "owners" in values:
        values["owners"] = tuple(_owner_from(owner) for owner in values["owners"])
    if "failures" in values:
        values["failures"] = tuple((name, count) for name, count in values["failures"])
    return cls(**values)


@functools.cache
def _fields(kind: str) -> tuple[tuple[str, ...], tuple[str, ...]]:
    """Return the names of all fields, and of those that may be None."""
    fields = dataclasses.fields(KINDS[kind])
    optional = (field.name for field in fields if str(field.type).endswith("| None"))
    return tuple(field.name for field in fields), tuple(optional)


def _owner_record(owner: Owner) -> dict[str, int]:
    return {k: v for k, v in dataclasses.asdict(owner).items() if v is not None}


def _owner_from(record: Mapping[str, Any]) -> Owner:
    return Owner(record["vm"], record.get("gfn"), record.get("hva"))


def version_of(header: Mapping[str, Any]) -> str | None:
    """Return the version of kvmtrace that wrote a recording; None if the header has none."""
    version = header.get("version")
    return clean(version) or None if isinstance(version, str) else None


_T = TypeVar("_T", bound="DataclassInstance")


@functools.cache
def _hints(cls: type[DataclassInstance]) -> dict[str, tuple[Any, range, bool, bool]]:
    """Return {field: (declared type, range, whether it may be None, whether an integer)}."""
    hints = typing.get_type_hints(cls)
    found = {}
    for field in dataclasses.fields(cls):
        hint = hints[field.name]
        within = _RANGES.get(field.name, _ANY)
        if field.name == "count" and issubclass(cls, HwError):
            within = _ANY  # drivers pass on a register's value, 0 included
        kinds = typing.get_args(hint) if isinstance(hint, types.UnionType) else (hint,)
        found[field.name] = hint, within, types.NoneType in kinds, int in kinds
    return found


def dataclass_from(cls: type[_T], record: Mapping[str, Any]) -> _T:
    """Make a dataclass from the fields that it has; ignore others. Raises ``DECODE_ERRORS``."""
    names = _hints(cls).keys()
    return checked(cls(**{name: value for name, value in record.items() if name in names}))


def checked(value: _T) -> _T:
    """Check that every field has its declared type and is in range, and clean the strings.

    Raises MalformedLine, or another of ``DECODE_ERRORS``. Writers check lines as well: one number
    that no reader accepts must not cost all later lines.
    """
    changes: dict[str, Any] = {}
    for name, (hint, within, may_be_none, may_be_int) in _hints(type(value)).items():
        item = getattr(value, name)
        # Most fields end here: a recording may have millions of events.
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
