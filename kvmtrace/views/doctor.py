"""``kvmtrace doctor``: what this host offers, what is missing, and the fix of each."""
