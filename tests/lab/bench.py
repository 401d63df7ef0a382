"""Cost of kvmtrace, measured in one run in the lab: ``python -m tests.lab.bench`` (make bench).

Absolute numbers of an emulated machine on a shared host mean little; the ratios within one run do.
Each round measures every way of watching, so that a noisy minute affects all of them.
"""

from __future__ import annotations

import argparse
import os
import platform
import signal
import statistics
import sys
import time

from tests.lab import bench_exits, bench_idle, bench_scrapes
from tests.lab.bench_exits import Stream, running
from tests.lab.errors import status_of
from tests.lab.harness import PATIENCE, Vmm
from tests.lab.machine import DEFAULT, Machine
from tests.lab.progress import print_status
from tests.lab.readme import keep, save


def _rss_mib(machine: Machine, job_pattern: str) -> str:
    found = machine.run(
        f"for p in $(pgrep -f '{job_pattern}'); do grep -h VmRSS /proc/$p/status; done"
    ).stdout.split()
    sizes = [int(word) for word in found if word.isdecimal()]
    return f"{max(sizes) / 1024:.0f} MiB" if sizes else "?"


def footprint(machine: Machine, repeats: int) -> list[str]:
    """Measure seconds from start to the first sample, and RSS then, by command and source."""
    rows = ["| command | source | start to first sample | RSS |", "|---|---|---|---|"]
    for source in ("bpf", "ftrace"):
        commands: tuple[tuple[str, str, Stream, tuple[int, int] | None], ...] = (
            ("top", "Probes [1-9]", "stdout", (24, 80)),
            ("serve", "serving", "stderr", None),
            ("events", "watching", "stderr", None),
        )
        for name, ready, stream, pty in commands:
            times, rss = [], "?"
            for _ in range(repeats):
                began = time.monotonic()
                job = machine.start(f"exec kvmtrace {name} --source {source}", pty=pty)
                job.wait_for(ready, timeout=PATIENCE, stream=stream)
                times.append(time.monotonic() - began)
                rss = _rss_mib(machine, f"kvmtrace {name}")
                job.signal(signal.SIGTERM)
                job.wait(PATIENCE)
            rows.append(f"| {name} | {source} | {statistics.median(times):.1f} s | {rss} |")
            print_status(f"bench: {rows[-1]}")
    return rows


def storm_cost(machine: Machine, rounds: int) -> list[str]:
    """Measure kvmtrace's CPU time while a VMM takes ``rounds`` memory faults at full speed."""
    rows = ["| a storm, by source | faults/s | kvmtrace's CPU |", "|---|---|---|"]
    for source in ("bpf", "ftrace"):
        with running(machine, f"kvmtrace events --json --source {source}", "watching", "stderr"):
            vmm = Vmm(machine, "storm")
            vmm.step("create v backing=gmem pages=32")
            vmm.step("touch v +3")
            vmm.step("poison v +3")
            before = _cpu_seconds(machine)
            took = vmm.step(f"loop v +3 {rounds}", patience=10 * PATIENCE)["ns"] / 1e9
            spent = _cpu_seconds(machine) - before
            vmm.end()
        rows.append(f"| {source} | {rounds / took:,.0f} | {100 * spent / took:.1f} % of a CPU |")
        print_status(f"bench: {rows[-1]}")
    return rows


def _cpu_seconds(machine: Machine) -> float:
    stat = machine.run("cat /proc/$(pgrep -f 'kvmtrace events' | head -1)/stat", check=True).stdout
    fields = stat.rpartition(")")[2].split()
    return (int(fields[11]) + int(fields[12])) / 100


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m tests.lab.bench", description=__doc__)
    parser.add_argument("--exits", type=int, default=25_000)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--storm", type=int, default=100_000)
    parser.add_argument("--readme", action="store_true", help="write the result into docs/costs.md")
    options = parser.parse_args()
    with Machine.boot(DEFAULT) as machine:
        where = (
            f"{time.strftime('%Y-%m-%d', time.gmtime())}, Linux {machine.release} under QEMU TCG "
            f"with 2 vCPUs, on {os.cpu_count()} {platform.machine()} cores"
        )
        parts = [
            [f"Measured in one run: {where}."],
            bench_exits.overhead(machine, options.exits, options.rounds),
            bench_exits.run_time(machine, options.exits),
            storm_cost(machine, options.storm),
            footprint(machine, 3),
        ]
    parts += [bench_scrapes.measure(8), bench_idle.measure()]
    text = "\n\n".join("\n".join(part) for part in parts)
    print(text)
    save("bench", text)
    if options.readme:
        keep("bench", text)
    return 0


if __name__ == "__main__":
    sys.exit(status_of(main))
