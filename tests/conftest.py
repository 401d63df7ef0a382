"""For all tests: no example fails for taking long, machines are as busy as they are."""

from __future__ import annotations

from hypothesis import settings

settings.register_profile("kvmtrace", deadline=None)
settings.load_profile("kvmtrace")
