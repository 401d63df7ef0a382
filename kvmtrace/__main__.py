"""``python -m kvmtrace``."""

from kvmtrace.cli import main

main()
