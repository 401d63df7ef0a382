"""Follow up vCPUs that were notified of poison: their threads' states in /proc, some time later."""

from __future__ import annotations

import math
from dataclasses import dataclass

from kvmtrace import kvm
from kvmtrace.bounded import BoundedDict
from kvmtrace.enrich.stage import Stage
from kvmtrace.events import Event, Exit, Sigbus, VcpuState, VmGone
from kvmtrace.linux import task_stat
from kvmtrace.linux.proc_reader import READER, Unreadable
from kvmtrace.linux.read import read_text

_SECOND = 1_000_000_000

# After the last delivery. A VMM that recovers does so within milliseconds; a person takes minutes.
SAMPLES_NS = tuple(int(s * _SECOND) for s in (0.5, 2, 5, 12, 30, 120, 600))
MAX_THREADS = 256

_POLL_SECONDS = 0.25

# ioctl's number by architecture (x86-64; arm64 and riscv64; s390x, ppc64) and KVM_RUN's code,
# which differs on ppc64 (another layout of _IO).
_IOCTL = (16, 29, 54)
_KVM_RUN = (0xAE80, 0x2000AE80)


def _by_its_own_access(event: Sigbus) -> bool:
    """Whether the thread itself accessed the page.

    In KVM_RUN that is a vCPU's access, even if the number of the vCPU is not known.
    """
    return event.code == kvm.BUS_MCEERR_AR and event.sender == event.tid


@dataclass(slots=True)
class _Thread:
    vm: int
    tid: int
    vcpu: int | None
    notified_ns: int
    begun: str | None  # its start time: a reused tid has another
    next: int = 0
    cpu_ns: int | None = None


class VcpuFollowUp(Stage):
    """Adds VcpuState events for the threads of notified vCPUs."""

    def __init__(self, proc: str = "/proc") -> None:
        self._proc = proc
        self._threads: BoundedDict[int, _Thread] = BoundedDict(MAX_THREADS)

    def max_wait(self) -> float:
        """Come back in time for the next sample."""
        return _POLL_SECONDS if self._threads else math.inf

    def process(self, events: list[Event], now: int, *, last: bool = False) -> list[Event]:
        """Follow the vCPUs that events notify, and append the samples that are due."""
        for event in events:
            self._follow(event, now)
        return events + self._sample(now)

    # -- which threads

    def _follow(self, event: Event, now: int) -> None:
        match event:
            case Exit(tid=int(tid)) if event.is_poison:
                self._notified(event.vm, tid, event.vcpu, now)
            case Sigbus(vm=int(vm)) if event.vcpu is not None or _by_its_own_access(event):
                self._notified(vm, event.tid, event.vcpu, now)
            case VmGone():
                gone = [tid for tid, one in self._threads.items() if one.vm == event.vm]
                for tid in gone:
                    del self._threads[tid]

    def _notified(self, vm: int, tid: int, vcpu: int | None, now: int) -> None:
        known = self._threads.get(tid)
        if known is not None and (known.vm, known.vcpu) == (vm, vcpu):
            if known.next or now - known.notified_ns > SAMPLES_NS[0]:
                known.notified_ns, known.next, known.cpu_ns = now, 0, self._cpu_ns(tid)
            return
        begun = self._stat(tid)
        self._threads[tid] = _Thread(
            vm, tid, vcpu, now, begun[1] if begun else None, cpu_ns=self._cpu_ns(tid)
        )

    # -- samples

    def _sample(self, now: int) -> list[Event]:
        found: list[Event] = []
        for one in list(self._threads.values()):
            if now - one.notified_ns < SAMPLES_NS[one.next]:
                continue
            while one.next < len(SAMPLES_NS) and now - one.notified_ns >= SAMPLES_NS[one.next]:
                one.next += 1
            state = self._state(one)
            if state is not None:
                found.append(self._event(one, state, now))
            if state == "gone" or one.next == len(SAMPLES_NS):
                del self._threads[one.tid]
        return found

    def _event(self, one: _Thread, state: str, now: int) -> VcpuState:
        cpu = self._cpu_ns(one.tid) if state != "gone" else None
        ran = None if cpu is None or one.cpu_ns is None else max(0, cpu - one.cpu_ns)
        one.cpu_ns = cpu
        return VcpuState(now, one.vm, one.tid, state, one.vcpu, ran)

    def _state(self, one: _Thread) -> str | None:
        """Return the thread's state as in VcpuState; None if /proc does not show it."""
        stat = self._stat(one.tid)
        if stat is None or stat[0] in "ZXx" or (one.begun is not None and stat[1] != one.begun):
            return "gone"
        if stat[0] == "R":
            return "running"
        if stat[0] in "Tt":
            return "outside"
        try:
            # This takes exec_update_lock, which a thread in exec may hold for any time.
            words = READER.call(one.tid, read_thread, one.tid, "syscall", self._proc).split()
        except Unreadable:
            return None
        if not words:
            return None
        try:
            call, request = int(words[0]), int(words[2], 16)
        except (ValueError, IndexError):
            return "running" if words[0] == "running" else "outside"
        return "waiting" if call in _IOCTL and request in _KVM_RUN else "outside"

    def _stat(self, tid: int) -> tuple[str, str] | None:
        """Return state letter and start time; None if there is no such thread."""
        stat = self._read(tid, "stat")
        start = task_stat.start_of(stat)
        return None if start is None else (task_stat.fields(stat)[0], start)

    def _cpu_ns(self, tid: int) -> int | None:
        first = self._read(tid, "schedstat").partition(" ")[0]
        return int(first) if first.isdecimal() else None

    def _read(self, tid: int, name: str) -> str:
        return read_thread(tid, name, self._proc)


def read_thread(tid: int, name: str, proc: str) -> str:
    """Return a file of a thread; "" once the thread is gone."""
    # /proc/TID exists for every thread, although a listing shows processes only.
    return read_text(f"{proc}/{tid}/task/{tid}/{name}", 4096)
