"""Laws that hold for any input and any order of events. ``make fuzz`` tries them for minutes."""

from __future__ import annotations

import os

from hypothesis import settings

_FACTOR = int(os.environ.get("KVMTRACE_FUZZ", "1"))


def examples(count: int) -> settings:
    """So many examples for a test; with KVMTRACE_FUZZ=n, at most n times as many."""
    return settings(max_examples=count * _FACTOR)
