"""Everything attached to a machine's kernel for tracing, as the kernel lists it."""

from __future__ import annotations

import json
import time

from tests.lab.harness import PATIENCE
from tests.lab.machine import Machine

# As bpftool does: BPF_*_GET_NEXT_ID walks the ids of all BPF objects, of any process.
_LIST_ATTACHED = """
import ctypes, glob, json, os, platform, struct
libc = ctypes.CDLL(None, use_errno=True)
number = {"x86_64": 321, "aarch64": 280}[platform.machine()]
def ids(command):
    found, last = [], 0
    while True:
        attr = ctypes.create_string_buffer(struct.pack("III", last, 0, 0) + bytes(52))
        if libc.syscall(number, command, attr, 64) < 0:
            return found
        last = struct.unpack_from("I", attr, 4)[0]
        found.append(last)
def listed(path):
    return os.listdir(path) if os.path.isdir(path) else []
def lines(path):
    try:
        return [line.strip() for line in open(path) if not line.startswith("\\t")]
    except OSError:
        return []
tracing = "/sys/kernel/tracing"
print(json.dumps({
    "programs": ids(11), "maps": ids(12), "links": ids(31),
    "functions": lines(f"{tracing}/enabled_functions"),
    "kprobes": lines("/sys/kernel/debug/kprobes/list"),
    "dynamic events": lines(f"{tracing}/dynamic_events"),
    "instances": listed(f"{tracing}/instances"),
    "pinned": glob.glob("/sys/fs/bpf/*"),
}))
"""

Attached = dict[str, list[object]]


def attached(machine: Machine) -> Attached:
    """List BPF objects, traced functions, kprobes, and tracefs events and instances."""
    found = json.loads(machine.run(["python3", "-c", _LIST_ATTACHED], check=True).stdout)
    return {what: list(listed) for what, listed in found.items()}


def attached_probes(machine: Machine) -> Attached:
    """As ``attached``, without programs and maps: lookup programs are loaded on first use and are
    attached to nothing.
    """
    found = attached(machine)
    return {what: found[what] for what in found if what not in ("programs", "maps")}


def assert_only(machine: Machine, before: Attached) -> None:
    """Wait until only ``before`` is attached. The kernel frees BPF objects after a delay."""
    deadline = time.monotonic() + PATIENCE
    while (now := attached(machine)) != before:
        if time.monotonic() > deadline:
            left = {what: now[what] for what in now if now[what] != before[what]}
            raise AssertionError(f"left behind: {left}; before: {before}")
        time.sleep(0.5)
