"""Cost of an ordinary exit by way of watching: ``python -m tests.lab.bench_exits`` (in make bench).

Two measures. Instructions that an exit executes, in a machine whose clock counts them: what else
runs on the host changes nothing. And time, in many windows of some 50 ms of which the tenth
percentile counts: others on the host make most windows slower, by up to a half, even if CPU time is
measured.
"""

from __future__ import annotations

import argparse
import json
import os
import shlex
import signal
import statistics
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager
from pathlib import Path
from typing import Literal

from tests.lab.errors import LabError, status_of
from tests.lab.harness import PATIENCE, Vmm
from tests.lab.machine import DEFAULT, Job, Machine
from tests.lab.progress import print_status

Stream = Literal["stdout", "stderr"]
Way = Callable[[Machine], AbstractContextManager[object]]

NOTHING = "nothing attached"
MINIMAL = Path(__file__).with_name("minimal.py")

# The equivalent of the `run` probe, written by hand.
_BPFTRACE = {
    "bpftrace fexit": "fexit:kvm:kvm_arch_vcpu_ioctl_run /retval < 0/ "
    "{ @[retval, args.vcpu->vcpu_id] = count(); }",
    "bpftrace rawtracepoint": "rawtracepoint:kvm_userspace_exit /(int32)arg1 < 0/ "
    "{ @[(int32)arg1, tid] = count(); }",
    "bpftrace kretprobe": "kretprobe:kvm_arch_vcpu_ioctl_run /(int32)retval < 0/ "
    "{ @[retval] = count(); }",
}
_MINIMAL = {
    "raw tracepoint × 1, leaving at once": "raw_tracepoint 1",
    "raw tracepoint × 3": "raw_tracepoint 3",
    "trace event × 1 (perf's)": "tracepoint 1",
    "fexit × 1": "fexit 1",
    "fexit × 3": "fexit 3",
    "perf stat of kvm:*": "perf 0",
}

_SETTLING_SECONDS = 30.0  # at most, until a command has done what it does at its start
_SETTLED = 0.15  # of a CPU
_IDLE_SECONDS = 2.0
_WINDOW = 1_250  # exits
_COUNTED = 2_000
_COUNTED_WINDOWS = 9

# Programs that are loaded, once each, however many descriptors they have: {id: (runs, ns)}.
_PROGRAM_RUNS = """
import glob, json
found = {}
for path in glob.glob("/proc/[0-9]*/fdinfo/*"):
    try:
        fields = dict(line.split(":", 1) for line in open(path) if ":" in line)
    except OSError:
        continue
    if "run_cnt" in fields:  # links have a prog_id, too
        found[int(fields["prog_id"])] = (int(fields["run_cnt"]), int(fields["run_time_ns"]))
print(json.dumps(found))
"""


@contextmanager
def running(machine: Machine, command: str, ready: str, stream: Stream) -> Iterator[Job]:
    """Run a program that ends by SIGINT, once it has printed ``ready``."""
    job = machine.start(f"exec {command}")
    try:
        job.wait_for(ready, timeout=PATIENCE, stream=stream)
        yield job
    finally:
        job.signal(signal.SIGINT)
        job.wait(PATIENCE)


@contextmanager
def _nothing(_machine: Machine) -> Iterator[None]:
    yield None


def _kvmtrace(source: str) -> Way:
    command = f"kvmtrace events --json --source {source} >/dev/null"
    return lambda machine: running(machine, command, r"kvmtrace: watching", "stderr")


def _bpftrace(program: str) -> Way:
    return lambda machine: running(machine, f"bpftrace -e '{program}'", r"Attach", "stdout")


def _minimal(arguments: str) -> Way:
    command = f"python3 -c {shlex.quote(MINIMAL.read_text())} {arguments}"
    return lambda machine: running(machine, command, r"attached", "stdout")


def _ways(only: Sequence[str]) -> dict[str, Way]:
    ways: dict[str, Way] = {NOTHING: _nothing}
    ways |= {f"kvmtrace {source}": _kvmtrace(source) for source in ("bpf", "ftrace")}
    ways |= {name: _bpftrace(program) for name, program in _BPFTRACE.items()}
    ways |= {name: _minimal(arguments) for name, arguments in _MINIMAL.items()}
    return {
        name: way
        for name, way in ways.items()
        if not only or name == NOTHING or any(part in name for part in only)
    }


def _entered(stack: ExitStack, way: Way, machine: Machine) -> bool:
    """Whether this kernel, or what is installed there, has that way of watching."""
    try:
        stack.enter_context(way(machine))
    except LabError as error:
        print_status(f"bench: {error}")
        return False
    return True


def _cpu_ns(machine: Machine) -> int:
    """CPU time of all threads of the emulator (/proc/PID/task/TID/schedstat)."""
    tasks = Path(f"/proc/{machine.emulator.process.pid}/task")
    return sum(int((tasks / tid / "schedstat").read_text().split()[0]) for tid in os.listdir(tasks))


def _cpus_used(machine: Machine) -> float:
    began, before = time.monotonic(), _cpu_ns(machine)
    time.sleep(_IDLE_SECONDS)
    return (_cpu_ns(machine) - before) / (time.monotonic() - began) / 1e9


def _ns_an_exit(machine: Machine, vmm: Vmm, exits: int) -> list[float]:
    deadline = time.monotonic() + _SETTLING_SECONDS
    while _cpus_used(machine) > _SETTLED and time.monotonic() < deadline:
        pass
    windows = range(exits // _WINDOW)
    return [vmm.step(f"pio v {_WINDOW}", patience=PATIENCE)["ns"] / _WINDOW for _ in windows]


def _low(values: Sequence[float]) -> float:
    return statistics.quantiles(values, n=10)[0]


def _vmm(machine: Machine, exits: int) -> Vmm:
    vmm = Vmm(machine, "bench")
    vmm.step("create v backing=anon")
    vmm.step(f"pio v {exits}")  # warm
    return vmm


def overhead(machine: Machine, exits: int, rounds: int, only: Sequence[str] = ()) -> list[str]:
    """Measure the time of an exit by way of watching, with the ratio to nothing.

    ``only``: parts of the names of what is measured beside nothing attached.
    """
    ways = _ways(only)
    spent: dict[str, list[float]] = {name: [] for name in ways}
    vmm = _vmm(machine, exits)
    for number in range(rounds):
        for name, way in ways.items():
            with ExitStack() as stack:
                if not _entered(stack, way, machine):
                    continue
                # What is attached changes code, which the emulator translates anew.
                vmm.step(f"pio v {exits // 4}", patience=10 * PATIENCE)
                found = _ns_an_exit(machine, vmm, exits)
            spent[name] += found
            print_status(
                f"bench: round {number + 1} of {rounds}: {name}: {_low(found):,.0f} ns an exit, "
                f"median {statistics.median(found):,.0f}"
            )
    vmm.end()
    base = _low(spent[NOTHING])
    rows = ["| watching by | KVM_RUN exits/s (fastest tenth of the windows) | ratio | ns more |"]
    rows += ["|---|---|---|---|"]
    for name, values in spent.items():
        if not values:
            rows.append(f"| {name} | not on this kernel | | |")
            continue
        one = _low(values)
        rows.append(f"| {name} | {1e9 / one:,.0f} | {base / one:.3f} | {one - base:+,.0f} |")
    return rows


def instructions(machine: Machine, only: Sequence[str] = ()) -> list[str]:
    """Count an exit's instructions by way of watching, in a machine of ``counting``.

    Programs and what they execute are from the kernel's own account (bpf_stats), whose clock they
    include.
    """
    rows = ["| watching by | instructions an exit | ratio | programs run | their instructions |"]
    rows += ["|---|---|---|---|---|"]
    vmm = _vmm(machine, _COUNTED)
    # An exit takes 144 instructions more on the other CPU, whatever is attached.
    machine.run(f"taskset -a -p -c 0 {vmm.pid}", check=True)
    base = 0.0
    for name, way in _ways(only).items():
        with ExitStack() as stack:
            if not _entered(stack, way, machine):
                rows.append(f"| {name} | not on this kernel | | | |")
                continue
            # The other CPU counts as well: let commands do what they do at their start.
            machine.run(["sleep", str(_SETTLING_SECONDS)], check=True)
            vmm.step(f"pio v {_COUNTED}", patience=PATIENCE)
            windows = [
                vmm.step(f"pio v {_COUNTED}", patience=PATIENCE)["ns"] / _COUNTED
                for _ in range(_COUNTED_WINDOWS)
            ]
            runs, spent = _programs_of_an_exit(machine, vmm)
        one = statistics.median(windows)
        base = base or one
        programs = f"{runs:.2f} | {spent:,.0f}" if round(runs, 2) else " | "
        rows.append(f"| {name} | {one:,.0f} | {base / one:.3f} | {programs} |")
        print_status(f"bench: {rows[-1]}")
    vmm.end()
    return rows


def _programs_of_an_exit(machine: Machine, vmm: Vmm) -> tuple[float, float]:
    machine.run("sysctl -q kernel.bpf_stats_enabled=1", check=True)
    before = _program_runs(machine)
    vmm.step(f"pio v {_COUNTED}", patience=PATIENCE)
    after = _program_runs(machine)
    machine.run("sysctl -q kernel.bpf_stats_enabled=0", check=True)
    both = [(before[key], after[key]) for key in before if key in after]
    runs = sum(new[0] - old[0] for old, new in both)
    return runs / _COUNTED, sum(new[1] - old[1] for old, new in both) / _COUNTED


def _program_runs(machine: Machine) -> dict[str, tuple[int, int]]:
    answer = machine.run(["python3", "-c", _PROGRAM_RUNS], check=True).stdout
    return {key: (runs, ns) for key, (runs, ns) in json.loads(answer).items()}


def main() -> int:
    """Measure on one kernel."""
    parser = argparse.ArgumentParser(prog="python -m tests.lab.bench_exits", description=__doc__)
    parser.add_argument("--kernel", default=DEFAULT)
    parser.add_argument("--exits", type=int, default=25_000)
    parser.add_argument("--rounds", type=int, default=5, help="0: only instructions")
    parser.add_argument("--only", action="append", default=[], help="part of a way's name")
    options = parser.parse_args()
    with Machine.boot(options.kernel, counting=True) as machine:
        print(f"Linux {machine.release}:\n")
        machine.run("kvmtrace compile", timeout=PATIENCE)
        print("\n".join(instructions(machine, options.only)), "\n", flush=True)
    if options.rounds:
        with Machine.boot(options.kernel) as machine:
            machine.run("kvmtrace compile", timeout=PATIENCE)
            print("\n".join(overhead(machine, options.exits, options.rounds, options.only)))
    return 0


if __name__ == "__main__":
    sys.exit(status_of(main))
