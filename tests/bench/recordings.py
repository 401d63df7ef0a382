"""Recordings: an event written, read and replayed."""

from __future__ import annotations

import itertools
import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path

from kvmtrace.events import Event, Exit, Host, HwError, MachineCheck, Tick, VcpuState
from kvmtrace.sources.codec import Decoder
from kvmtrace.sources.recording import Writer
from tests.bench.models import T0, poisons, vms
from tests.bench.timing import best, table

EVENTS = 100_000
REPLAYED = 1_000_000
VMS = 200

HOST = Host("bench", "6.12.0", "bpf", "a benchmark", epoch_offset_ns=0)

_REPLAY = """
import re, resource, sys
from kvmtrace.cli import main
try:
    main()
finally:
    spent = resource.getrusage(resource.RUSAGE_SELF)
    with open("/proc/self/status") as status:
        most = re.search("VmHWM:[^0-9]*([0-9]+)", status.read())
    print(spent.ru_utime + spent.ru_stime, most[1], file=sys.stderr)
"""


def events(count: int) -> Iterator[Event]:
    """Yield what a host with failing memory reports, most of it exits and signals."""
    yield from itertools.islice(itertools.chain(vms(VMS), poisons(100, VMS), _rest()), count)


def _rest() -> Iterator[Event]:
    for number in itertools.count():
        ts, vm = T0 + 1_000_000_000 + 100_000 * number, 1 + number % VMS
        match number % 10:
            case 0:
                yield VcpuState(ts, vm, 4000 + vm, "waiting", 0, 120_000)
            case 1:
                check = MachineCheck(7, 3, 0, 0x9C00004001080090, 0x8C, "GenuineIntel")
                yield HwError(ts, "mce", "corrected", 0x12345000, 0x12345, check=check)
            case 2:
                yield Exit(ts, vm, 1, 14, 39, True, 5000 + vm, flags=8, gpa=number << 12, size=4096)
            case 3:
                yield Tick(ts)
            case 4 | 5:
                yield next(itertools.islice(poisons(100, VMS), 2, 3))
            case _:
                yield Exit(
                    *(ts, vm, 0, 133, 39, True, 4000 + vm),
                    flags=0,
                    gpa=vm << 12,
                    size=4096,
                    gfn=vm,
                    gmem=133,
                )


def write(path: Path, count: int) -> None:
    """Record ``count`` events."""
    with path.open("w") as file:
        writer = Writer(file, HOST, ends=True)
        writer.write(events(count), ())
        writer.end()


def measure() -> list[str]:
    """Measure CPU microseconds of an event, and CPU seconds and memory of a long replay."""
    with tempfile.TemporaryDirectory() as directory:
        path = Path(directory) / "recording"
        rows = [("written", f"{1e6 * best(lambda: write(path, EVENTS), 3) / EVENTS:.1f}")]
        lines = path.read_bytes().splitlines()[1:-1]
        records = [json.loads(line) for line in lines]
        parsed = best(lambda: [json.loads(line) for line in lines], 3)

        def decode() -> None:
            decoder = Decoder()
            for record in records:
                decoder.event(record)

        rows += [
            ("its JSON parsed", f"{1e6 * parsed / len(lines):.1f}"),
            ("then decoded and checked", f"{1e6 * best(decode, 3) / len(lines):.1f}"),
        ]
        write(path, REPLAYED)
        replayed = subprocess.run(
            [sys.executable, "-c", _REPLAY, "replay", str(path)],
            capture_output=True,
            text=True,
            check=True,
            env={**os.environ, "PYTHONDONTWRITEBYTECODE": ""},
        )
        size = path.stat().st_size
    seconds, rss = replayed.stderr.split()[-2:]
    return [
        *table(("an event of a recording", "µs"), rows),
        "",
        f"Replay of {REPLAYED:,} events ({size / 1e6:.0f} MB): {float(seconds):.1f} s of CPU, "
        f"{int(rss) >> 10} MiB at most.",
    ]
