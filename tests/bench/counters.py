"""Counters of the eBPF programs read from maps of this kernel, by number of rows."""

from __future__ import annotations

import ctypes
import os
import unittest.mock
from typing import Any

from kvmtrace.sources.bpf import kernel_map, system_call
from kvmtrace.sources.bpf.compiler import MapDefinition
from kvmtrace.sources.bpf.exits import ExitCount, ExitKeyRecord
from kvmtrace.sources.bpf.kernel_map import KernelMap
from tests.bench.timing import best, table

ROOM = 16_384
SIZES = (10, 1000, 4096, ROOM)


def measure() -> list[str]:
    """Measure CPU milliseconds of reading all rows, by batch and one by one."""
    key, value = ctypes.sizeof(ExitKeyRecord), ctypes.sizeof(ExitCount)
    try:
        made = KernelMap("bench", MapDefinition(1, key, value, ROOM, 0))
    except OSError as error:
        return [f"Counters read from the kernel: not measured ({os.strerror(error.errno or 0)})."]
    rows, filled = [], 0
    try:
        for size in SIZES:
            for number in range(filled, size):
                row = bytes(ExitKeyRecord(kvm=number >> 4, vcpu=number & 15, gpa=number << 12))
                made.update(row, bytes(ExitCount(total=1)))
            filled = size
            made._batches = True
            batch = best(lambda: list(made.rows()))
            calls = _calls(made)
            made._batches = False
            single = best(lambda: list(made.rows()), 3)
            rows.append(
                (
                    f"{size:,}",
                    f"{1e3 * batch:.2f}",
                    str(calls),
                    f"{1e3 * single:.2f}",
                    f"{_calls(made):,}",
                )
            )
    finally:
        made.close()
    head = ("counters", "by batch, ms", "system calls", "one by one, ms", "system calls")
    return table(head, rows)


def _calls(made: KernelMap) -> int:
    """Count the system calls that read the map once."""
    calls = 0

    def counting(*arguments: Any) -> int:
        nonlocal calls
        calls += 1
        return system_call.bpf(*arguments)

    with unittest.mock.patch.object(kernel_map, "bpf", counting):
        list(made.rows())
    return calls
