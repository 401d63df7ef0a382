"""Which packages debian/control names."""

from __future__ import annotations

import re

from tests.lab.config import PROJECT


def names(*fields: str) -> tuple[str, ...]:
    """Names of the packages in these fields, without substitution variables."""
    text = (PROJECT / "debian/control").read_text()
    found: list[str] = []
    for field in fields:
        listed = re.search(rf"^{field}:((?:.*)\n(?: .*\n)*)", text, re.MULTILINE)
        assert listed, field
        entries = (one.strip() for one in listed[1].split(","))
        found += [re.split(r"[\s(]", one)[0] for one in entries if one and one[0] != "$"]
    return tuple(found)
