"""A user without privilege who may open /dev/kvm does what they can against the reader."""

from __future__ import annotations

import json
import re
import shlex
import signal
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from tests.lab.harness import PATIENCE, Line, Vmm, Watch
from tests.lab.machine import Job, Machine

pytestmark = pytest.mark.lab

WEDGE = Path(__file__).parent / "vmm/wedge.py"
NOBODY = "setpriv --reuid 65534 --regid 65534 --clear-groups"

# A VM's process that maps files whose names some readers take for lines of /proc/PID/maps.
EVIL_NAMES = r"""
import ctypes, fcntl, mmap, os, signal
fcntl.ioctl(os.open("/dev/kvm", os.O_RDWR), 0xAE01, 0)
libc, kept = ctypes.CDLL(None), []
for name in (b"a\rb", b"a\x0bb", b"a\x0cb", b"a\x1cb", b"a\xc2\x85b", b"a\xe2\x80\xa8b", b"\xff",
             b"x\r0-7ffffffff000 rw-s 00000000 00:01 369 y"):
    fd = libc.memfd_create(name, 0)
    os.ftruncate(fd, 4096)
    kept.append(mmap.mmap(fd, 4096))
    kept[-1][0] = 1
print(f"mapped {os.getpid()}", flush=True)
signal.pause()
"""


@pytest.fixture
def hostile(machine: Machine) -> Iterator[Callable[[str], int]]:
    """Start a program as nobody; return its pid once it is ready."""
    machine.run(
        "modprobe -q fuse; chmod 666 /dev/fuse /dev/kvm && mkdir -m 777 -p /tmp/wedge", check=True
    )

    def start(program: str) -> int:
        job = machine.start(f"exec {NOBODY} python3 -c {shlex.quote(program)} /tmp/wedge")
        job.wait_for(r"(wedged|mapped) \d+", timeout=PATIENCE)
        started.append(job)
        return int(job.stdout.split()[1])

    started: list[Job] = []
    yield start
    for job in started:
        job.signal(signal.SIGKILL)
        job.wait(PATIENCE)


def owned_and_notified(pid: int) -> Callable[[list[Line]], bool]:
    """For Watch.until: the process owns a poisoned page and got a signal for it."""

    def seen(lines: list[Line]) -> bool:
        owners = [owner for x in lines for owner in x.get("owners", ())]
        owners += [x for x in lines if x["kind"] == "owner"]
        signals = [x for x in lines if x["kind"] == "sigbus" and x["vm"]["pid"] == pid]
        return bool(signals) and any(owner["vm"]["pid"] == pid for owner in owners)

    return seen


@pytest.mark.parametrize("source", ["bpf", "ftrace"])
def test_nobody_can_blind_it(machine: Machine, hostile: Callable[[str], int], source: str) -> None:
    """A VM's poison is reported while tenants block reads of /proc and choose odd file names."""
    victim = Vmm(machine, "victim")
    victim.step("create v backing=anon pages=64")
    victim.step("touch v +3")
    watch = Watch(machine, source)
    wedged, evil = hostile(WEDGE.read_text()), hostile(EVIL_NAMES)
    look = f"while timeout -s KILL 3 cat /proc/{wedged}/cmdline; do sleep 0.1; done >/dev/null"
    machine.run(look, check=True, timeout=PATIENCE)  # until that hangs

    victim.step("poison v +3 how=inject")
    victim.step("touch v +3", may_fail=True)
    lines = watch.until(owned_and_notified(victim.pid), "the poison's owner and signal")
    assert {x["vm"]["pid"] for x in lines if x["kind"] == "vm"} >= {wedged, evil}
    owners = [owner for x in lines for owner in x.get("owners", ())]
    owners += [x for x in lines if x["kind"] == "owner"]
    assert {owner["vm"]["pid"] for owner in owners} == {victim.pid}
    assert watch.end()  # by SIGINT, status 0
    victim.end()


def test_started_beside_one_that_holds_its_memory_map(
    machine: Machine, hostile: Callable[[str], int]
) -> None:
    wedged = hostile(WEDGE.read_text())
    other = Vmm(machine, "other")
    other.step("create v backing=anon pages=64")
    shown = machine.run(
        "kvmtrace top --once --json --source ftrace", timeout=PATIENCE, check=True
    ).stdout
    vms = {vm["pid"]: vm for vm in json.loads(shown)["vms"]}
    assert "did not answer in time" in vms[wedged]["unread"]
    assert re.match("python3", vms[wedged]["name"])
    assert vms[other.pid]["name"] == "other"
    other.end()
