"""What becomes of vCPUs that were notified of poison, looked up in /proc some times afterwards.

``VcpuFollowUp`` is a source around a source: it adds ``VcpuState`` events for the threads that were
notified. They are events like any others, so recordings hold them.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable
from dataclasses import dataclass

from kvmtrace import kvm
from kvmtrace.enrich.pipeline import EnrichedSource
from kvmtrace.events import Event, Exit, Sigbus, VcpuState, VmGone
from kvmtrace.linux import clock
from kvmtrace.linux.proc_reader import READER, Unreadable
from kvmtrace.sources import Source

_SECOND = 1_000_000_000

# After the last delivery. A VMM that copes does so within milliseconds; a person takes minutes.
LOOKS_NS = tuple(int(s * _SECOND) for s in (0.5, 2, 5, 12, 30, 120, 600))
MAX_THREADS = 256

_POLL_NS = _SECOND // 4

# ioctl's number by architecture (x86-64; arm64 and riscv64; s390x, ppc64) and KVM_RUN's code,
# which differs on ppc64 (another layout of _IO).
_IOCTL = (16, 29, 54)
_KVM_RUN = (0xAE80, 0x2000AE80)


def _by_its_own_access(event: Sigbus) -> bool:
    """Sent by the thread itself: in KVM_RUN it is a vCPU's, though which one's may not be known."""
    return event.code == kvm.BUS_MCEERR_AR and event.sender == event.tid


@dataclass(slots=True)
class _Thread:
    vm: int
    tid: int
    vcpu: int | None
    told_ns: int
    begun: str | None  # its start time: a tid that is used again has another
    next: int = 0
    cpu_ns: int | None = None


class VcpuFollowUp(EnrichedSource):
    """A source whose notified vCPUs are followed up. ``now``: ns since the epoch."""

    def __init__(
        self, inner: Source, proc: str = "/proc", now: Callable[[], int] = clock.now_ns
    ) -> None:
        super().__init__(inner, now)
        self._proc = proc
        self._threads: OrderedDict[int, _Thread] = OrderedDict()

    def poll(self, timeout: float) -> list[Event]:
        """The inner source's events and what was due to be looked at."""
        if self._threads:
            timeout = min(timeout, _POLL_NS / _SECOND)
        events = self.read(timeout)
        for event in events:
            self._follow(event)
        return events + self._look()

    # -- whom to look at

    def _follow(self, event: Event) -> None:
        match event:
            case Exit(tid=int(tid)) if event.is_poison:
                self._told(event.vm, tid, event.vcpu)
            case Sigbus(vm=int(vm)) if event.vcpu is not None or _by_its_own_access(event):
                self._told(vm, event.tid, event.vcpu)
            case VmGone():
                gone = [tid for tid, one in self._threads.items() if one.vm == event.vm]
                for tid in gone:
                    del self._threads[tid]

    def _told(self, vm: int, tid: int, vcpu: int | None) -> None:
        now = self._read_ns
        known = self._threads.get(tid)
        if known is not None and (known.vm, known.vcpu) == (vm, vcpu):
            if known.next or now - known.told_ns > LOOKS_NS[0]:
                known.told_ns, known.next, known.cpu_ns = now, 0, self._cpu_ns(tid)
            return
        begun = self._stat(tid)
        self._threads[tid] = _Thread(
            vm, tid, vcpu, now, begun[1] if begun else None, cpu_ns=self._cpu_ns(tid)
        )
        while len(self._threads) > MAX_THREADS:
            self._threads.popitem(last=False)

    # -- looking

    def _look(self) -> list[Event]:
        now = self._read_ns
        found: list[Event] = []
        for one in list(self._threads.values()):
            if now - one.told_ns < LOOKS_NS[one.next]:
                continue
            while one.next < len(LOOKS_NS) and now - one.told_ns >= LOOKS_NS[one.next]:
                one.next += 1
            state = self._state(one)
            if state is not None:
                found.append(self._event(one, state, now))
            if state == "gone" or one.next == len(LOOKS_NS):
                del self._threads[one.tid]
        return found

    def _event(self, one: _Thread, state: str, now: int) -> VcpuState:
        cpu = self._cpu_ns(one.tid) if state != "gone" else None
        ran = None if cpu is None or one.cpu_ns is None else max(0, cpu - one.cpu_ns)
        one.cpu_ns = cpu
        return VcpuState(now, one.vm, one.tid, state, one.vcpu, ran)

    def _state(self, one: _Thread) -> str | None:
        """One of VcpuState's; None where /proc does not show it."""
        stat = self._stat(one.tid)
        if stat is None or stat[0] in "ZXx" or (one.begun is not None and stat[1] != one.begun):
            return "gone"
        if stat[0] == "R":
            return "running"
        if stat[0] in "Tt":
            return "outside"
        try:
            # It takes exec_update_lock, which a thread may hold in exec for as long as it likes.
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
        """State letter and start time; None if there is no such thread."""
        fields = self._read(tid, "stat").rpartition(")")[2].split()
        return (fields[0], fields[19]) if len(fields) > 19 else None

    def _cpu_ns(self, tid: int) -> int | None:
        first = self._read(tid, "schedstat").partition(" ")[0]
        return int(first) if first.isdecimal() else None

    def _read(self, tid: int, name: str) -> str:
        return read_thread(tid, name, self._proc)


def read_thread(tid: int, name: str, proc: str) -> str:
    """A file of a thread's; "" once it is gone."""
    # By the thread's own id: /proc/TID is there although a listing does not show it.
    try:
        with open(f"{proc}/{tid}/task/{tid}/{name}", "rb") as file:
            return file.read(4096).decode("ascii", "replace")
    except OSError:
        return ""
