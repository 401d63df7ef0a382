"""States of notified vCPUs in a made-up /proc, with a clock that the test sets."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import pytest

from kvmtrace.enrich.pipeline import EnrichedSource
from kvmtrace.enrich.vcpu_state import MAX_THREADS, SAMPLES_NS, VcpuFollowUp
from kvmtrace.events import Event, Exit, Sigbus, VcpuState, VmGone
from tests.unit.fake import PROBES, SECOND, T0, FakeSource

KVM_RUN = "16 0xd 0xae80 0x0 0x0 0x0 0x0 0x7ffc 0x7f3a"
FUTEX = "202 0x7f3a 0x80 0x2 0x0 0x0 0x0 0x7ffc 0x7f3a"
DELIVERY = Exit(T0, 1, 0, 133, 39, True, 77, gfn=8)


class World:
    """/proc and a clock; ``pass_`` lets time pass and returns the states that were seen."""

    def __init__(self, proc: Path, *batches: Sequence[Event]) -> None:
        self.proc = proc
        self.now = T0
        self.source = EnrichedSource(
            FakeSource(*batches), [VcpuFollowUp(str(proc))], lambda: self.now
        )

    def thread(
        self, state: str, syscall: str, cpu_ns: int = 0, tid: int = 77, start: int = 5
    ) -> None:
        directory = self.proc / str(tid) / "task" / str(tid)
        directory.mkdir(parents=True, exist_ok=True)
        fields = [state, *["0"] * 18, str(start), "0"]
        (directory / "stat").write_text(f"{tid} (CPU 0) x) {' '.join(fields)}\n")
        (directory / "syscall").write_text(syscall + "\n")
        (directory / "schedstat").write_text(f"{cpu_ns} 5 6\n")

    def pass_(self, seconds: float) -> list[VcpuState]:
        self.now += int(seconds * SECOND)
        return [event for event in self.source.poll(0.001) if isinstance(event, VcpuState)]


def test_a_vcpu_that_ran_on(tmp_path: Path) -> None:
    world = World(tmp_path, [DELIVERY])
    world.thread("S", KVM_RUN, 100)
    assert world.pass_(0) == []
    world.thread("R", "running", 400)
    (look,) = world.pass_(0.6)
    assert (look.vm, look.tid, look.vcpu, look.state, look.ran_ns) == (1, 77, 0, "running", 300)
    assert look.ts == world.now
    assert world.pass_(0.1) == []
    world.thread("S", KVM_RUN, 450)
    (look,) = world.pass_(2)
    assert (look.state, look.ran_ns) == ("waiting", 50)


@pytest.mark.parametrize(
    ("state", "syscall", "seen"),
    [
        ("S", FUTEX, "outside"),
        ("S", KVM_RUN, "waiting"),
        ("S", KVM_RUN.replace("16", "29", 1), "waiting"),  # arm64
        ("S", "16 0xd 0xae41 0x0", "outside"),  # another ioctl
        ("S", "running", "running"),
        ("S", "-1 0x7ffc 0x7f3a", "outside"),
        ("T", KVM_RUN, "outside"),
        ("Z", "", "gone"),
        ("S", "", None),  # may not be read
    ],
)
def test_states(tmp_path: Path, state: str, syscall: str, seen: str | None) -> None:
    world = World(tmp_path, [DELIVERY])
    world.thread("R", "running")
    world.pass_(0)
    world.thread(state, syscall)
    assert [look.state for look in world.pass_(1)] == ([seen] if seen else [])


def test_a_thread_that_is_gone_is_reported_once(tmp_path: Path) -> None:
    world = World(tmp_path, [DELIVERY])
    assert world.pass_(0) == []
    assert [look.state for look in world.pass_(1)] == ["gone"]
    assert world.pass_(60) == []


def test_a_tid_that_is_used_again_is_another_thread(tmp_path: Path) -> None:
    world = World(tmp_path, [DELIVERY])
    world.thread("R", "running", start=5)
    world.pass_(0)
    world.thread("R", "running", start=6)
    assert [look.state for look in world.pass_(1)] == ["gone"]


def test_samples_end(tmp_path: Path) -> None:
    world = World(tmp_path, [DELIVERY])
    world.thread("S", FUTEX)
    world.pass_(0)
    assert sum(len(world.pass_(1)) for _ in range(1000)) == len(SAMPLES_NS)


def test_another_delivery_starts_again_but_a_storm_does_not_delay_samples(tmp_path: Path) -> None:
    world = World(tmp_path, [DELIVERY], *[[DELIVERY]] * 100)
    world.thread("R", "running")
    world.pass_(0)
    assert sum(len(world.pass_(0.1)) for _ in range(100)) >= 8


def test_only_notified_vcpus(tmp_path: Path) -> None:
    world = World(
        tmp_path,
        [
            Exit(T0, 1, 0, 14, 39, True, 77, gfn=8, gmem=0),  # a conversion
            Exit(T0, 1, 0, 133, 39, True, None, gfn=8),
            Sigbus(T0, 4001, 78, 5, 0x7F0000000000, vm=1),  # not a vCPU
            Sigbus(T0, 4001, 79, 4, 0x7F0000000000, vm=1, vcpu=3),
            Sigbus(T0, 4001, 80, 4, 0x7F0000000000, sender=81, vm=1),  # sent by another
            Sigbus(T0, 4001, 82, 4, 0x7F0000000000, sender=82, vm=1),  # a vCPU, not known which
        ],
    )
    world.pass_(0)
    assert [(look.tid, look.vcpu) for look in world.pass_(1)] == [(79, 3), (82, None)]


def test_a_vm_that_is_gone_is_not_followed(tmp_path: Path) -> None:
    world = World(tmp_path, [DELIVERY], [VmGone(T0, 1)])
    world.pass_(0)
    assert world.pass_(1) == []


def test_bounded(tmp_path: Path) -> None:
    many: list[Event] = [Exit(T0, 1, n, 133, 39, True, 1000 + n, gfn=8) for n in range(1000)]
    world = World(tmp_path, many)
    world.pass_(0)
    assert len(world.pass_(1)) == MAX_THREADS


def test_everything_else_is_the_inner_sources(tmp_path: Path) -> None:
    inner = FakeSource()
    source = EnrichedSource(inner, [VcpuFollowUp(str(tmp_path))])
    assert (source.name, source.why, source.probes()) == ("bpf", "a test", PROBES)
    assert source.probe_runs() == inner.probe_runs()
    source.close()
    assert inner.closed == 1
