"""Ordinary exits of a VM on this machine: with nothing attached, with programs, with kvmtrace's.

Needs root, /dev/kvm, a C compiler (for the lab's VMM) and a kernel that lets programs be attached
to raw tracepoints; kvmtrace's own program also needs bcc, or to be compiled already. What is
measured is CPU time of the vCPU's thread: the guest's, KVM's, and that of the programs.
"""

from __future__ import annotations

import contextlib
import ctypes
import json
import os
import platform
import statistics
import subprocess
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any

from kvmtrace.errors import KvmtraceError
from kvmtrace.sources.bpf.loader import Loader
from kvmtrace.sources.bpf.programs import Programs, counts_in
from kvmtrace.sources.bpf.system_call import bpf
from tests.lab import minimal

EXITS, ROUNDS = 20_000, 9

VMM = Path(__file__).parents[1] / "lab" / "vmm"
_ARCH = {"x86_64": "amd64", "aarch64": "arm64"}
_ENABLE_STATS = 32  # enum bpf_cmd


class _EnableStats(ctypes.Structure):
    """``type`` 0: run time."""

    _fields_ = (("type", ctypes.c_uint32),)


Attached = Callable[[], AbstractContextManager[list[int]]]
"""Attaches programs for a while; their descriptors."""


@contextlib.contextmanager
def _minimal(way: str, number: int) -> Iterator[list[int]]:
    loader = Loader(minimal.PROGRAMS, {})
    try:
        yield [minimal.attach(loader, way) for _ in range(number)]
    finally:
        loader.close()


@contextlib.contextmanager
def _kvmtrace() -> Iterator[list[int]]:
    programs = Programs()
    try:
        yield programs.run.programs
    finally:
        programs.close()


@contextlib.contextmanager
def _counted() -> Iterator[None]:
    """The kernel counts runs and time of all programs meanwhile (BPF_ENABLE_STATS, Linux 5.8)."""
    descriptor = bpf(_ENABLE_STATS, _EnableStats())
    try:
        yield
    finally:
        os.close(descriptor)


WAYS: dict[str, Attached] = {
    "nothing attached": lambda: contextlib.nullcontext([]),
    "raw tracepoint × 1, leaving at once": lambda: _minimal("raw_tracepoint", 1),
    "raw tracepoint × 3": lambda: _minimal("raw_tracepoint", 3),
    "kvmtrace's `run`": _kvmtrace,
}


class _Vmm:
    """The lab's VMM as a process of this machine, with a VM ``v``."""

    def __init__(self) -> None:
        arch = _ARCH[platform.machine()]
        subprocess.run(["make", "-s", "-C", VMM, f"ARCH={arch}"], check=True)
        self._process = subprocess.Popen(
            [VMM / "build" / arch / "vmm", "--name", "bench"],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )
        created = self._step("create v backing=anon")
        tid = created["vcpus"][0]["tid"]
        self._cpu_time = Path(f"/proc/{self._process.pid}/task/{tid}/schedstat")

    def _step(self, text: str) -> dict[str, Any]:
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        print(text, file=self._process.stdin, flush=True)
        answer: dict[str, Any] = json.loads(self._process.stdout.readline())
        if "error" in answer:
            raise OSError(f"{text}: {answer['error']}")
        return answer

    def ns_an_exit(self) -> float:
        before = self._spent()
        self._step(f"pio v {EXITS}")
        return (self._spent() - before) / EXITS

    def _spent(self) -> int:
        return int(self._cpu_time.read_text().split()[0])

    def end(self) -> None:
        self._process.communicate()


def _run_time(programs: list[int]) -> tuple[int, int]:
    """Runs and nanoseconds so far."""
    found = [counts_in(Path(f"/proc/self/fdinfo/{one}").read_text()) for one in programs]
    return sum(one["run_cnt"] for one in found), sum(one["run_time_ns"] for one in found)


def measure() -> list[str]:
    """Measure each way in each round: ns an exit, ratio to nothing; then by bpf_stats."""
    try:
        vmm = _Vmm()
    except (OSError, KeyError, subprocess.CalledProcessError) as error:
        return [f"Ordinary exits are not measured here: {error}"]
    spent: dict[str, list[float]] = {name: [] for name in WAYS}
    counted: dict[str, tuple[float, float]] = {}
    refused: dict[str, str] = {}
    try:
        vmm.ns_an_exit()  # warm
        for number in range(ROUNDS + 1):
            for name, way in WAYS.items():
                if name in refused:
                    continue
                try:
                    with way() as programs:
                        if number < ROUNDS:
                            spent[name].append(vmm.ns_an_exit())
                        elif programs:
                            with _counted():
                                vmm.ns_an_exit()
                            runs, ns = _run_time(programs)
                            counted[name] = runs / EXITS, ns / EXITS
                except (OSError, KvmtraceError) as error:
                    refused[name] = str(error)
    finally:
        vmm.end()
    base = spent["nothing attached"]
    rows = ["| ordinary exits (PIO), watching by | ns an exit (median) | ratio | programs run "]
    rows[0] += "| their time (bpf_stats), ns |"
    rows += ["|---|---|---|---|---|"]
    for name, values in spent.items():
        if name in refused:
            rows.append(f"| {name} | not here: {refused[name]} | | | |")
            continue
        # Pairs of one round, so that what changes from round to round does not count.
        ratio = statistics.median(a / b for a, b in zip(base, values, strict=True))
        of_programs = ("", "")
        if name in counted:
            of_programs = (f"{counted[name][0]:.2f}", f"{counted[name][1]:.0f}")
        cells = (name, f"{statistics.median(values):,.0f}", f"{ratio:.3f}", *of_programs)
        rows.append(f"| {' | '.join(cells)} |")
    return rows
