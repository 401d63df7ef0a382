"""Properties of parsers of foreign input, and how to state them for a parser."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tests.property import bounded, examples
from tests.property.damage import damaged, long


@dataclass(frozen=True, repr=False)
class Parser:
    """A parser: ``read`` takes bytes and raises nothing but ``refuses``.

    ``seeds``: valid inputs. ``found``: inputs that failed once, as ``make fuzz`` printed them
    ("Draw 1 (input)").
    """

    read: Callable[[bytes], object]
    seeds: Sequence[bytes]
    refuses: tuple[type[Exception], ...] = ()
    found: Sequence[bytes] = ()


def text(read: Callable[[str], object]) -> Callable[[bytes], object]:
    """Adapt a parser of text to bytes, decoded as from a file."""
    return lambda data: read(data.decode("utf-8", "replace"))


def laws(parsers: Mapping[str, Parser]) -> tuple[Callable[..., Any], ...]:
    """Make tests: any input is read or refused, and in bounded time (``conftest``)."""

    @pytest.mark.parametrize(
        "parser", [pytest.param(one, id=name) for name, one in parsers.items()]
    )
    @given(data=st.data())
    @examples(40)
    def test_any_input_is_read_or_refused(parser: Parser, data: st.DataObject) -> None:
        _read(parser, data.draw(damaged(parser.seeds), label="input"))

    @pytest.mark.parametrize(
        "parser", [pytest.param(one, id=name) for name, one in parsers.items()]
    )
    @given(data=st.data())
    @examples(8)
    def test_long_input_takes_no_time(parser: Parser, data: st.DataObject) -> None:
        _read(parser, data.draw(long(parser.seeds), label="input"))

    @pytest.mark.parametrize(
        ("parser", "known"),
        [
            pytest.param(one, known, id=f"{name}-{number}")
            for name, one in parsers.items()
            for number, known in enumerate((*one.seeds, *one.found))
        ],
    )
    def test_what_is_known(parser: Parser, known: bytes) -> None:
        with bounded():
            _read(parser, known)

    return test_any_input_is_read_or_refused, test_long_input_takes_no_time, test_what_is_known


def _read(parser: Parser, data: bytes) -> None:
    with suppress(*parser.refuses):
        parser.read(data)
