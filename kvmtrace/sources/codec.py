"""Events as lines of a recording, and lines from outside, checked: an event, or the probes' state.

Every field must have its declared type and be in range. Strings are cleaned like names from /proc.
"""

from __future__ import annotations

import dataclasses
import functools
import types
import typing
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar, TypeVar

from kvmtrace.events import (
    JOIN_NS,
    KINDS,
    LAST_NS,
    Event,
    GmemPage,
    HwError,
    Lost,
    MachineCheck,
    Owner,
    Poison,
)
from kvmtrace.probes import Probe
from kvmtrace.sanitize import clean
from kvmtrace.sources.convert import machine_check

if TYPE_CHECKING:
    from _typeshed import DataclassInstance

# What decoding a malformed line may raise.
DECODE_ERRORS = (KeyError, TypeError, ValueError, AttributeError, RecursionError)

_T = TypeVar("_T", bound="DataclassInstance")

_SIMPLE = (int, str, bool)
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


@dataclass(frozen=True, slots=True)
class _GmemPoison(Event):
    """``Poison.gmem`` as older versions recorded it, in a line before the poison's."""

    kind: ClassVar[str] = "gmem_poison"
    tid: int
    inode: int | None
    index: int
    owners: tuple[Owner, ...] = ()
    complete: bool = True


@dataclass(frozen=True, slots=True)
class _OldMachineCheck(Event):
    """An ``HwError`` with ``check`` as older versions recorded it."""

    kind: ClassVar[str] = "mce"
    addr: int | None
    pfn: int | None
    bank: int
    cpu: int
    socket: int
    status: int
    misc: int | None = None
    count: int = 1
    vendor: str | None = None
    ipid: int | None = None
    fru: str | None = None

    def event(self) -> HwError:
        registers = {
            field.name: getattr(self, field.name) for field in dataclasses.fields(MachineCheck)
        }
        return machine_check(self.ts, MachineCheck(**registers), self.addr, self.pfn, self.count)


_KINDS: Mapping[str, type[Event]] = {
    **KINDS,
    **{cls.kind: cls for cls in (_GmemPoison, _OldMachineCheck)},
}
_MAX_PENDING = 1024  # threads with a _GmemPoison whose poison has not come


class Decoder:
    """Decodes the lines of one recording.

    ``probes``: their state after the last line. ``ts``: of the last event; 0 before the first.
    """

    def __init__(self) -> None:
        self.probes: tuple[Probe, ...] = ()
        self.ts = 0
        self._pending: dict[int, _GmemPoison] = {}  # by thread

    def event(self, record: Mapping[str, Any]) -> Event | None:
        """Return the event of a line; None for a line without one. Raises MalformedLine.

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
            if kind in _KINDS:
                event = checked(from_record(record))
            else:
                event = dataclass_from(Lost, {"ts": record.get("ts", self.ts), **_UNKNOWN})
        except MalformedLine:
            raise
        except DECODE_ERRORS as error:
            raise MalformedLine(f"not a whole {kind!r}") from error
        self.ts = event.ts
        if isinstance(event, _GmemPoison):
            return self._keep(event)
        if isinstance(event, _OldMachineCheck):
            return event.event()
        return self._joined(event) if isinstance(event, Poison) else event

    def _keep(self, event: _GmemPoison) -> Lost | None:
        """Keep a page until its poison; the Lost of another whose poison might still have come."""
        self._pending.pop(event.tid, None)
        self._pending[event.tid] = event
        if len(self._pending) > _MAX_PENDING:
            oldest = self._pending.pop(next(iter(self._pending)))
            if 0 <= event.ts - oldest.ts <= JOIN_NS:
                return Lost(event.ts, "halves", 1)
        return None

    def _joined(self, poison: Poison) -> Poison:
        before = self._pending.get(poison.tid) if poison.tid is not None else None
        if before is None or before.ts > poison.ts:  # of the thread's next poison
            return poison
        del self._pending[before.tid]
        if poison.ts - before.ts > JOIN_NS:
            return poison
        page = GmemPage(before.inode, before.index, before.owners, before.complete)
        return dataclasses.replace(poison, gmem=page)


def to_record(event: Event) -> dict[str, Any]:
    """Return a JSON-ready dict, without fields that are None. The inverse of ``from_record``."""
    return {"kind": event.kind, **_plain(event)}


def _plain(value: Any) -> Any:
    """A field's value in terms of JSON."""
    if type(value) in _SIMPLE:
        return value
    if isinstance(value, tuple):
        return [_plain(one) for one in value]
    cls: type[DataclassInstance] = type(value)
    known = ((name, getattr(value, name)) for name in _fields(cls))
    return {name: _plain(item) for name, item in known if item is not None}


def from_record(record: Mapping[str, Any]) -> Event:
    """Rebuild an event. Unknown fields are ignored: a newer recording must still replay.

    Raises KeyError for an unknown kind, TypeError if a required field is missing.
    """
    return _from_plain(_KINDS[record["kind"]], record)


def _from_plain(cls: type[_T], record: Mapping[str, Any]) -> _T:
    values: dict[str, Any] = {}
    for name, (is_optional, nested) in _fields(cls).items():
        if name in record:
            item = record[name]
            values[name] = item if nested is None or item is None else nested(item)
        elif is_optional:
            values[name] = None  # left out by _plain, also without a default
    return cls(**values)


@functools.cache
def _fields(
    cls: type[DataclassInstance],
) -> dict[str, tuple[bool, Callable[[Any], Any] | None]]:
    """Return {field: (whether it may be None, what makes its value of JSON's, if anything)}."""
    return {
        name: (may_be_none, _maker(hint)) for name, (hint, _, may_be_none, _) in _hints(cls).items()
    }


def _maker(hint: Any) -> Callable[[Any], Any] | None:
    if typing.get_origin(hint) is tuple:
        one = _maker(typing.get_args(hint)[0])
        return tuple if one is None else lambda items: tuple(map(one, items))
    kinds = typing.get_args(hint) if isinstance(hint, types.UnionType) else (hint,)
    for kind in kinds:
        if dataclasses.is_dataclass(kind):
            return functools.partial(_from_plain, typing.cast("type[DataclassInstance]", kind))
    return None


def version_of(header: Mapping[str, Any]) -> str | None:
    """Return the version of kvmtrace that wrote a recording; None if the header has none."""
    version = header.get("version")
    return clean(version) or None if isinstance(version, str) else None


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
    if dataclasses.is_dataclass(item) and not isinstance(item, type):
        return checked(item)
    if isinstance(item, int) and item not in within:
        raise MalformedLine(f"{name} is out of range")
    return item
