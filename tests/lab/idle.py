"""What a quiet host costs a serve: ``python -m tests.lab.idle`` (part of make bench).

No kernel is needed but this one: 1,000 processes hold 100 descriptors each, one of them a VM where
/dev/kvm is to be had, and a serve looks at them as both sources do, once a second, while nothing
happens. Its workers' CPU time counts.
"""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

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
def _vms() -> Iterator[list[int]]:
    process = subprocess.Popen(
        [sys.executable, "-c", _VMS, str(VMS), str(DESCRIPTORS)],
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


@contextlib.contextmanager
def _serve(pids: list[int]) -> Iterator[int]:
    with tempfile.TemporaryDirectory() as own:
        process = subprocess.Popen(
            [sys.executable, "-c", _SERVE, ",".join(map(str, pids)), "serve", "--listen", "0"],
            stderr=subprocess.PIPE,
            text=True,
            cwd=Path(__file__).parents[2],
            env={**os.environ, "KVMTRACE_RUNTIME_DIR": own},
        )
        try:
            assert process.stderr is not None
            process.stderr.readline()  # serving …
            yield process.pid
        finally:
            process.send_signal(signal.SIGTERM)
            process.communicate(timeout=20)


def _cpu_seconds(pid: int) -> float:
    """Of a process and its children."""
    spent = 0.0
    for entry in Path("/proc").iterdir():
        with contextlib.suppress(OSError):
            if entry.name.isdecimal():
                fields = (entry / "stat").read_text().rpartition(")")[2].split()
                if pid in (int(entry.name), int(fields[1])):
                    spent += (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")
    return spent


def measure() -> list[str]:
    """The share of a CPU, after all processes were looked at."""
    with _vms() as pids, _serve(pids) as serve:
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
