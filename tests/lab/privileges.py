"""Capabilities of kvmtrace's processes in a machine, as /proc shows them."""

from __future__ import annotations

import json
import time

from kvmtrace.linux import privileges
from tests.lab.harness import PATIENCE, Line
from tests.lab.machine import Machine

# Lists the capability sets of every thread of every kvmtrace process.
_LIST_THREADS = r"""
import json, os, re
found = []
for pid in filter(str.isdecimal, os.listdir("/proc")):
    try:
        cmdline = open(f"/proc/{pid}/cmdline", "rb").read()
        if int(pid) == os.getpid() or b"kvmtrace" not in cmdline:
            continue
        for tid in os.listdir(f"/proc/{pid}/task"):
            status = open(f"/proc/{pid}/task/{tid}/status").read()
            sets = dict(re.findall(r"^(Cap\w+|NoNewPrivs):\s*(\w+)$", status, re.M))
            sets = {name: int(value, 16) for name, value in sets.items()}
            found.append({"worker": b"kvmtrace.linux.proc_worker" in cmdline, **sets})
    except OSError:
        continue
print(json.dumps(found))
"""


def _bits(names: frozenset[str]) -> int:
    return sum(1 << privileges._NAMES.index(name) for name in names)


def assert_given_up(machine: Machine) -> None:
    """Fail unless each running kvmtrace and its workers have only the capabilities they need.

    This waits for workers, which drop theirs some time after their start.
    """
    deadline = time.monotonic() + PATIENCE
    while True:
        text = machine.run(["python3", "-c", _LIST_THREADS], check=True).stdout
        threads: list[Line] = json.loads(text)
        more = [thread for thread in threads if not _has_given_up(thread)]
        if not more and {thread["worker"] for thread in threads} == {False, True}:
            return
        assert all(thread["worker"] for thread in more), more
        assert time.monotonic() < deadline, threads
        time.sleep(0.5)


def _has_given_up(thread: Line) -> bool:
    watching = _bits(privileges.WATCHING)
    kept = _bits(privileges.READING) if thread["worker"] else watching
    # A worker inherits its command's bounding set, and may not be allowed to change it.
    return bool(
        thread["CapEff"] == thread["CapPrm"] == kept
        and thread["CapBnd"] & ~watching == thread["CapInh"] == thread["CapAmb"] == 0
        and thread["NoNewPrivs"] == 1
    )
