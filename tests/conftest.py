"""Hypothesis settings for all tests: no deadline for an example, as machines differ in speed.

In CI (``CI`` is set) property tests use the same examples in each run, so that only a change of the
code changes the result. Elsewhere each run tries new examples, and ``make fuzz`` tries many.
"""

from __future__ import annotations

import os

from hypothesis import HealthCheck, settings

settings.register_profile(
    "kvmtrace",
    max_examples=100 * int(os.environ.get("KVMTRACE_FUZZ", "1")),
    deadline=None,
    suppress_health_check=[HealthCheck.too_slow],
    derandomize=bool(os.environ.get("CI")) and "KVMTRACE_FUZZ" not in os.environ,
)
settings.load_profile("kvmtrace")
