"""Progress messages on stderr."""

from __future__ import annotations

import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager


def print_status(text: str) -> None:
    """Print a line."""
    print(f"lab: {text}", file=sys.stderr, flush=True)


def megabytes(size: int) -> str:
    """Format `size` bytes in megabytes."""
    return f"{size / 1e6:.1f} MB"


@contextmanager
def step(text: str) -> Iterator[None]:
    """Print a line before the block, and its duration after it."""
    print_status(f"{text} ...")
    start = time.monotonic()
    yield
    print_status(f"{text}: done in {time.monotonic() - start:.1f} s")
