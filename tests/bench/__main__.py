"""Costs that need no lab: ``python -m tests.bench`` (make bench-native); ``NAME…``: only these.

A part is a module with ``measure() -> list[str]``, lines in Markdown. Timings are of this machine;
what else runs on it adds to them, so each is the best of several.
"""

from __future__ import annotations

import argparse
import importlib.util
import os
import platform
import sys
import time

from tests.lab.progress import print_status
from tests.lab.readme import keep, save

PARTS = ("quiet", "counters", "storm", "scrapes", "snapshots", "recordings", "exits")


def main() -> int:
    """Run the parts, print what they measured, and keep it for ``make readme``."""
    parser = argparse.ArgumentParser(prog="python -m tests.bench", description=__doc__)
    parser.add_argument("part", nargs="*", choices=[[], *PARTS], default=[])
    parser.add_argument("--readme", action="store_true", help="write the result into docs/costs.md")
    options = parser.parse_args()
    found = [
        f"Measured in one run: {time.strftime('%Y-%m-%d', time.gmtime())}, Linux "
        f"{platform.release()}, Python {platform.python_version()}, {os.cpu_count()} "
        f"{platform.machine()} cores."
    ]
    for part in options.part or PARTS:
        if importlib.util.find_spec(f"tests.bench.{part}") is None:
            continue
        print_status(f"bench: {part}")
        began = time.monotonic()
        found.append("\n".join(importlib.import_module(f"tests.bench.{part}").measure()))
        print(found[-1], "\n", sep="")
        print_status(f"bench: {part}: {time.monotonic() - began:.0f} s")
    if not options.part:
        save("bench-native", "\n\n".join(found))
        if options.readme:
            keep("bench-native", "\n\n".join(found))
    return 0


if __name__ == "__main__":
    sys.exit(main())
