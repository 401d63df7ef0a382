"""Cost of kvmtrace, measured in one run in the lab: ``python -m tests.lab.bench`` (make bench).

Absolute numbers of an emulated machine mean little; the ratios within one run do. The clock of the
machine counts instructions (1 ns each), so what else runs on the host changes nothing. Only
``--rounds`` measures exits by the time of the host as well.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import statistics
import sys
import time
from pathlib import Path

from tests.lab import bench_exits, bench_idle, bench_scrapes
from tests.lab.bench_exits import running
from tests.lab.errors import status_of
from tests.lab.harness import PATIENCE, Vmm
from tests.lab.machine import DEFAULT, Machine
from tests.lab.progress import print_status
from tests.lab.readme import keep, save

UNTIL_READY = Path(__file__).with_name("until_ready.py")
COMPILED = "/var/cache/kvmtrace"


def footprint(machine: Machine, repeats: int) -> list[str]:
    """Measure seconds from start to the first sample, and memory then, by command and source."""
    rows = ["| command | source | start to first sample | RSS | of it anonymous |"]
    rows += ["|---|---|---|---|---|"]
    machine.run(["rm", "-rf", COMPILED], check=True)
    rows.append(_start(machine, "events", "bpf", "watching", 1, ", compiled for the first time"))
    for source in ("bpf", "ftrace"):
        for name, ready in (("events", "watching"), ("serve", "serving"), ("top", "Probes [1-9]")):
            rows.append(_start(machine, name, source, ready, repeats))
    return rows


def _start(  # noqa: PLR0917 (a row of the table)
    machine: Machine, name: str, source: str, ready: str, repeats: int, what: str = ""
) -> str:
    command = ["kvmtrace", name, "--source", source]
    script = ["python3", "-c", UNTIL_READY.read_text(), ready, *command]
    found = [
        json.loads(machine.run(script, check=True, timeout=10 * PATIENCE).stdout)
        for _ in range(repeats)
    ]
    seconds = statistics.median(one["seconds"] for one in found)
    rss, anonymous = (max(one[key] for one in found) / 1024 for key in ("rss_kib", "anon_kib"))
    row = f"| {name} | {source}{what} | {seconds:.2f} s | {rss:.0f} MiB | {anonymous:.0f} MiB |"
    print_status(f"bench: {row}")
    return row


def storm_cost(machine: Machine, rounds: int) -> list[str]:
    """Measure kvmtrace's CPU time while a VMM takes ``rounds`` memory faults at full speed.

    A storm's first second, in which an incident begins, is not in it.
    """
    rows = ["| a storm, by source | faults/s | kvmtrace's CPU |", "|---|---|---|"]
    for source in ("bpf", "ftrace"):
        with running(machine, f"kvmtrace events --json --source {source}", "watching", "stderr"):
            vmm = Vmm(machine, "storm")
            vmm.step("create v backing=gmem pages=32")
            vmm.step("touch v +3")
            vmm.step("poison v +3")
            vmm.step(f"loop v +3 {rounds // 10}", patience=10 * PATIENCE)
            before = _cpu_seconds(machine)
            took = vmm.step(f"loop v +3 {rounds}", patience=10 * PATIENCE)["ns"] / 1e9
            spent = _cpu_seconds(machine) - before
            vmm.end()
        rows.append(f"| {source} | {rounds / took:,.0f} | {100 * spent / took:.1f} % of a CPU |")
        print_status(f"bench: {rows[-1]}")
    return rows


def _cpu_seconds(machine: Machine) -> float:
    script = "cat /proc/$(pgrep -f 'kvmtrace events' | head -1)/task/*/schedstat"
    lines = machine.run(script, check=True).stdout.splitlines()
    return sum(int(line.split()[0]) for line in lines) / 1e9


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m tests.lab.bench", description=__doc__)
    parser.add_argument("--rounds", type=int, default=0, help="measure exits by time as well")
    parser.add_argument("--exits", type=int, default=25_000, help="in a round")
    parser.add_argument("--storm", type=int, default=600_000, help="faults")
    parser.add_argument("--readme", action="store_true", help="write the result into docs/costs.md")
    options = parser.parse_args()
    with Machine.boot(DEFAULT, counting=True) as machine:
        where = (
            f"{time.strftime('%Y-%m-%d', time.gmtime())}, Linux {machine.release} under QEMU TCG "
            f"with 2 vCPUs, on {os.cpu_count()} {platform.machine()} cores"
        )
        parts = [
            [f"Measured in one run: {where}."],
            footprint(machine, 3),
            bench_exits.instructions(machine),
            storm_cost(machine, options.storm),
        ]
    if options.rounds:
        with Machine.boot(DEFAULT) as machine:
            machine.run("kvmtrace compile", timeout=PATIENCE)
            parts.append(bench_exits.overhead(machine, options.exits, options.rounds))
    parts += [bench_scrapes.measure(8), bench_idle.measure()]
    text = "\n\n".join("\n".join(part) for part in parts)
    print(text)
    save("bench", text)
    if options.readme:
        keep("bench", text)
    return 0


if __name__ == "__main__":
    sys.exit(status_of(main))
