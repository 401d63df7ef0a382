"""CPU cost of a serve on a quiet host: ``python -m tests.lab.bench_idle`` (part of make bench).

Needs no lab machine. 1,000 processes hold 100 descriptors each, one of which is a VM where /dev/kvm
exists. While nothing happens, a serve scans these processes once a second, as both sources do. The
CPU time of its workers is included.
"""

from __future__ import annotations

import contextlib
import os
import subprocess
import sys
import time
from collections.abc import Iterator

from tests.lab.bench_serve import cpu_seconds, serving, stat_fields

VMS, DESCRIPTORS = 1000, 100
SETTLED, WINDOW = 90.0, 20.0

_VMS = """
import contextlib, fcntl, os, signal, sys
vms, descriptors = int(sys.argv[1]), int(sys.argv[2])
for _ in range(vms):
    pid = os.fork()
    if not pid:
        with contextlib.suppress(OSError):
            fcntl.ioctl(os.open("/dev/kvm", os.O_RDWR), 0xAE01, 0)  # KVM_CREATE_VM
        while os.eventfd(0) < descriptors:
            pass
        signal.pause()
    print(pid, flush=True)
print("all", flush=True)
sys.stdin.read()
os.killpg(0, signal.SIGKILL)
"""

_SERVE = """
import sys, time
from kvmtrace import cli, sources
from kvmtrace.linux import clock
from kvmtrace.sources.vm_table import VmTable
from tests.unit.fake import FakeSource
pids = [int(pid) for pid in sys.argv.pop(1).split(",")]

class Quiet(FakeSource):
    table, due = VmTable(), 0.0

    def poll(self, timeout):
        now = clock.now_ns()
        if not self.due:
            self.due = time.monotonic()
            known = len(self.table.scan(now))
            rest = pids if not known else []
            return [self.table.key(pid << 12, pid, now)[1][0] for pid in rest]
        time.sleep(timeout)
        if time.monotonic() < self.due:
            return []
        self.due += 1
        return self.table.reap(now)

sources.open_source = lambda kind: Quiet()
cli.main()
"""


@contextlib.contextmanager
def made_vms(vms: int, descriptors: int) -> Iterator[list[int]]:
    """Run so many processes with so many descriptors each: their pids."""
    process = subprocess.Popen(
        [sys.executable, "-c", _VMS, str(vms), str(descriptors)],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
        start_new_session=True,
    )
    assert process.stdout is not None
    try:
        yield [int(line) for line in iter(process.stdout.readline, "all\n")]
    finally:
        process.communicate()


def _cpu_seconds(parent: int) -> float:
    """CPU time of a process and its children."""
    spent = 0.0
    for pid in (int(name) for name in os.listdir("/proc") if name.isdecimal()):
        with contextlib.suppress(OSError):
            if parent in (pid, int(stat_fields(pid)[1])):
                spent += cpu_seconds(pid)
    return spent


def measure() -> list[str]:
    """Measure the share of a CPU, once every process has been scanned."""
    with (
        made_vms(VMS, DESCRIPTORS) as pids,
        serving(_SERVE, ",".join(map(str, pids))) as (serve, _),
    ):
        time.sleep(SETTLED)
        before = _cpu_seconds(serve)
        began = time.monotonic()
        time.sleep(WINDOW)
        share = (_cpu_seconds(serve) - before) / (time.monotonic() - began)
    return [
        f"A serve of a quiet host with {VMS:,} VMs of {DESCRIPTORS} descriptors each: "
        f"{share:.1%} of a CPU."
    ]


if __name__ == "__main__":
    print("\n".join(measure()))
