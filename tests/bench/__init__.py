"""Costs that need no lab: ``python -m tests.bench`` (make bench-native)."""
