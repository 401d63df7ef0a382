"""Checks of dataclasses: every field has its declared type and is in range, strings are clean.

What is checked follows from a class's declarations. For each class two functions are made once, as
``dataclasses`` makes its own: a recording may have millions of events, and to go through the
declarations for each would cost four times as much.
"""

from __future__ import annotations

import dataclasses
import functools
import types
import typing
from collections.abc import Callable, Iterator, Mapping
from typing import TYPE_CHECKING, Any, TypeVar

from kvmtrace.events import LAST_NS, HwError
from kvmtrace.quick import maker
from kvmtrace.sanitize import clean, is_clean

if TYPE_CHECKING:
    from _typeshed import DataclassInstance

_T = TypeVar("_T", bound="DataclassInstance")

# A time must fit into a calendar, and 2**lsb is a size.
TIMES = range(LAST_NS + 1)
_DIFFERENCES = range(-LAST_NS, LAST_NS + 1)
_ANY = range(1 << 64)
_RANGES = {
    "ts": TIMES,
    "lsb": range(64),
    "count": range(1, 1 << 64),
    "step_ns": _DIFFERENCES,
    "offset_ns": _DIFFERENCES,
}


class MalformedLine(ValueError):
    """A line that cannot be decoded; the text is the reason."""


class CheckedField(typing.NamedTuple):
    """A field as it is declared.

    ``default``: ``_MISSING`` if it has none. ``record_class``: the dataclass that its value is, if
    it is one.
    """

    name: str
    hint: Any
    kinds: tuple[Any, ...]
    within: range
    default: Any
    record_class: type[DataclassInstance] | None

    @property
    def is_optional(self) -> bool:
        return types.NoneType in self.kinds


_MISSING = object()


@functools.cache
def fields(cls: type[DataclassInstance]) -> tuple[CheckedField, ...]:
    """Return the fields of a class, in their order."""
    hints = typing.get_type_hints(cls)
    return tuple(_fields(cls, hints))


def _fields(cls: type[DataclassInstance], hints: Mapping[str, Any]) -> Iterator[CheckedField]:
    for field in dataclasses.fields(cls):
        hint = hints[field.name]
        within = _RANGES.get(field.name, _ANY)
        if field.name == "count" and issubclass(cls, HwError):
            within = _ANY  # drivers pass on a register's value, 0 included
        default = _MISSING if field.default is dataclasses.MISSING else field.default
        kinds = _kinds(hint)
        records = (kind for kind in kinds if dataclasses.is_dataclass(kind))
        record = typing.cast("type[DataclassInstance] | None", next(records, None))
        yield CheckedField(field.name, hint, kinds, within, default, record)


def _kinds(hint: Any) -> tuple[Any, ...]:
    return typing.get_args(hint) if isinstance(hint, types.UnionType) else (hint,)


def checker(cls: type[_T]) -> Callable[[_T], _T]:
    """Return the function that checks an object of this class and returns it with clean strings.

    It raises MalformedLine, or another of ``codec.DECODE_ERRORS``.
    """
    known = _CHECKERS.get(cls)
    if known is None:
        known = _CHECKERS[cls] = _checker(cls)
    return known


def reader(cls: type[_T]) -> Callable[[Mapping[str, Any]], _T]:
    """Return the function that makes a checked object of this class from a JSON object.

    A field that may be None is None if it is absent. Other names in the object are ignored. It
    raises MalformedLine, or another of ``codec.DECODE_ERRORS``.
    """
    known = _READERS.get(cls)
    if known is None:
        known = _READERS[cls] = _reader(cls)
    return known


_CHECKERS: dict[type, Callable[[Any], Any]] = {}
_READERS: dict[type, Callable[[Mapping[str, Any]], Any]] = {}


def _checker(cls: type[DataclassInstance]) -> Callable[[Any], Any]:
    lines = ["def check(value):", " changes = None"]
    names: dict[str, Any] = {"replace": dataclasses.replace}
    for number, field in enumerate(fields(cls)):
        names[f"slow{number}"] = functools.partial(_checked, field)
        lines += [
            f" item = value.{field.name}",
            f" if {_doubt(field)}:",
            f"  checked = slow{number}(item)",
            "  if checked is not item:",
            "   changes = changes or {}",
            f"   changes[{field.name!r}] = checked",
        ]
    lines.append(" return replace(value, **changes) if changes else value")
    return typing.cast("Callable[[Any], Any]", _made("check", lines, names))


def _reader(cls: type[DataclassInstance]) -> Callable[[Mapping[str, Any]], Any]:
    lines = ["def read(record):", " get = record.get"]
    names: dict[str, Any] = {"make": maker(cls)}
    items: list[str] = []
    for number, field in enumerate(fields(cls)):
        names[f"slow{number}"] = functools.partial(_read, field)
        names[f"default{number}"] = None if field.is_optional else field.default
        item = f"item{number}"
        items.append(item)
        lines += [
            f" {item} = get({field.name!r}, default{number})",
            f" if {_doubt(field).replace('item', item)}:",
            f"  {item} = slow{number}({item})",
        ]
    lines.append(f" return make({', '.join(items)})")
    return typing.cast("Callable[[Mapping[str, Any]], Any]", _made("read", lines, names))


def _made(name: str, lines: list[str], names: Mapping[str, Any]) -> Any:
    found: dict[str, Any] = {**names, "seen": _SEEN_CLEAN, "see": _see}
    exec("\n".join(lines), found)
    return found[name]


# Strings that are clean: most are seen again and again.
_SEEN_CLEAN: set[str] = set()
_MAX_SEEN = 4096


def _see(text: str) -> bool:
    """Whether a string is clean; remember it if it is, and a few thousand of them at most."""
    if not is_clean(text):
        return False
    if len(_SEEN_CLEAN) >= _MAX_SEEN:
        _SEEN_CLEAN.clear()
    _SEEN_CLEAN.add(text)
    return True


def _doubt(field: CheckedField) -> str:
    """Return when ``item`` needs more than a glance: an expression."""
    kinds = set(field.kinds) - {types.NoneType}
    if kinds == {int}:
        # To Python, true is the integer 1.
        first, last = field.within[0], field.within[-1]
        within = f"not {first} <= item <= {last}"
        if not first and not last & (last + 1):
            within = f"item >> {last.bit_length()}"  # one operation instead of two
        doubt = f"type(item) is not int or {within}"
    elif kinds == {str}:
        doubt = "type(item) is not str or (item not in seen and not see(item))"
    elif kinds == {bool}:
        doubt = "item is not False and item is not True"
    else:
        doubt = "True"
    return f"item is not None and ({doubt})" if field.is_optional else doubt


def _read(field: CheckedField, item: Any) -> Any:
    """Return the checked value of a field; ``item``: as JSON has it, or a default."""
    if item is _MISSING:
        raise TypeError(f"{field.name} is missing")
    if item is None:
        return _checked(field, item)
    if field.record_class is not None:
        return reader(field.record_class)(item)
    if typing.get_origin(field.hint) is tuple:
        one, *others = typing.get_args(field.hint)
        if others == [...] and dataclasses.is_dataclass(one):
            return tuple(map(reader(typing.cast("type[Any]", one)), item))
        item = tuple(item)
    return _checked(field, item)


def _checked(field: CheckedField, item: Any) -> Any:
    return _checked_item(field.name, item, field.hint, field.within)


def _checked_item(name: str, item: Any, hint: Any, within: range = _ANY) -> Any:
    if typing.get_origin(hint) is tuple:
        inner = typing.get_args(hint)
        if inner[1:] == (...,):
            return _same(item, tuple(_checked_item(name, one, inner[0]) for one in item))
        pairs = zip(item, inner, strict=True)
        return _same(item, tuple(_checked_item(name, one, its_hint) for one, its_hint in pairs))
    allowed = _kinds(hint)
    # To Python, true is the integer 1.
    if not isinstance(item, allowed) or (isinstance(item, bool) and bool not in allowed):
        raise MalformedLine(f"{name} is of the wrong type")
    if isinstance(item, str):
        cleaned = clean(item)
        return None if not cleaned and type(None) in allowed else cleaned
    if dataclasses.is_dataclass(item) and not isinstance(item, type):
        return checker(type(item))(item)
    if isinstance(item, int) and item not in within:
        raise MalformedLine(f"{name} is out of range")
    return item


def _same(item: Any, checked: tuple[Any, ...]) -> Any:
    """Return ``item`` itself if it is this tuple, so that nothing has to be replaced."""
    if type(item) is tuple and all(one is other for one, other in zip(item, checked, strict=True)):
        return item
    return checked
