"""A quiet second of the table of VMs: real processes, and real VMs where /dev/kvm can be used."""

from __future__ import annotations

import statistics
import time

from kvmtrace.linux.proc_reader import READER
from kvmtrace.sources.vm_table import VmTable
from tests.lab.bench_idle import made_vms

VMS, DESCRIPTORS = 1000, 200
ROUNDS = 30
SECOND = 1_000_000_000


def measure() -> list[str]:
    """Measure CPU milliseconds of ``VmTable.reap``, its workers' included."""
    with made_vms(VMS, DESCRIPTORS) as pids:
        table, now = VmTable(), time.time_ns()
        began = time.process_time()
        known = len(table.scan(now))
        scanned = time.process_time() - began
        for number, pid in enumerate(pids if known < len(pids) else ()):
            table.key((number + 1) << 12, pid, now)
        costs = []
        for number in range(200):  # every process is searched once: not a quiet second yet
            before = _cpu()
            table.reap(now + number * SECOND)
            costs.append(_cpu() - before)
    READER.close()
    quiet, minute = costs[-ROUNDS:], costs[:60]
    kind = "VMs" if known else "processes (no /dev/kvm)"
    return [
        f"{VMS:,} {kind} of {DESCRIPTORS} descriptors each, of which nothing is reported: "
        f"{1e3 * scanned:.0f} ms to find them, then {1e3 * statistics.median(quiet):.1f} ms of CPU "
        f"a second, and {1e3 * statistics.mean(minute):.1f} ms in the first minute."
    ]


def _cpu() -> float:
    """CPU time of this process and the workers that read /proc."""
    spent = 0
    for worker in READER._idle:
        with open(f"/proc/{worker.process.pid}/schedstat") as file:
            spent += int(file.read().split()[0])
    return time.process_time() + spent / 1e9
