"""Cost of HTTP requests to a serve: ``python -m tests.lab.bench_scrapes`` (part of make bench).

Needs no lab machine. The source of the serve always has events. 32 scrapers and 16 health checkers
make a request once a second each, in windows with and without them. The windows are compared by
events per second of the serve's CPU time: it uses one CPU at most, however many threads it has, and
other load on the machine does not change that number.
"""

from __future__ import annotations

import contextlib
import socket
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterator
from pathlib import Path

from tests.lab.bench_serve import cpu_seconds, serving
from tests.lab.progress import print_status

SCRAPERS, CHECKERS = 32, 16
VMS = 200
WINDOW = 4.0
BATCH = 1000

_SERVE = """
import os, sys, time
from kvmtrace import cli, sources
from kvmtrace.events import Exit, Poison, VmSeen
from tests.unit.fake import FakeSource
vms, batch = int(sys.argv.pop(1)), int(sys.argv.pop(1))
counted = os.open(sys.argv.pop(1), os.O_RDWR)
now = time.time_ns()

class Busy(FakeSource):
    number = 0

    def poll(self, timeout):
        if self._batches:
            return super().poll(timeout)
        self.number += batch
        os.pwrite(counted, b"%016d" % self.number, 0)
        return [exits[(self.number + i) % vms] for i in range(batch)]

exits = [
    Exit(now, vm, 0, 133, 39, True, vm, flags=0, gpa=vm << 12, size=4096, gfn=vm, gmem=133)
    for vm in range(vms)
]
first = [VmSeen(now, vm, 1000 + vm, f"vm-{vm}", None, "qemu") for vm in range(vms)]
first += [Poison(now, vm, "dirty LRU page", "Failed", 11, 2, tid=vm) for vm in range(vms)]
sources.open_source = lambda kind: Busy(first)
cli.main()
"""


def make_requests(port: int) -> None:
    """Make 48 requests a second until stdin is closed (run in a process of its own)."""
    stop = threading.Event()

    def one(number: int, path: str) -> None:
        stop.wait(number / (SCRAPERS + CHECKERS))
        while not stop.is_set():
            with socket.create_connection(("127.0.0.1", port), timeout=20) as client:
                client.sendall(f"GET {path} HTTP/1.0\r\n\r\n".encode())
                while client.recv(1 << 16):
                    pass
            stop.wait(1)

    paths = ["/metrics"] * SCRAPERS + ["/-/healthy"] * CHECKERS
    threads = [threading.Thread(target=one, args=pair) for pair in enumerate(paths)]
    for thread in threads:
        thread.start()
    sys.stdin.read()
    stop.set()


@contextlib.contextmanager
def _requests(port: int) -> Iterator[None]:
    process = subprocess.Popen(
        [sys.executable, "-m", "tests.lab.bench_scrapes", str(port)],
        stdin=subprocess.PIPE,
        cwd=Path(__file__).parents[2],
    )
    try:
        time.sleep(1)  # they start one after the other, within a second
        yield
    finally:
        process.communicate(timeout=60)


def measure(windows: int) -> list[str]:
    """Measure the events per second of CPU that it takes in, with and without requests."""
    rates: dict[str, list[float]] = {"alone": [], "scraped": []}
    with (
        tempfile.NamedTemporaryFile() as counted,
        serving(_SERVE, str(VMS), str(BATCH), counted.name) as (pid, port),
    ):

        def so_far() -> tuple[int, float]:
            counted.seek(0)
            return int(counted.read() or 0), cpu_seconds(pid)

        def rate() -> float:
            before, began = so_far()
            time.sleep(WINDOW)
            after, ended = so_far()
            return (after - before) / (ended - began)

        time.sleep(1)
        for number in range(windows):
            rates["alone"].append(rate())
            with _requests(port):
                rates["scraped"].append(rate())
            print_status(
                f"bench: requests: window {number + 1} of {windows}: "
                f"{rates['alone'][-1]:,.0f} events, {rates['scraped'][-1]:,.0f} with requests"
            )
    alone, scraped = (statistics.median(rates[name]) for name in ("alone", "scraped"))
    return [
        f"| a serve with {VMS} VMs | events per second of CPU (median) | ratio |",
        "|---|---|---|",
        f"| no requests | {alone:,.0f} | 1.00 |",
        f"| {SCRAPERS} scrapers and {CHECKERS} health checkers, once a second each "
        f"| {scraped:,.0f} | {scraped / alone:.2f} |",
    ]


if __name__ == "__main__":
    if len(sys.argv) == 2:
        make_requests(int(sys.argv[1]))
    else:
        print("\n".join(measure(8)))
