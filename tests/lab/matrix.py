"""Run every scenario on every kernel by every source: ``python -m tests.lab.matrix`` (make matrix).

A cell of the table is "pass", "FAIL", or the reason why that kernel cannot stage the scenario. The
exit status is 1 if any failed.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
import traceback
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from tests.lab import config, readme
from tests.lab.all_at_once import ALL_AT_ONCE
from tests.lab.errors import LabError, LabUnable, status_of
from tests.lab.ghes import ghes
from tests.lab.harness import Unstageable, end_following
from tests.lab.hosts import HOSTS
from tests.lab.kernel_pages import KERNEL_PAGES
from tests.lab.libvirt_guest import libvirt_advice
from tests.lab.machine import Machine
from tests.lab.machine_check import SCENARIOS as MACHINE_CHECKS
from tests.lab.nested import NESTED
from tests.lab.owners import owners_before_any_touch
from tests.lab.progress import print_status
from tests.lab.qemu_guest import qemu_advice, qemu_loses_a_page, qemu_with_a_page_gone
from tests.lab.scenarios import SCENARIOS, SOURCES, Scenario

BOTH = "both"
UNSTAGED = "can't be staged: "
HARDWARE = Scenario(ghes, sources=(BOTH,), boot={"ras": True})
OWNERS = Scenario(owners_before_any_touch, sources=("bpf",))
QEMU = (
    Scenario(qemu_loses_a_page),
    Scenario(qemu_with_a_page_gone, sources=(BOTH,)),
    Scenario(qemu_advice),
    Scenario(libvirt_advice),
)
EVERYTHING = (
    *SCENARIOS,
    OWNERS,
    *QEMU,
    *MACHINE_CHECKS,
    KERNEL_PAGES,
    ALL_AT_ONCE,
    HARDWARE,
    NESTED,
    *HOSTS,
)

# Sizes that a whole matrix can afford under emulation; test_sources.py runs the full sizes on the
# newest kernel.
SMALLER: dict[str, dict[str, int]] = {
    "storm": {"rounds": 20_000},
    "crowd": {"rounds": 3_000},
    "deaf_crowd": {"rounds": 500},
    "churn": {"vms": 50},
    "without_bcc": {"rounds": 20_000},
}


Cells = dict[tuple[str, str], str]
"""{(scenario, source): outcome}"""


def run_kernel(
    name: str, sources: tuple[str, ...], only: Sequence[str] | None
) -> tuple[str, Cells]:
    """Boot a kernel, once per set of boot options, and run everything on it: (release, cells)."""
    cells: Cells = {}
    machine: Machine | None = None
    booted: Mapping[str, Any] = {}
    release = ""
    try:
        for scenario, source in _plan(sources, only):
            if machine is None or not machine.alive or booted != scenario.boot:
                if machine is not None:
                    machine.close()
                    machine = None
                try:
                    machine, booted = Machine.boot(name, **scenario.boot), scenario.boot
                except LabUnable as reason:
                    cells[scenario.name, source] = f"{UNSTAGED}{reason}"
                    continue
                except LabError as error:
                    print_status(f"{name} {source} {scenario.name}: {error}")
                    cells[scenario.name, source] = f"FAIL: {error}"
                    continue
                release = machine.release
            cells[scenario.name, source] = _run(name, machine, scenario, source)
    finally:
        if machine is not None:
            machine.close()
    return release or "did not boot", cells


def _plan(sources: tuple[str, ...], only: Sequence[str] | None) -> Iterator[tuple[Scenario, str]]:
    """Yield what to run, ordered for as few boots and starts of kvmtrace as possible."""
    chosen = [scenario for scenario in EVERYTHING if only is None or scenario.name in only]
    boots = [scenario.boot for scenario in chosen]
    for boot in [boot for at, boot in enumerate(boots) if boot not in boots[:at]]:
        for source in (*SOURCES, BOTH):
            if source in sources or set(sources) == set(SOURCES):
                for scenario in chosen:
                    if scenario.boot == boot and source in scenario.sources:
                        yield scenario, source


def _run(kernel: str, machine: Machine, scenario: Scenario, source: str) -> str:
    began = time.monotonic()
    try:
        if scenario in HOSTS:  # these start their own kvmtrace
            end_following(machine)
        scenario.run(machine, source, **SMALLER.get(scenario.name, {}))
        outcome = "pass"
    except Unstageable as reason:
        outcome = f"{UNSTAGED}{reason}"
    except Exception as error:
        traceback.print_exc()
        outcome = f"FAIL: {type(error).__name__}"
    print_status(f"{kernel} {source} {scenario.name}: {outcome} ({time.monotonic() - began:.0f} s)")
    return outcome


def table(results: Mapping[str, tuple[str, Cells]]) -> str:
    """Format as Markdown: a row per scenario, a column per kernel, reasons as notes below.

    Sources with equal cells share a row.
    """
    notes: list[str] = []

    def cell(outcome: str | None) -> str:
        if outcome is None:
            return "not run"
        if outcome == "pass":
            return "pass"
        if outcome not in notes:
            notes.append(outcome)
        word = "FAIL" if outcome.startswith("FAIL") else "—"
        return f"{word} [{notes.index(outcome) + 1}]"

    ran = dict.fromkeys(key for _, cells in results.values() for key in cells)
    names = [scenario.name for scenario in EVERYTHING]
    order = {name: number for number, name in enumerate(names)}
    rows: dict[tuple[str, str], list[str]] = {}
    for scenario, source in sorted(ran, key=lambda key: (order.get(key[0], -1), key[1])):
        cells = [cell(outcomes.get((scenario, source))) for _, outcomes in results.values()]
        rows.setdefault((scenario, " | ".join(cells)), []).append(source)
    text = ["| scenario | source | " + " | ".join(results) + " |"]
    text += ["|---|---|" + "---|" * len(results)]
    text += ["| | | " + " | ".join(release for release, _ in results.values()) + " |"]
    text += [f"| {name} | {', '.join(who)} | {row} |" for (name, row), who in rows.items()]
    text += [""] + [f"[{number}] {note}  " for number, note in enumerate(notes, 1)]
    return "\n".join(text)


def tables(results: Mapping[str, tuple[str, Cells]]) -> str:
    """Format one table per architecture."""
    rows = config.rows()
    arches = list(dict.fromkeys(rows[name].arch.name for name in results))
    return "\n\n".join(
        table({name: of for name, of in results.items() if rows[name].arch.name == arch}).rstrip()
        for arch in arches
    )


def collected(paths: Sequence[Path]) -> dict[str, tuple[str, Cells]]:
    """Merge results of earlier runs, in the order of kernels.toml; a cell's last run wins."""
    found: dict[str, tuple[str, Cells]] = {}
    for path in paths:
        for name, of in json.loads(path.read_text()).items():
            cells = found.setdefault(name, (of["release"], {}))[1]
            if found[name][0] != of["release"]:
                raise LabError(f"{path}: {name} was {of['release']}, but {found[name][0]} before")
            cells.update({(scenario, source): outcome for scenario, source, outcome in of["cells"]})
    return {name: found[name] for name in config.rows() if name in found}


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m tests.lab.matrix", description=__doc__)
    parser.add_argument("--kernel", action="append", help="only this kernel (may be repeated)")
    parser.add_argument("--source", choices=SOURCES, help="only this source")
    parser.add_argument("--scenario", action="append", help="only this scenario (may be repeated)")
    parser.add_argument("--readme", action="store_true", help="write the table into docs/tested.md")
    parser.add_argument(
        "--collect",
        action="append",
        type=Path,
        metavar="FILE",
        help="run nothing; merge the build/matrix.json of earlier runs, a cell's last run wins",
    )
    options = parser.parse_args()
    kernels = options.kernel or list(config.rows())
    sources = (options.source,) if options.source else SOURCES
    results: dict[str, tuple[str, Cells]] = {}
    if options.collect:
        try:
            results = collected(options.collect)
        except (OSError, ValueError, KeyError, LabError) as error:
            parser.error(f"--collect: {error}")
    else:
        for name in kernels:
            results[name] = run_kernel(name, sources, options.scenario)
            save(results)
    print(tables(results))
    stamp = time.strftime("Run on %Y-%m-%d, under emulation (QEMU TCG).", time.gmtime())
    text = f"{stamp}\n\n{tables(results)}"
    if not (options.kernel or options.source or options.scenario):
        readme.save("matrix", text)
    if options.readme:
        readme.keep("matrix", text)
    return int(
        any(
            outcome.startswith("FAIL")
            for _, cells in results.values()
            for outcome in cells.values()
        )
    )


def save(results: Mapping[str, tuple[str, Cells]]) -> None:
    """Write the results so far to build/matrix.json."""
    build = Path("build")
    build.mkdir(exist_ok=True)
    saved = {
        name: {"release": release, "cells": [[*key, outcome] for key, outcome in cells.items()]}
        for name, (release, cells) in results.items()
    }
    (build / "matrix.json").write_text(json.dumps(saved, indent=1))


if __name__ == "__main__":
    sys.exit(status_of(main))
