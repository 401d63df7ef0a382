"""Names from tenants, as they are printed."""

from __future__ import annotations

import unicodedata

import pytest
from hypothesis import given
from hypothesis import strategies as st

from kvmtrace.sanitize import NAME_LIMIT, clean


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("web-1", "web-1"),
        ("Ünïcode 名前 🐧", "Ünïcode 名前 🐧"),
        ("a\x1b[31mb", "a?[31mb"),
        ("a\x9bb\x7f", "a?b?"),
        ("two\nlines\r\n", "two?lines??"),
        ("\u202edesrever\u2066", "desrever"),
        ("zero\u200bwidth\ufeff\u00ad", "zerowidth"),
        ("blank\u3164\u115f", "blank"),
        ("  much   space\u00a0here ", "much space here"),
        ("\u0301mark first", "mark first"),
        ("z" + "\u0301" * 40, "z" + "\u0301" * 4),
        ("lone \ud800 surrogate", "lone ? surrogate"),
        ("line\u2028separator", "line?separator"),
        ("", ""),
    ],
)
def test_clean(text: str, expected: str) -> None:
    assert clean(text) == expected


def test_clean_bounds_the_length() -> None:
    assert clean("x" * NAME_LIMIT) == "x" * NAME_LIMIT
    assert clean("x" * 10_000_000) == "x" * (NAME_LIMIT - 1) + "…"
    assert clean("abcdef", limit=4) == "abc…"


HOSTILE = st.text(
    st.one_of(
        st.characters(),
        st.sampled_from("\x00\x1b\x9b\x7f\n\r\u202e\u2066\u200b\u200d\ufeff\u0301\ud800 \u3000"),
    ),
    max_size=400,
)


@given(HOSTILE, st.integers(1, 200))
def test_cleaned_text_cannot_move_or_hide(text: str, limit: int) -> None:
    cleaned = clean(text, limit)
    assert len(cleaned) <= limit
    for character in cleaned:
        assert unicodedata.category(character) not in {"Cc", "Cf", "Cs", "Co", "Cn", "Zl", "Zp"}
    assert cleaned == cleaned.strip()
    assert not cleaned or unicodedata.category(cleaned[0]) not in {"Mn", "Me"}
    cleaned.encode()  # surrogates would raise


@given(HOSTILE, st.integers(1, 200))
def test_cleaning_twice_changes_nothing(text: str, limit: int) -> None:
    assert clean(clean(text, limit), limit) == clean(text, limit)


@given(st.text(st.characters(min_codepoint=33, max_codepoint=126), max_size=NAME_LIMIT))
def test_plain_names_are_left_alone(text: str) -> None:
    assert clean(text) == text
