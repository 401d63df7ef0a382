"""``make fuzz [MINUTES=n] [SEED=n]``: the property tests with fresh seeds, until the time is over.

Each round is one run of pytest with a seed of its own. The first failure ends it, with status 1,
the smallest example found and the seed that finds it again. Findings are kept as tests.
"""

from __future__ import annotations

import argparse
import os
import secrets
import subprocess
import sys
import time
from collections.abc import Sequence

# Examples of each test in a round, times what a test run takes: a round is a minute or two.
FACTOR = 5
PROPERTIES = "tests/property"


def main(arguments: Sequence[str] | None = None) -> int:
    """Exit status: 0 if nothing was found, 1 if something was."""
    parser = argparse.ArgumentParser(prog="make fuzz")
    parser.add_argument("--minutes", type=float, default=5)
    parser.add_argument("--seed", type=int, help="one round with this seed, to its end")
    options = parser.parse_args(arguments)
    os.nice(10)
    deadline = None if options.seed is not None else time.monotonic() + options.minutes * 60
    rounds = 0
    while deadline is None or time.monotonic() < deadline:
        seed = secrets.randbelow(1 << 32) if options.seed is None else options.seed
        print(f"seed {seed}", flush=True)
        left = None if deadline is None else deadline - time.monotonic()
        status = one_round(seed, left)
        if status is None:
            break
        if status:
            print(f"found; once more: make fuzz SEED={seed}")
            return 1
        rounds += 1
        if deadline is None:
            break
    print(f"nothing found, {rounds} whole rounds of {FACTOR} times a test run's examples")
    return 0


def one_round(seed: int, seconds: float | None) -> int | None:
    """The exit status of pytest, 0 if all properties held; None where the time was over first."""
    command = [sys.executable, "-m", "pytest", "-x", f"--hypothesis-seed={seed}", PROPERTIES]
    environment = {**os.environ, "KVMTRACE_FUZZ": str(FACTOR)}
    try:
        done = subprocess.run(command, env=environment, timeout=seconds, check=False)
    except subprocess.TimeoutExpired:
        return None
    return done.returncode


if __name__ == "__main__":
    sys.exit(main())
