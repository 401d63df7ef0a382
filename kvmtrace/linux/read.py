"""Read a file that may not be there."""

from __future__ import annotations


def read_text(path: str, limit: int = -1) -> str:
    """Return up to ``limit`` bytes of a file as text; "" if it cannot be read."""
    try:
        with open(path, "rb") as file:
            return file.read(limit).decode("utf-8", "replace")
    except OSError:
        return ""
