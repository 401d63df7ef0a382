"""Events as lines of a recording, and lines from outside, checked: an event, or the probes' state.

Every field must have its declared type and be in range. Strings are cleaned like names from /proc.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar, TypeVar, cast

from kvmtrace.events import (
    JOIN_NS,
    KINDS,
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
from kvmtrace.sources.dataclass_checks import MalformedLine, checker, fields, reader

if TYPE_CHECKING:
    from _typeshed import DataclassInstance

# What decoding a malformed line may raise.
DECODE_ERRORS = (KeyError, TypeError, ValueError, AttributeError, RecursionError)

_T = TypeVar("_T", bound="DataclassInstance")

_SIMPLE = (int, str, bool)
_UNKNOWN = {"where": "unknown_events", "count": 1}

UNWRITABLE = "unwritable_events"
"""Place of the Lost for an event that no reader would accept."""

UNSTEPPED = "unstepped_ts"
"""A line's ``ts`` without the steps of the wall clock; in lines after a step."""


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
        cls = _KINDS.get(kind)
        try:
            if cls is not None:
                event = reader(cls)(record)
            elif kind == "probes":
                self.probes = tuple(dataclass_from(Probe, probe) for probe in record["probes"])
                return None
            else:
                event = dataclass_from(Lost, {"ts": record.get("ts", self.ts), **_UNKNOWN})
        except MalformedLine:
            raise
        except DECODE_ERRORS as error:
            raise MalformedLine(f"not a whole {kind!r}") from error
        self.ts = event.ts
        if cls is _GmemPoison:
            return self._keep(cast(_GmemPoison, event))
        if cls is _OldMachineCheck:
            return cast(_OldMachineCheck, event).event()
        if self._pending and isinstance(event, Poison):
            return self._joined(event)
        return event

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
    known = ((field.name, getattr(value, field.name)) for field in fields(cls))
    return {name: _plain(item) for name, item in known if item is not None}


def from_record(record: Mapping[str, Any]) -> Event:
    """Return a line's event, checked. Unknown fields are ignored: a newer recording must replay.

    Raises KeyError for an unknown kind, another of ``DECODE_ERRORS`` for a malformed line.
    """
    return reader(_KINDS[record["kind"]])(record)


def version_of(header: Mapping[str, Any]) -> str | None:
    """Return the version of kvmtrace that wrote a recording; None if the header has none."""
    version = header.get("version")
    return clean(version) or None if isinstance(version, str) else None


def dataclass_from(cls: type[_T], record: Mapping[str, Any]) -> _T:
    """Make a dataclass from the fields that it has; ignore others. Raises ``DECODE_ERRORS``."""
    names = {field.name for field in fields(cls)}
    return checked(cls(**{name: value for name, value in record.items() if name in names}))


def checked(value: _T) -> _T:
    """Check that every field has its declared type and is in range, and clean the strings.

    Raises MalformedLine, or another of ``DECODE_ERRORS``. Writers check lines as well: one number
    that no reader accepts must not cost all later lines.
    """
    return checker(type(value))(value)
