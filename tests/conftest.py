"""For all tests: how long an example takes is the machine's affair, and no test's.

In CI (``CI`` is set) property tests take the same examples every time, so that a change is judged
by what it changed; each run elsewhere looks for new ones, and ``make fuzz`` for many.
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
