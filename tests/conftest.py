"""For all tests: how long an example takes is the machine's affair, and no test's."""

from __future__ import annotations

from hypothesis import HealthCheck, settings

settings.register_profile("kvmtrace", deadline=None, suppress_health_check=[HealthCheck.too_slow])
settings.load_profile("kvmtrace")
