"""Progress on stderr: what is being done, how much of it, how long it took."""

from __future__ import annotations

import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager


def print_status(text: str) -> None:
    """Print one line for people who are waiting."""
    print(f"lab: {text}", file=sys.stderr, flush=True)


def megabytes(size: int) -> str:
    """`size` bytes as people read it."""
    return f"{size / 1e6:.1f} MB"


@contextmanager
def step(text: str) -> Iterator[None]:
    """Say what starts, and after it how long it took."""
    print_status(f"{text} ...")
    start = time.monotonic()
    yield
    print_status(f"{text}: done in {time.monotonic() - start:.1f} s")
