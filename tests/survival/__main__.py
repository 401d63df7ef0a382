"""What serve's history survives: a table, measured now (``--readme``: into docs/service.md).

With ``--lab`` on a host that systemd boots in the lab, with real events.
"""

from __future__ import annotations

import argparse
import os
import platform
import random
import sqlite3
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

from tests.lab.progress import print_status
from tests.lab.readme import keep, save
from tests.survival import booted, cases, day
from tests.survival.cases import HOUR, Outcome

KILLS = 15
CUTS = 50


@contextmanager
def _directory() -> Iterator[Path]:
    with tempfile.TemporaryDirectory() as name:
        yield Path(name)


def _times(count: int, case: Callable[[Path], Outcome]) -> list[Outcome]:
    found = []
    for _ in range(count):
        with _directory() as directory:
            found.append(case(directory))
    return found


def _row(what: str, found: list[Outcome], remark: str = "") -> str:
    missing = [one.missing for one in found]
    most = f"{min(missing):,} to {max(missing):,}" if len(set(missing)) > 1 else f"{missing[0]:,}"
    whole = "yes" if all(one.is_whole for one in found) else "NO"
    happened, kept, counted = (
        f"{sum(getattr(one, name) for one in found):,}" for name in ("happened", "kept", "counted")
    )
    return f"| {what} | {happened} | {kept} | {counted} | {most} | {whole} | {remark} |"


def _rows(rng: random.Random) -> Iterator[str]:
    print_status(f"survival: {KILLS} kills")
    kills = _times(KILLS, lambda at: cases.killed(at, rng.uniform(0.2, 4.0)))
    yield _row(f"`kill -9`, at {KILLS} random moments of a storm", kills, "of the last second")
    print_status(f"survival: {2 * CUTS} power cuts")
    cut = _times(CUTS, lambda at: cases.power_cut(at, rng, is_torn=False))
    yield _row(
        f"power cut, {CUTS} times: the log ends anywhere after the last sync",
        cut,
        "of what was not synced",
    )
    torn = _times(CUTS, lambda at: cases.power_cut(at, rng, is_torn=True))
    yield _row(f"power cut, {CUTS} times: what was not synced is garbage", torn, "likewise")
    if os.geteuid() == 0:
        print_status("survival: disk full, read-only")
        yield _row(
            "disk full, 7 events more than have room in memory",
            _times(1, cases.disk_full),
            "written when there is room",
        )
        yield _row(
            "file system read-only, likewise",
            _times(1, cases.read_only),
            "written when it is writable",
        )
    print_status("survival: the rest")
    damaged = _times(1, lambda at: cases.damaged(at, rng))
    yield _row("file damaged", damaged, "in the file that is set aside, as logged")
    for step, name in ((HOUR, "forwards"), (-HOUR, "backwards")):
        stepped = _times(1, lambda at, step=step: cases.stepped(at, step))  # type: ignore[misc]
        yield _row(f"clock stepped an hour {name}", stepped)
    readers = _times(1, cases.restarted_under_readers)
    yield _row("`serve` ended, killed and started under two readers", readers, "of the killed one")
    yield _row("host rebooted", _times(1, cases.rebooted), "what was poisoned is history")


def _native(seed: int) -> list[str]:
    head = ("what happened", "events", "kept", "counted as lost", "neither", "file whole", "")
    lines = [
        f"Measured {time.strftime('%Y-%m-%d', time.gmtime())}, SQLite {sqlite3.sqlite_version},"
        f" Linux {platform.release()}, seed {seed}. The storm has 5,000 events a second at"
        " most.",
        "",
        f"| {' | '.join(head)} |",
        "|---|---|---|---|---|---|---|",
        *_rows(random.Random(seed)),
    ]
    print_status("survival: a day")
    return [*lines, "", *day.measure()]


def main() -> int:
    """Do all of it; ends with a traceback where something is not as it is stated."""
    parser = argparse.ArgumentParser(prog="python -m tests.survival", description=__doc__)
    parser.add_argument("--readme", action="store_true", help="write it into docs/service.md")
    parser.add_argument("--seed", type=int, default=time.time_ns() % 1_000_000)
    parser.add_argument("--lab", action="store_true", help="on a host that the lab boots")
    options = parser.parse_args()
    if options.lab:
        with _directory() as directory:
            lines = booted.measure(directory, random.Random(options.seed))
    else:
        lines = _native(options.seed)
    name = "survival-booted" if options.lab else "survival"
    print("\n".join(lines))
    save(name, "\n".join(lines))
    if options.readme:
        keep(name, "\n".join(lines))
    return 0


if __name__ == "__main__":
    sys.exit(main())
