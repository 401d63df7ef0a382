"""For ``make fuzz``: limit the time of each property test, and report its number of examples.

In any run, an example that takes too long is a failure: see ``bounded``.
"""

from __future__ import annotations

import functools
import json
import os
import resource
import time
import unittest
from collections.abc import Generator
from typing import Any

import pytest
from _pytest.outcomes import Failed

from tests.property import bounded

MEMORY = 4 << 30

LEAST = 3
"""Examples that each test gets, however little time is left."""

# CPU time: hypothesis shrinks an example for up to five minutes.
GRACE_SECONDS = 400

# Set by tests/fuzz.py: when to stop (monotonic seconds), and the file for the counts.
_UNTIL = float(os.environ.get("KVMTRACE_FUZZ_UNTIL", "0"))
_REPORT = os.environ.get("KVMTRACE_FUZZ_REPORT")

if _UNTIL:
    cpu = max(0, int(_UNTIL - time.monotonic())) + GRACE_SECONDS
    for limit, value in ((resource.RLIMIT_AS, MEMORY), (resource.RLIMIT_CPU, cpu)):
        resource.setrlimit(limit, (value, resource.getrlimit(limit)[1]))


class TimeIsOver(unittest.SkipTest):
    """Raised when time is up. Hypothesis passes a SkipTest on at once, without shrinking."""


class _Tries:
    """Counts and bounds the examples of one test."""

    def __init__(self, test: Any, until: float) -> None:
        self.count = 0
        self.over = False
        self.failed = False
        self._test = test
        self._until = until

    def __call__(self, *arguments: Any, **named: Any) -> Any:
        late = self._until and self.count >= LEAST and time.monotonic() >= self._until
        if late and not self.failed:
            self.over = True
            raise TimeIsOver("this test's share of the time is over")
        self.count += 1
        try:
            with bounded():
                return self._test(*arguments, **named)
        except (Exception, Failed):
            self.failed = True  # from now on hypothesis shrinks the example
            raise


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Let ``make fuzz`` run property tests only."""
    if _UNTIL or "KVMTRACE_FUZZ" in os.environ:
        others = [item for item in items if not _takes_examples(item)]
        config.hook.pytest_deselected(items=others)
        items[:] = [item for item in items if _takes_examples(item)]
    for left, item in enumerate(reversed(items), 1):
        item.stash[_LEFT] = left


_LEFT = pytest.StashKey[int]()


def _takes_examples(item: pytest.Item) -> bool:
    return hasattr(getattr(item, "obj", None), "hypothesis")


@pytest.hookimpl(wrapper=True)
def pytest_pyfunc_call(pyfuncitem: pytest.Function) -> Generator[None, object, object]:
    """Run a property test within its share of the remaining time."""
    if not _takes_examples(pyfuncitem):
        return (yield)
    now = time.monotonic()
    share = (_UNTIL - now) / pyfuncitem.stash[_LEFT]
    handle: Any = pyfuncitem.obj.hypothesis
    original = handle.inner_test
    tries = _Tries(original, now + share if _UNTIL else 0.0)

    @functools.wraps(original)
    def bounded(*arguments: Any, **named: Any) -> Any:
        return tries(*arguments, **named)

    handle.inner_test = bounded  # hypothesis' interface for test runners
    try:
        return (yield)
    except BaseException:
        # Ending a test that draws data itself early looks like an error to hypothesis.
        if not tries.over:
            raise
        return True
    finally:
        handle.inner_test = original
        if _REPORT:
            with open(_REPORT, "a", encoding="utf-8") as report:
                print(json.dumps([pyfuncitem.name, tries.count, tries.failed]), file=report)
