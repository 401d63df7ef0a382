"""Names that tenants choose, made safe to show: applied once, where a name is read."""

from __future__ import annotations

import unicodedata
from collections.abc import Iterator

NAME_LIMIT = 128

# Invisible or blank although Unicode files them under letters and marks (Default_Ignorable).
_INVISIBLE = frozenset(
    chr(c)
    for first, last in (
        (0x034F, 0x034F),
        (0x115F, 0x1160),
        (0x17B4, 0x17B5),
        (0x180B, 0x180F),
        (0x3164, 0x3164),
        (0xFE00, 0xFE0F),
        (0xFFA0, 0xFFA0),
        (0xE0100, 0xE01EF),
    )
    for c in range(first, last + 1)
)

# Marks stacked on one letter: no language needs more, and a pile of them covers other lines.
MAX_MARKS = 4

# Controls, line breaks, surrogates, private use and unassigned: a terminal may do anything.
_VISIBLY_REPLACED = {"Cc", "Zl", "Zp", "Cs", "Co", "Cn"}


def clean(text: str, limit: int = NAME_LIMIT) -> str:
    """``text`` fit for a terminal: at most ``limit`` characters, none that moves or hides others.

    Control characters become ``?``, format characters (bidi, zero-width) vanish, blanks of all
    kinds become single spaces.
    """
    if not text or is_clean(text, limit):
        return text
    # A hostile command line has megabytes: bound the work too.
    kept = "".join(_clean_characters(text[: 8 * limit]))
    kept = " ".join(kept.split())
    return kept if len(kept) <= limit else kept[: limit - 1].rstrip() + "…"


def is_clean(text: str, limit: int = NAME_LIMIT) -> bool:
    """Whether ``clean`` is known to return ``text`` as it is: most names are plain ASCII."""
    return (
        len(text) <= limit
        and text.isascii()
        and text.isprintable()
        and "  " not in text
        and text[:1] not in ("", " ")
        and text[-1] != " "
    )


def _clean_characters(text: str) -> Iterator[str]:
    marks = MAX_MARKS  # none to begin with: it would sit on whatever stands before the name
    for character in text:
        if " " <= character <= "~":
            marks = MAX_MARKS if character == " " else 0
            yield character
            continue
        category = unicodedata.category(character)
        if category in ("Mn", "Me"):
            marks += 1
            if marks > MAX_MARKS:
                continue
        elif category != "Cf":
            marks = 0
        if category == "Cf" or character in _INVISIBLE:
            continue
        if category in _VISIBLY_REPLACED:
            yield "?"
        elif category == "Zs":
            marks = MAX_MARKS
            yield " "
        else:
            yield character
