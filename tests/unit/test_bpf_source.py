"""The eBPF source, its programs replaced: which VMs it meets, and how often each."""

from __future__ import annotations

import time
from pathlib import Path
from typing import Any

import pytest

from kvmtrace.events import Event, Lost, VmSeen
from kvmtrace.linux import host, kvm_module
from kvmtrace.sources.bpf import records
from kvmtrace.sources.bpf import source as bpf
from kvmtrace.sources.bpf.translator import BpfTranslator
from tests.unit.test_bpf_translator import Kernel

AT, PID = 0xFFFF800000000000, 4194300


class FakePrograms(Kernel):
    """Attached when a VM began, which /proc and the kernel's list have before its record."""

    def __init__(self, proc: Path) -> None:
        super().__init__()
        directory = proc / str(PID) / "fd"
        directory.mkdir(parents=True, exist_ok=True)
        (directory / "3").symlink_to("anon_inode:kvm-vm")
        header = records.Header(9, AT, 1, records.VM_NEW, PID, PID, 0)
        self.raw = [bytes(records.VmRecord(header, b"vmm"))]
        self.lookup: Any = self
        self.maps = self

    def vms(self) -> list[tuple[int, int]]:
        return [(AT, PID)]

    def generation(self, struct: int) -> int:
        return int(struct == AT)

    def outdated(self) -> bool:
        return False

    def take(self) -> list[bytes]:
        raw, self.raw = self.raw, []
        return raw

    def missed(self, ts: int) -> list[Event]:
        return []

    def wait(self, timeout: float) -> None:
        pass

    def close(self, why: str = "closed") -> None:
        pass


class Before(FakePrograms):
    """Those for no module of kvm's: there is no VM yet, and now kvm comes."""

    def __init__(self) -> None:
        Kernel.__init__(self)
        self.raw, self.lookup = [], None
        self.maps = self

    def outdated(self) -> bool:
        return True


@pytest.mark.parametrize("later", [False, True])
def test_a_vm_that_begins_while_programs_are_attached_is_one(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, later: bool
) -> None:
    """It has a generation, which /proc does not show: that scan must find it known.

    Else it were two, and a process that runs two VMs is asked in vain which one a page is of.
    ``later``: kvm was loaded after the start.
    """
    made: list[Any] = [lambda: FakePrograms(tmp_path)]
    if later:
        made.insert(0, Before)
    monkeypatch.setattr(bpf, "_WATCH_SECONDS", 0.0)
    monkeypatch.setattr(bpf, "Programs", lambda **_: made.pop(0)())
    monkeypatch.setattr(bpf, "BpfTranslator", lambda *_: BpfTranslator(0, ({}, {}), str(tmp_path)))
    monkeypatch.setattr(host, "lockdown", lambda: None)
    source = bpf.BpfSource()
    events = [event for _ in range(3) for event in source.poll(0)]
    assert [(event.vm, event.pid) for event in events if isinstance(event, VmSeen)] == [(1, PID)]
    assert source.memory._struct(1) == AT


def test_while_kvm_comes_and_goes_no_poll_takes_longer_than_it_may(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A signal waits for the poll that is going on. Programs are compiled for what stays."""
    modules = [("kvm",), ("kvm", "kvm_amd"), ("kvm", "kvm_amd")]
    made: list[Any] = [Before, lambda: FakePrograms(tmp_path)]
    slept: list[float] = []
    monkeypatch.setattr(bpf, "_WATCH_SECONDS", 0.0)
    monkeypatch.setattr(kvm_module, "loaded", lambda: modules.pop(0))
    monkeypatch.setattr(bpf, "Programs", lambda **_: made.pop(0)())
    monkeypatch.setattr(bpf, "BpfTranslator", lambda *_: BpfTranslator(0, ({}, {}), str(tmp_path)))
    monkeypatch.setattr(time, "sleep", slept.append)
    monkeypatch.setattr(host, "lockdown", lambda: None)
    source = bpf.BpfSource()
    events = [[event.kind for event in source.poll(0.01)] for _ in range(3)]
    assert events == [[], [], ["vm_seen"]]
    assert (modules, made) == ([], [])
    assert len(slept) == 2
    assert max(slept) <= 0.01


def test_records_in_quick_succession_are_read_together(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Else a wake-up for each; the first one after a pause is read at once, and so is the last."""
    programs = FakePrograms(tmp_path)
    record = programs.raw[0]
    now, slept = [100.0], list[float]()

    def sleep(seconds: float) -> None:
        slept.append(seconds)
        now[0] += seconds

    monkeypatch.setattr(bpf, "Programs", lambda **_: programs)
    monkeypatch.setattr(bpf, "BpfTranslator", lambda *_: BpfTranslator(0, ({}, {}), str(tmp_path)))
    monkeypatch.setattr(host, "lockdown", lambda: None)
    monkeypatch.setattr(time, "monotonic", lambda: now[0])
    monkeypatch.setattr(time, "sleep", sleep)
    source = bpf.BpfSource()
    source.poll(0)
    for _ in range(50):
        programs.raw = [record]
        source.poll(0.25)
    assert len(slept) == 50
    assert now[0] - 100 >= 50 * 0.019
    now[0] += 1
    programs.raw = [record]
    source.poll(0.25)
    assert len(slept) == 50
    source.poll(0)
    assert len(slept) == 50


def test_programs_that_met_kvm_half_loaded_are_not_used(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """They would be replaced later, and what happens meanwhile would be lost."""
    asked: list[bool] = []

    def programs(*, whatever_kvm_is: bool = False) -> FakePrograms:
        asked.append(whatever_kvm_is)
        if len(asked) == 1:
            return Before()
        if len(asked) == 2:
            raise kvm_module.Changing
        return FakePrograms(tmp_path)

    monkeypatch.setattr(bpf, "_WATCH_SECONDS", 0.0)
    monkeypatch.setattr(kvm_module, "loaded", lambda: ("kvm",))
    monkeypatch.setattr(kvm_module, "is_changing", lambda *_: False)
    monkeypatch.setattr(bpf, "Programs", programs)
    monkeypatch.setattr(bpf, "BpfTranslator", lambda *_: BpfTranslator(0, ({}, {}), str(tmp_path)))
    monkeypatch.setattr(host, "lockdown", lambda: None)
    source = bpf.BpfSource()
    assert [event.kind for _ in range(2) for event in source.poll(0)] == []
    assert [event.kind for event in source.poll(0)] == ["vm_seen"]
    assert asked == [False, False, False]


def test_what_is_recorded_while_counters_are_read_comes_with_them(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The poison is recorded before its exits are counted: in two calls it would come later."""
    programs = FakePrograms(tmp_path)
    monkeypatch.setattr(bpf, "Programs", lambda **_: programs)
    monkeypatch.setattr(bpf, "BpfTranslator", lambda *_: BpfTranslator(0, ({}, {}), str(tmp_path)))
    monkeypatch.setattr(host, "lockdown", lambda: None)
    source = bpf.BpfSource()
    source.poll(0)
    lost = Lost(5, "ring", 1)

    def count(maps: Any, *, at_once: bool) -> list[Event]:
        programs.raw = [
            bytes(records.VmRecord(records.Header(7, AT, 1, records.VM_GONE, PID, PID)))
        ]
        return [lost]

    monkeypatch.setattr(source._translator, "counters", count)
    assert "vm_gone" in [event.kind for event in source.poll(0)]
