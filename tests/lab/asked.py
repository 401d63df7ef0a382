"""What those who ask a serve cost its reader: ``python -m tests.lab.asked`` (part of make bench).

No kernel is needed: a serve whose source always has events, in a process of its own, and beside it
32 scrapers and 16 health checkers that ask once a second each, in windows with and without them.
What is compared is events per second of CPU of the serve: it is busy with one CPU at most, however
many threads it has, and what else the machine does takes nothing from that.
"""

from __future__ import annotations

import contextlib
import os
import re
import signal
import socket
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterator
from pathlib import Path

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


@contextlib.contextmanager
def _serving(counted: str) -> Iterator[tuple[int, int]]:
    """A serve that is as busy as it can be; its pid and port."""
    arguments = [str(VMS), str(BATCH), counted, "serve", "--listen", "127.0.0.1:0"]
    with tempfile.TemporaryDirectory() as own:
        process = subprocess.Popen(
            [sys.executable, "-c", _SERVE, *arguments],
            stderr=subprocess.PIPE,
            text=True,
            cwd=Path(__file__).parents[2],
            env={**os.environ, "KVMTRACE_RUNTIME_DIR": own},
        )
        try:
            assert process.stderr is not None
            found = re.search(r":(\d+)/metrics", process.stderr.readline())
            assert found
            yield process.pid, int(found[1])
        finally:
            process.send_signal(signal.SIGTERM)
            process.communicate(timeout=20)


def ask(port: int) -> None:
    """Ask once a second, 48 at a time, for as long as stdin is open (a process of its own)."""
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
def _asking(port: int) -> Iterator[None]:
    process = subprocess.Popen(
        [sys.executable, "-m", "tests.lab.asked", str(port)],
        stdin=subprocess.PIPE,
        cwd=Path(__file__).parents[2],
    )
    try:
        time.sleep(1)  # they come one after the other, within a second
        yield
    finally:
        process.communicate(timeout=60)


def measure(windows: int) -> list[str]:
    """Events that the reader takes in per second of CPU, alone and asked."""
    rates: dict[str, list[float]] = {"alone": [], "asked": []}
    with tempfile.NamedTemporaryFile() as counted, _serving(counted.name) as (pid, port):

        def so_far() -> tuple[int, float]:
            counted.seek(0)
            events = int(counted.read() or 0)
            fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
            return events, (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")

        def rate() -> float:
            before, began = so_far()
            time.sleep(WINDOW)
            after, ended = so_far()
            return (after - before) / (ended - began)

        time.sleep(1)
        for number in range(windows):
            rates["alone"].append(rate())
            with _asking(port):
                rates["asked"].append(rate())
            print_status(
                f"bench: asked: window {number + 1} of {windows}: "
                f"{rates['alone'][-1]:,.0f} events, {rates['asked'][-1]:,.0f} while asked"
            )
    alone, asked = (statistics.median(rates[name]) for name in ("alone", "asked"))
    return [
        f"| a serve with {VMS} VMs | events per second of CPU (median) | ratio |",
        "|---|---|---|",
        f"| nobody asks | {alone:,.0f} | 1.00 |",
        f"| {SCRAPERS} scrapers and {CHECKERS} health checkers, once a second each "
        f"| {asked:,.0f} | {asked / alone:.2f} |",
    ]


if __name__ == "__main__":
    if len(sys.argv) == 2:
        ask(int(sys.argv[1]))
    else:
        print("\n".join(measure(8)))
