"""What serve's history survives, as it was seen: ``python -m tests.survival`` (make survival)."""
