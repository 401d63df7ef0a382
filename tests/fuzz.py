"""``make fuzz [MINUTES=n | TIMES=n] [SEED=n] [FROM=text]``: tests of tests/property, for minutes.

Each file of tests/property is a target; all get the same time, and two run at once. pytest runs a
target in rounds; each round has its own seed, and its tests share the time. With TIMES=n there is
one round of each, of n times the examples of a test run, however long that takes. Seeds are random;
with FROM they are derived from that text: with TIMES the same tree then has the same result. A
failure is printed with the smallest input that shows it and the command that finds it again, and
the exit status is 1. Keep findings as tests.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import subprocess
import sys
import tempfile
import time
from collections import Counter, deque
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
TARGETS = sorted(str(path.relative_to(ROOT)) for path in ROOT.glob("tests/property/test_*.py"))
WORKERS = 2
ROUND_SECONDS = 90.0
AT_WORK = 0.8
"""The share of a round for tests; the rest is for pytest's start and end."""

# Limit of examples per test and round, as a multiple of those in a test run: hypothesis keeps all
# of them in memory. Changing it changes the examples of a seed.
FACTOR = 25

# A round that takes longer is stuck waiting. Endless computation is limited by CPU time instead
# (tests/property/conftest.py), as a process may get little of it on a busy machine.
GRACE_SECONDS = 1200.0


@dataclass(frozen=True)
class Round:
    """A run of pytest. ``output``: None if nothing was found. ``failed``: tests that failed."""

    target: str
    seed: int
    seconds: float
    executions: Counter[str]
    output: str | None
    failed: tuple[str, ...]


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the targets; return 0 if nothing was found, else 1."""
    parser = argparse.ArgumentParser(prog="make fuzz")
    parser.add_argument("--minutes", type=float, default=5)
    parser.add_argument("--times", type=int, help="n times the examples of a test run, once")
    parser.add_argument("--seed", type=int, help="one round of each target with this seed")
    parser.add_argument("--from", dest="origin", help="derive the seeds from this text")
    parser.add_argument("targets", nargs="*", default=TARGETS, help="files, or tests in them")
    options = parser.parse_args(arguments)
    if options.times is not None and options.times < 1:
        parser.error("--times is a multiple of a test run's examples: at least 1")
    if "CI" not in os.environ:
        os.nice(10)
    if options.seed is not None:
        factor = options.times or FACTOR
        rounds = [one_round(target, options.seed, None, factor) for target in options.targets]
    else:
        chance = random.Random(options.origin)
        if options.times is not None:
            rounds = _once(options.targets, options.times, chance)
        else:
            rounds = _rounds(options.targets, options.minutes * 60, chance)
    executions: Counter[str] = Counter()
    for one in rounds:
        executions += one.executions
    for target, count in sorted(executions.items()):
        print(f"{count:10}  {target}")
    found = [one for one in rounds if one.output is not None]
    for one in found:
        print(f"\n{one.output}")
        for test in one.failed:
            times = f" TIMES={options.times}" if options.times is not None else ""
            print(f"found; to repeat: make fuzz SEED={one.seed}{times} ARGS={test}")
    total = sum(executions.values())
    print(f"{len(found) or 'nothing'} found in {len(rounds)} rounds, {total} executions")
    return 1 if found else 0


def _once(targets: Sequence[str], times: int, chance: random.Random) -> list[Round]:
    seeds = [chance.randrange(1 << 32) for _ in targets]
    with ThreadPoolExecutor(WORKERS) as workers:
        return [
            *workers.map(lambda target, seed: one_round(target, seed, None, times), targets, seeds)
        ]


def _rounds(targets: Sequence[str], seconds: float, chance: random.Random) -> list[Round]:
    deadline = time.monotonic() + seconds
    each = max(1, round(seconds * WORKERS / len(targets) / ROUND_SECONDS))
    rounds = [(target, chance.randrange(1 << 32)) for target in [*targets] * each]
    # The last rounds get the time that the others have left.
    chance.shuffle(rounds)
    left = deque(rounds)
    done: list[Round] = []

    def work() -> None:
        while left:
            share = (deadline - time.monotonic()) * min(1.0, WORKERS / len(left)) * AT_WORK
            try:
                target, seed = left.popleft()
            except IndexError:
                return
            if share > 0:
                done.append(one_round(target, seed, share))
            else:
                print(f"no time left: {target}", flush=True)

    with ThreadPoolExecutor(WORKERS) as workers:
        for worker in [workers.submit(work) for _ in range(WORKERS)]:
            worker.result()
    return done


def one_round(target: str, seed: int, seconds: float | None, factor: int = FACTOR) -> Round:
    """Run a target; with all of its examples if ``seconds`` is None.

    ``factor``: limit of examples, as a multiple of those in a test run.
    """
    began = time.monotonic()
    command = [sys.executable, "-m", "pytest", f"--hypothesis-seed={seed}", target]
    with tempfile.NamedTemporaryFile("r", prefix="kvmtrace-fuzz-") as report:
        until = 0.0 if seconds is None else began + seconds
        environment = {
            **os.environ,
            "KVMTRACE_FUZZ": str(factor),
            "KVMTRACE_FUZZ_UNTIL": str(until),
            "KVMTRACE_FUZZ_REPORT": report.name,
        }
        limit = None if seconds is None else seconds + GRACE_SECONDS
        try:
            run = subprocess.run(
                command,
                cwd=ROOT,
                env=environment,
                timeout=limit,
                check=False,
                text=True,
                errors="replace",
                stdout=subprocess.PIPE,
                stderr=subprocess.STDOUT,
            )
            output = run.stdout if run.returncode else None
        except subprocess.TimeoutExpired as error:
            said = error.stdout or b""
            output = said.decode(errors="replace") if isinstance(said, bytes) else said
            output += f"\n{target} did not end"
        lines = [json.loads(line) for line in report]
    executions: Counter[str] = Counter()
    file = target.partition("::")[0]
    executions[file] = sum(count for _, count, _ in lines)
    failed = tuple(f"{file}::{name}" for name, _, has_failed in lines if has_failed) or (target,)
    took = time.monotonic() - began
    what = "something found" if output is not None else "nothing found"
    print(f"seed {seed}: {target}, {took:.0f} s, {what}", flush=True)
    return Round(target, seed, took, executions, output, failed)


if __name__ == "__main__":
    sys.exit(main())
