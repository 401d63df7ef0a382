"""Any event survives a recording, or is lost alone: writers check the same as readers."""

from __future__ import annotations

import dataclasses
import io
import tempfile
import types
import typing
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from kvmtrace.events import KINDS, Event, Host, Lost, Owner
from kvmtrace.sources.codec import (
    UNWRITABLE,
    Decoder,
    checked,
    from_record,
    to_record,
)
from kvmtrace.sources.dataclass_checks import MalformedLine
from kvmtrace.sources.recording import RecordingSource, Writer

HOST = Host("sick-host", "6.18.15", "bpf")
BEFORE, AFTER = Lost(1, "before", 1), Lost(2, "after", 1)

WORDS = st.sampled_from(["", "DIMM_A1", "\x1b[2J", "a\u202eb", "x" * 300]) | st.text(max_size=9)
EDGES = [0, 1, 63, 64, (1 << 63) - 1, 1 << 63, (1 << 64) - 1, 1 << 64, 1 << 200, -1]
SANE = st.integers(1, 63)
ANY = st.sampled_from(EDGES) | st.integers()


def values(hint: Any, numbers: st.SearchStrategy[int]) -> st.SearchStrategy[Any]:
    """Values of a field's declared type."""
    if isinstance(hint, types.UnionType):
        return st.one_of([values(one, numbers) for one in typing.get_args(hint)])
    if typing.get_origin(hint) is tuple:
        inner = typing.get_args(hint)
        if inner[1:] == (...,):
            return st.lists(values(inner[0], numbers), max_size=3).map(tuple)
        return st.tuples(*(values(one, numbers) for one in inner))
    simple: dict[Any, st.SearchStrategy[Any]] = {
        int: numbers,
        bool: st.booleans(),
        str: WORDS,
        types.NoneType: st.none(),
    }
    return simple[hint] if hint in simple else whole(hint, numbers)


def whole(cls: Any, numbers: st.SearchStrategy[int]) -> st.SearchStrategy[Any]:
    """Events (and owners) of a class."""
    hints = typing.get_type_hints(cls)
    fields = {field.name: hints[field.name] for field in dataclasses.fields(cls)}
    return st.builds(cls, **{name: values(hint, numbers) for name, hint in fields.items()})


def replayed(*events: Event) -> list[Event]:
    file = io.StringIO()
    Writer(file, HOST).write(events, ())
    with tempfile.TemporaryDirectory() as directory:
        path = Path(directory) / "r"
        path.write_text(file.getvalue())
        source = RecordingSource(str(path))
        read: list[Event] = []
        while not source.done:
            read += source.poll(0)
        source.close()
    assert source.damage is None
    return read


@pytest.mark.parametrize("kind", KINDS)
@given(data=st.data())
def test_what_is_in_range_comes_out_as_it_went_in(kind: str, data: st.DataObject) -> None:
    event = data.draw(whole(KINDS[kind], SANE))
    clean = checked(event)
    assert from_record(to_record(event)) == from_record(to_record(clean)) == clean
    assert replayed(BEFORE, event, AFTER) == [BEFORE, clean, AFTER]
    assert checked(clean) == clean


@pytest.mark.parametrize("kind", KINDS)
@given(data=st.data())
def test_what_no_reader_takes_is_lost_alone(kind: str, data: st.DataObject) -> None:
    event = data.draw(whole(KINDS[kind], ANY))
    before, read, after = replayed(BEFORE, event, AFTER)
    assert (before, after) == (BEFORE, AFTER)
    assert read == checked(read)
    if not (isinstance(read, Lost) and read.where == UNWRITABLE):
        assert read == checked(event)


def test_an_owner_is_checked_as_well() -> None:
    assert replayed(KINDS["owned"](1, 5, Owner(1 << 64, 2), "pagemap")) == [  # type: ignore[call-arg]
        Lost(1, UNWRITABLE, 1)
    ]


@pytest.mark.parametrize("kind", KINDS)
@given(data=st.data())
def test_true_is_no_number(kind: str, data: st.DataObject) -> None:
    """Neither within an owner nor in a count of the kernel's."""
    record = to_record(data.draw(whole(KINDS[kind], SANE)))
    for place, key in _numbers(record):
        number, place[key] = place[key], True
        with pytest.raises(MalformedLine):
            Decoder().event(record)
        place[key] = number
    assert isinstance(Decoder().event(record), KINDS[kind])


def _numbers(place: Any) -> Iterator[tuple[Any, Any]]:
    """Places of the integers in a record: (dict or list, key)."""
    for key, item in place.items() if isinstance(place, dict) else enumerate(place):
        if isinstance(item, dict | list):
            yield from _numbers(item)
        elif type(item) is int:
            yield place, key
