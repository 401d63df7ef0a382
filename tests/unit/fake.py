"""A source without a kernel: it returns given events in order."""

from __future__ import annotations

import threading
import time
from collections.abc import Iterable, Mapping

from kvmtrace.events import Event, Exit, Poison, VmSeen
from kvmtrace.probes import Probe, ProbeRuns

SECOND = 1_000_000_000
T0 = 1_790_000_000 * SECOND

STORY: tuple[Event, ...] = (
    VmSeen(T0, 1, 4001, "web-1", "c7a5fdbd-edaf-9455-926a-d65c16db1809", "qemu"),
    VmSeen(T0, 2, 4002, "db-1", None, "qemu"),
    Poison(T0 + SECOND, 0x103275, "dirty unevictable LRU page", "Failed", 11, 2, tid=77),
    Exit(
        T0 + 2 * SECOND, 1, 0, 133, 39, True, 77, flags=0, gpa=0x8000, size=0x1000, gfn=8, gmem=133
    ),
    Exit(T0 + 3 * SECOND, 2, 1, 14, 0, False, 78),
)

PROBES = (
    Probe("run", True, "kvm_arch_vcpu_ioctl_run", "fexit"),
    Probe("mce", False, why="no such tracepoint"),
)


class FakeSource:
    """Return ``batches``, one per poll, then nothing (slowly), or raise ``failure``.

    ``drained`` is set by the first poll without a batch: all events have been processed by then.
    """

    name = "bpf"

    def __init__(
        self, *batches: Iterable[Event], failure: Exception | None = None, why: str = "a test"
    ) -> None:
        self.why: str | None = why
        self.closed = 0
        self.polls = 0
        self.drained = threading.Event()
        self._batches = [list(batch) for batch in batches]
        self._failure = failure

    def poll(self, timeout: float) -> list[Event]:
        self.polls += 1
        if self._batches:
            return self._batches.pop(0)
        self.drained.set()
        if self._failure:
            raise self._failure
        time.sleep(min(timeout, 0.05))
        return []

    def probes(self) -> tuple[Probe, ...]:
        return PROBES

    def probe_runs(self) -> Mapping[str, ProbeRuns]:
        return {"run": ProbeRuns(1000, 900_000)}

    def close(self) -> None:
        self.closed += 1
