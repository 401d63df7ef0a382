"""A scenario for all views: three VMs, four poisons, a storm of conversions, some events lost.

It is made of events that pass through the real correlator, so it is consistent.
"""

from __future__ import annotations

import dataclasses

from kvmtrace import kvm
from kvmtrace.correlate import Correlator
from kvmtrace.events import Exit, GmemPage, Host, Lost, Owner, Poison, Sigbus, VmSeen
from kvmtrace.model import HistoryState, Snapshot
from kvmtrace.probes import Probe, ProbeRuns

START = 1_795_000_000_000_000_000  # ns since the epoch
SECOND = 1_000_000_000
LOOPS = 200_000
CONVERSIONS = 40

_HOST = Host("host1", "6.18.0-test", "bpf", "bpf works here", 0)
_PROBES = (
    Probe("run", True, "kvm_arch_vcpu_ioctl_run", "fexit"),
    Probe("gmem", True, "kvm_gmem_get_pfn", "fexit"),
    Probe("mce", False, why="tracepoint mce:mce_record is not there"),
)
_HISTORY = HistoryState(
    "/var/lib/kvmtrace/history.sqlite",
    is_written=True,
    size=65_536,
    oldest_ns=START,
    last_write_ns=START,
    written=3,
    waiting=0,
    dropped={"no_room": 0, "unwritable": 0},
    deleted={"age": 0, "size": 0},
    errors=0,
)


class Scenario:
    """A session for views: ``snapshot()`` shows the events fed by ``begin`` and ``happen``."""

    def __init__(self) -> None:
        self._correlator = Correlator()
        self._host = _HOST
        self._history = _HISTORY
        self._runs: dict[str, ProbeRuns] = {}

    def snapshot(self) -> Snapshot:
        """The current model, completed as ``Session`` does it."""
        return dataclasses.replace(
            self._correlator.snapshot(),
            host=self._host,
            probes=_PROBES,
            probe_runs=self._runs,
            history=self._history,
        )

    def begin(self) -> Scenario:
        """Three VMs start, without any events yet."""
        for event in (
            VmSeen(START, 1, 101, "web", "5b2f6a5e-0000-4000-8000-000000000001", "qemu"),
            VmSeen(START, 2, 102, "db", None, "cloud-hypervisor"),
            VmSeen(START, 3, 103),
        ):
            self._correlator.feed(event)
        self._runs = {"run": ProbeRuns(1000, 200_000), "gmem": ProbeRuns(10, 5_000)}
        return self

    def happen(self) -> Scenario:
        """Four pages are poisoned, one VM loops on its page, another converts memory.

        Then: web holds 1 page and has LOOPS exits EHWPOISON (looping, notified after 0.25 s); db
        holds 2, one latent, for the other it got a SIGBUS AO at once (delivered); the third VM has
        CONVERSIONS conversions; a poisoned page of the kernel stays in use; 7 events were lost,
        and 4 were not kept in the history.
        """
        ts = START + 10 * SECOND
        for event in (
            Poison(
                ts,
                0xABC123,
                "guest_memfd page",
                "Recovered",
                tid=900,
                gmem=GmemPage(1, 5, (Owner(1, 0x105),)),
            ),
            Exit(
                ts + SECOND // 4,
                1,
                0,
                kvm.EHWPOISON,
                kvm.EXIT_MEMORY_FAULT,
                True,
                flags=0,
                gpa=0x105000,
                size=4096,
                gfn=0x105,
                count=LOOPS,
            ),
            Poison(
                ts,
                0xABC124,
                "guest_memfd page",
                "Recovered",
                tid=901,
                gmem=GmemPage(2, 6, (Owner(2, 0x206),)),
            ),
            Sigbus(ts, 102, 112, kvm.BUS_MCEERR_AO, 0x7F00_0000_1000, sender=902, vm=2),
            Poison(ts, 0xABC125, "dirty LRU page", "Recovered", tid=902),
            Exit(
                ts,
                3,
                1,
                kvm.EFAULT,
                kvm.EXIT_MEMORY_FAULT,
                True,
                flags=8,
                gpa=0x300000,
                size=4096,
                gfn=0x300,
                gmem=0,
                count=CONVERSIONS,
            ),
            Poison(ts, 0x40272D, "reserved kernel page", "Ignored", tid=903),
            Lost(ts, "ring", 7),
        ):
            self._correlator.feed(event)
        self._host = dataclasses.replace(_HOST, hardware_corrupted_bytes=8192)
        dropped = {"no_room": 0, "unwritable": 4}
        self._history = dataclasses.replace(_HISTORY, written=9, dropped=dropped)
        self._runs = {"run": ProbeRuns(201_040, 40_208_000), "gmem": ProbeRuns(60, 30_000)}
        return self
