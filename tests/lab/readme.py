"""What was measured last is kept in README.md, between two marks."""

from __future__ import annotations

from pathlib import Path

README = Path("README.md")


def keep(what: str, text: str, readme: Path = README) -> None:
    """Put ``text`` between the marks ``<!-- what -->`` and ``<!-- /what -->``.

    Raises ValueError where they are not there.
    """
    old = readme.read_text()
    begin_mark = f"<!-- {what} -->\n"
    begin, end = old.index(begin_mark) + len(begin_mark), old.index(f"<!-- /{what} -->")
    readme.write_text(old[:begin] + text.rstrip() + "\n" + old[end:])
