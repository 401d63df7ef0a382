"""Where the one program for all exits is attached, and what guards it."""

from __future__ import annotations

import errno
import itertools
from collections.abc import Callable
from typing import Any

import pytest

from kvmtrace.linux.tracefs import mount
from kvmtrace.probes import Probe
from kvmtrace.sources.bpf import run_probe
from kvmtrace.sources.bpf.run_probe import GUARD_SECONDS, RunProbe

TARGET = "kvm:kvm_userspace_exit"


class FakeLoader:
    """``attached``: {descriptor: (program, copy)}. ``refuses``: programs."""

    def __init__(self, *refuses: str) -> None:
        self.attached: dict[int, tuple[str, int]] = {}
        self.refuses = refuses
        self._next = itertools.count(100)

    def copies(self, name: str, probe: str) -> int:
        return {("tp_run", "run"): 3}[name, probe]

    def attach_raw_tracepoint(self, name: str, event: str, *, copy: int = 0) -> int:
        assert event == "kvm_userspace_exit"
        return self._attach(name, copy)

    def attach_tracepoint(self, name: str, event_id: int) -> int:
        assert event_id == 1798
        return self._attach(name, 0)

    def _attach(self, name: str, copy: int) -> int:
        if name in self.refuses:
            raise OSError(errno.EPERM, "no")
        descriptor = next(self._next)
        self.attached[descriptor] = (name, copy)
        return descriptor

    def detach(self, program: int) -> None:
        del self.attached[program]


# /sys/kernel/tracing/events/kvm/kvm_userspace_exit/format of Linux 7.3.4, the names cut short
FORMAT = """name: kvm_userspace_exit
ID: 1798
format:
\tfield:unsigned short common_type;\toffset:0;\tsize:2;\tsigned:0;
\tfield:unsigned char common_flags;\toffset:2;\tsize:1;\tsigned:0;
\tfield:unsigned char common_preempt_count;\toffset:3;\tsize:1;\tsigned:0;
\tfield:int common_pid;\toffset:4;\tsize:4;\tsigned:1;

\tfield:__u32 reason;\toffset:8;\tsize:4;\tsigned:0;
\tfield:int errno;\toffset:12;\tsize:4;\tsigned:1;

print fmt: "reason %s (%d)", REC->errno < 0 ? (REC->errno == -4 ? "restart" : "error") :\
 __print_symbolic(REC->reason, { 0, "KVM_EXIT_" "UNKNOWN" }), REC->errno < 0 ? -REC->errno : 0
"""
RAW, EVENT = ("tp_run", 0), ("te_run", 0)
COPIES = [("tp_run", 1), ("tp_run", 2)]

Made = Callable[..., tuple[RunProbe, FakeLoader]]


class Clock:
    now = 1000.0

    def monotonic(self) -> float:
        return self.now


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    made = Clock()
    monkeypatch.setattr(run_probe, "time", made)
    monkeypatch.setattr(mount, "tracefs", lambda: "/tracefs")
    monkeypatch.setattr(mount, "event_format", lambda *asked: {(TARGET, "/tracefs"): FORMAT}[asked])
    return made


def made(loader: FakeLoader, *, skips_raw: bool) -> RunProbe:
    as_loader: Any = loader
    probe = RunProbe(as_loader, skips_raw=skips_raw)
    probe.attach()
    return probe


def attached(loader: FakeLoader, probe: RunProbe) -> list[tuple[str, int]]:
    assert list(loader.attached) == probe.programs
    return list(loader.attached.values())


def test_a_raw_tracepoint_that_is_never_skipped_is_enough(clock: Clock) -> None:
    loader = FakeLoader()
    probe = made(loader, skips_raw=False)
    assert probe.state == Probe("run", True, TARGET, "raw_tracepoint")
    probe.guard()
    clock.now += 2 * GUARD_SECONDS
    probe.end_guard()
    assert attached(loader, probe) == [RAW]
    assert probe.may_miss


def test_a_raw_tracepoint_that_was_skipped_after_all_gets_copies_for_good(clock: Clock) -> None:
    loader = FakeLoader()
    probe = made(loader, skips_raw=False)
    probe.missed()
    clock.now += 2 * GUARD_SECONDS
    probe.end_guard()
    assert attached(loader, probe) == [RAW, *COPIES]
    assert not probe.may_miss


def test_a_trace_event_is_guarded_while_counters_are_read(clock: Clock) -> None:
    loader = FakeLoader()
    probe = made(loader, skips_raw=True)
    assert probe.state == Probe("run", True, TARGET, "tracepoint")
    assert attached(loader, probe) == [EVENT]
    assert probe.may_miss
    for _ in range(2):
        for _ in range(3):
            probe.guard()
            clock.now += GUARD_SECONDS - 1
            probe.end_guard()
            assert attached(loader, probe) == [EVENT, *COPIES]
            assert not probe.may_miss
        clock.now += 1
        probe.end_guard()
        assert attached(loader, probe) == [EVENT]
        assert probe.may_miss


def test_a_trace_event_that_was_skipped_is_guarded_from_then_on(clock: Clock) -> None:
    loader = FakeLoader()
    probe = made(loader, skips_raw=True)
    probe.missed()
    probe.guard()
    clock.now += 1e9
    probe.end_guard()
    assert attached(loader, probe) == [EVENT, *COPIES]


@pytest.mark.parametrize("how", ["refused", "not shown", "another event"])
def test_without_the_trace_event_there_are_copies(
    clock: Clock, monkeypatch: pytest.MonkeyPatch, how: str
) -> None:
    loader = FakeLoader(*(["te_run"] if how == "refused" else []))
    if how == "not shown":
        monkeypatch.setattr(mount, "tracefs", lambda: None)
    if how == "another event":
        other = FORMAT.replace("offset:12", "offset:16")
        monkeypatch.setattr(mount, "event_format", lambda *_: other)
    probe = made(loader, skips_raw=True)
    assert probe.state == Probe("run", True, TARGET, "raw_tracepoint")
    clock.now += 2 * GUARD_SECONDS
    probe.end_guard()
    assert attached(loader, probe) == [RAW, *COPIES]
    assert not probe.may_miss


@pytest.mark.usefixtures("clock")
@pytest.mark.parametrize("skips_raw", [True, False])
def test_where_nothing_can_be_attached_the_kernels_reason_is_kept(*, skips_raw: bool) -> None:
    loader = FakeLoader("te_run", "tp_run")
    probe = made(loader, skips_raw=skips_raw)
    why = "the kernel does not permit raw_tracepoint programs"
    assert probe.state == Probe("run", False, TARGET, None, why, "raw_tracepoint: no")
    probe.guard()
    assert attached(loader, probe) == []
