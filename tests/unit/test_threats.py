"""All tests that docs/threats.md names exist."""

from __future__ import annotations

import ast
import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
TEXT = (ROOT / "docs/threats.md").read_text()
NAMED = sorted(set(re.findall(r"`(tests/[^`:]+)::([^`]+)`", TEXT)))


@pytest.mark.parametrize(("path", "name"), NAMED)
def test_what_shows_it_is_there(path: str, name: str) -> None:
    tree = ast.parse((ROOT / path).read_text())
    functions = {node.name for node in tree.body if isinstance(node, ast.FunctionDef)}
    assert name in functions


def test_every_cannot_is_shown() -> None:
    """Each claim names a test or a rule of the kernel."""
    tables = [part for part in TEXT.split("\n\n") if re.match(r"\| (cannot|shown)\b", part)]
    assert len(tables) == len(re.findall("^## ", TEXT, re.MULTILINE))
    for row in [row for table in tables for row in table.splitlines()[2:]]:
        assert "`tests/" in row or "the kernel's rule" in row, row
