"""Keys of VMs: addresses are reused, and any creation or end may be missed."""

from __future__ import annotations

import ctypes
import os
import shutil
import tempfile
import threading
from collections import Counter
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from kvmtrace.events import Event, VmGone, VmSeen
from kvmtrace.linux import proc_reader
from kvmtrace.linux.proc_reader import READER, ProcReader, Unreadable
from kvmtrace.sources.ftrace.vms import VmResolver, tgid_of
from kvmtrace.sources.vm_table import VmTable
from kvmtrace.vmm import identity, processes

AT, PID = 0xFFFF800000000000, 4194300


def table() -> VmTable:
    return VmTable("/nonexistent")


def found(proc: Path, ts: int) -> VmTable:
    """A table that finds a process with a VM at ``ts``."""
    directory = proc / str(PID) / "fd"
    directory.mkdir(parents=True)
    (directory / "3").symlink_to("anon_inode:kvm-vm")
    vms = VmTable(str(proc))
    assert told(vms.scan(ts)) == [("VmSeen", 1)]
    return vms


def told(events: list[Event]) -> list[tuple[str, int]]:
    return [(type(e).__name__, e.vm) for e in events if isinstance(e, VmSeen | VmGone)]


def test_a_creation_ends_the_last_vm_at_the_address() -> None:
    for generations in ((0, 0), (4, 5)):
        vms = table()
        first, second = generations
        assert told(vms.created(AT, PID, 1, generation=first)) == [("VmSeen", 1)]
        assert told(vms.created(AT, PID, 2, generation=second)) == [("VmGone", 1), ("VmSeen", 2)]
        assert told(vms.destroyed(AT, PID, 3, generation=second)) == [("VmGone", 2)]
        assert vms.pids() == {}


def holding(proc: Path, *fds: str) -> VmTable:
    """A process that holds these descriptors before a table scans."""
    directory = proc / str(PID) / "fd"
    directory.mkdir(parents=True)
    for number, target in enumerate(fds):
        (directory / str(number)).symlink_to(f"anon_inode:{target}")
    return VmTable(str(proc))


def test_several_vms_of_one_process_are_several(tmp_path: Path) -> None:
    vms = holding(tmp_path, "kvm-vm", "[kvm-vm]", "kvm-vm")
    assert told(vms.scan(5)) == [("VmSeen", 1), ("VmSeen", 2), ("VmSeen", 3)]
    assert vms.scan(6) == []
    people = VmResolver(vms, lambda tid: PID)
    assert people.only_vm_of(PID) is None
    assert told(vms.destroyed(AT, PID, 7)) == [("VmGone", 3)]
    assert vms.of_pid(PID) == [1, 2]
    assert vms.key(AT + 4096, PID, 8) == (1, [])
    assert told(vms.destroyed(AT + 4096, PID, 9)) == [("VmGone", 1)]
    assert people.only_vm_of(PID) == 2


def test_one_more_vm_of_a_process_is_found(tmp_path: Path) -> None:
    """What was reported of the first VM while it was the only one remains with it."""
    vms = holding(tmp_path, "kvm-vm")
    assert told(vms.scan(5)) == [("VmSeen", 1)]
    (tmp_path / str(PID) / "fd" / "9").symlink_to("anon_inode:kvm-vm")
    assert told(vms.scan(6)) == [("VmSeen", 2)]
    assert told(vms.destroyed(AT, PID, 7)) == [("VmGone", 2)]


def test_vcpus_alone_are_a_vm(tmp_path: Path) -> None:
    assert told(holding(tmp_path, "kvm-vcpu:0", "kvm-vcpu:1").scan(5)) == [("VmSeen", 1)]


def test_vcpus_of_one_number_are_of_two_vms(tmp_path: Path) -> None:
    vms = holding(tmp_path, "kvm-vm", "kvm-vcpu:0", "kvm-vcpu:0", "kvm-vcpu:1")
    assert told(vms.scan(5)) == [("VmSeen", 1), ("VmSeen", 2)]


def test_several_descriptors_of_one_vm_are_one(tmp_path: Path) -> None:
    """crosvm has one for each interrupt controller; nothing compares them here."""
    vms = holding(tmp_path, "kvm-vm", "kvm-vm", "kvm-vm", "kvm-vcpu:0", "kvm-vcpu:1")
    assert told(vms.scan(5)) == [("VmSeen", 1)]
    assert VmResolver(vms, lambda tid: PID).only_vm_of(PID) == 1


def test_all_of_a_process_end_with_it(tmp_path: Path) -> None:
    vms = holding(tmp_path, "kvm-vm", "kvm-vm")
    vms.scan(5)
    shutil.rmtree(tmp_path / str(PID))
    assert vms.reap(6) == []
    assert told(vms.reap(6 + 3_000_000_000)) == [("VmGone", 1), ("VmGone", 2)]


def test_a_pid_that_is_used_again_is_another_process(tmp_path: Path) -> None:
    vms = holding(tmp_path, "kvm-vm")
    stat = tmp_path / str(PID) / "task" / str(PID) / "stat"
    stat.parent.mkdir(parents=True)
    stat.write_text(f"{PID} (a b) c) S {' '.join(str(field) for field in range(4, 30))}\n")
    vms.scan(5)
    assert vms.key(AT, PID, 5)[0] == 1  # nothing but its end or its process's says that it ended
    assert vms.reap(6) == vms.reap(6 + 9_000_000_000) == []
    stat.write_text(f"{PID} (vmm) S {' '.join(str(field) for field in range(5, 31))}\n")
    ended = [event for n in range(20) for event in vms.reap(7 + n * 1_000_000_000)]
    assert told(ended) == [("VmGone", 1)]


def test_without_start_times_a_process_without_a_vm_is_another_one(tmp_path: Path) -> None:
    vms = found(tmp_path, 5)
    assert vms.key(AT, PID, 5)[0] == 1
    assert vms.reap(6) == vms.reap(6 + 9_000_000_000) == []
    (tmp_path / str(PID) / "fd" / "3").unlink()
    ended = [event for n in range(20) for event in vms.reap(7 + n * 1_000_000_000)]
    assert told(ended) == [("VmGone", 1)]


def test_each_round_searches_few_processes_and_all_in_turn(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pids = range(PID, PID + 40)
    for pid in pids:
        (tmp_path / str(pid) / "fd").mkdir(parents=True)
        (tmp_path / str(pid) / "fd" / "3").symlink_to("anon_inode:kvm-vm")
    vms = VmTable(str(tmp_path))
    vms.scan(5)
    searched: list[int] = []

    def search(pid: int, proc: str) -> str | None:
        searched.append(pid)
        return None

    monkeypatch.setattr(processes, "vm_descriptor", search)
    looks = []
    for n in range(3):
        before = len(searched)
        assert vms.reap(10 + n) == []
        looks.append(len(searched) - before)
    assert looks == [16, 16, 8]
    assert sorted(searched) == list(pids)
    # A suspect is asked again when the answer counts.
    assert vms.reap(2_000_000_000) == []
    assert len(searched) == 40
    assert len(vms.reap(4_000_000_000)) == 40


def test_a_quiet_second_costs_the_same_whatever_the_number_of_vms(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pids = range(PID, PID + 1300)
    for pid in pids:
        (tmp_path / str(pid) / "fd").mkdir(parents=True)
        (tmp_path / str(pid) / "fd" / "3").symlink_to("anon_inode:kvm-vm")
    vms = VmTable(str(tmp_path))
    vms.scan(5)
    monkeypatch.setattr(processes, "vm_descriptor", lambda pid, proc: "3")
    reads: Counter[int] = Counter()

    def is_vm(pid: int, descriptor: str, proc: str) -> bool:
        reads[pid] += 1
        return real(pid, descriptor, proc)

    begun: list[int] = []
    monkeypatch.setattr(identity, "begun", lambda pid, proc: begun.append(pid))
    now = 10
    for _ in range(300):  # all are searched once
        now += 1_000_000_000
        assert vms.reap(now) == []
    assert set(begun) == set(pids)
    real = identity.is_vm_descriptor
    monkeypatch.setattr(identity, "is_vm_descriptor", is_vm)
    for _ in range(3):
        before = reads.total(), len(begun)
        now += 1_000_000_000
        assert vms.reap(now) == []
        assert reads.total() - before[0] <= 512
        assert len(begun) - before[1] <= 512 // 4
    assert set(reads) == set(pids)
    assert max(reads.values()) <= 2
    for pid in pids[:3]:
        shutil.rmtree(tmp_path / str(pid))
    ended: list[Event] = []
    for _ in range(8):
        now += 1_000_000_000
        ended += vms.reap(now)
    assert told(ended) == [("VmGone", 1), ("VmGone", 2), ("VmGone", 3)]
    assert vms._ending == {}


def test_a_process_that_cannot_be_searched_to_the_end_is_left_alone_for_longer_and_longer(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    vms = found(tmp_path, 5)
    searched: list[int] = []

    def search(pid: int, proc: str) -> str | None:
        searched.append(pid)
        raise Unreadable("more than 4096 descriptors")

    monkeypatch.setattr(processes, "vm_descriptor", search)
    for n in range(400):
        assert vms.reap(10 + n * 1_000_000_000) == []
    assert 2 <= len(searched) <= 7


def test_a_process_that_has_too_many_descriptors_is_not_searched_to_the_end(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Else a tenant could make the reader count hundreds of thousands each second."""
    holding(tmp_path, *["[eventfd]"] * 51)
    with pytest.raises(ValueError, match="more than 50"):
        identity.vm_descriptor(PID, str(tmp_path), 50)
    assert identity.vm_descriptor(PID, str(tmp_path), 51) is None
    monkeypatch.setattr(processes, "MAX_DESCRIPTORS", 50)
    with pytest.raises(Unreadable, match="more than 50"):
        processes.vm_descriptor(PID, str(tmp_path))


def test_a_thread_may_have_any_name() -> None:
    """Its name comes before the fields that are read."""
    found: list[int | None] = []

    def look() -> None:
        ctypes.CDLL(None).prctl(15, b"\xff\xfeTgid:\n9", 0, 0, 0)  # PR_SET_NAME
        found.append(tgid_of(threading.get_native_id()))

    thread = threading.Thread(target=look)
    thread.start()
    thread.join()
    assert found == [os.getpid()]
    assert tgid_of(0) is None


def test_the_order_of_first_events_does_not_matter() -> None:
    vms = table()
    assert vms.key(AT, PID, 2, generation=5)[0] == 1
    assert vms.created(AT, PID, 1, generation=5) == []
    assert vms.generations(AT) == [5]


def test_an_end_of_an_unknown_vm_adds_it_first() -> None:
    vms = table()
    seen, gone = vms.destroyed(AT, PID, 3, comm="vmm")
    assert isinstance(seen, VmSeen)
    assert (seen.pid, seen.name, seen.ts) == (PID, "vmm", 3)
    assert told([gone]) == [("VmGone", seen.vm)]
    assert vms.pids() == {}


def test_a_vm_found_by_its_process_may_have_been_created_before(tmp_path: Path) -> None:
    vms = found(tmp_path, 5)
    assert vms.created(AT, PID, 4) == []
    assert told(vms.created(AT + 4096, PID, 6)) == [("VmSeen", 2)]
    assert told(vms.destroyed(AT, PID, 7)) == [("VmGone", 1)]


def test_a_new_vm_is_not_one_that_was_found_before(tmp_path: Path) -> None:
    vms = found(tmp_path, 5)
    assert told(vms.created(AT, PID, 6)) == [("VmSeen", 2)]
    assert told(vms.destroyed(AT, PID, 7)) == [("VmGone", 2)]
    assert vms.of_pid(PID) == [1]


def test_a_vm_created_after_the_start_is_not_one_that_was_found_before(tmp_path: Path) -> None:
    """Though its first fault is read before its creation."""
    vms = found(tmp_path, 5)
    assert vms.key(AT, PID, 8, generation=3)[0] == 2
    assert vms.created(AT, PID, 7, generation=3) == []
    assert told(vms.destroyed(AT, PID, 9, generation=3)) == [("VmGone", 2)]
    assert vms.key(AT + 4096, PID, 9)[0] == 1


def test_a_vm_found_while_it_ends_has_ended() -> None:
    """By its address; the end has changed the generation meanwhile."""
    vms = table()
    assert vms.key(AT, PID, 5, generation=4)[0] == 1
    assert told(vms.destroyed(AT, PID, 4, generation=3)) == [("VmGone", 1)]


@given(
    st.lists(st.tuples(st.sampled_from((AT, AT + 4096)), st.booleans(), st.booleans())),
    st.booleans(),
)
def test_two_vms_are_one_only_without_an_event_between_them(
    lives: list[tuple[int, bool, bool]], counts: bool
) -> None:
    """VMs that live one after the other at two addresses, of which ends and beginnings are missed.

    ``counts``: the source counts generations.
    """
    vms = table()
    generations, lasts = Counter[int](), dict[int, int]()
    alive: set[int] = set()
    for ts, (at, begin_heard, end_heard) in enumerate(lives):
        events: list[Event] = []
        if begin_heard:
            generations[at] += counts
            events += vms.created(at, PID, ts, generation=generations[at])
        key, seen = vms.key(at, PID, ts, generation=generations[at])
        assert (key == lasts.get(at)) == (not begin_heard and at in lasts)
        events += seen
        lasts[at] = key
        if end_heard:
            events += vms.destroyed(at, PID, ts, generation=generations[at])
            generations[at] += counts
            del lasts[at]
        for event in events:
            if isinstance(event, VmSeen):
                assert event.vm not in alive
                alive.add(event.vm)
            elif isinstance(event, VmGone):
                alive.remove(event.vm)
    assert sorted(alive) == sorted(vms.of_pid(PID)) == sorted(lasts.values())


@given(
    st.lists(st.integers(0, 4), min_size=1, max_size=3),
    st.lists(st.tuples(st.sampled_from(["touch", "end", "begin"]), st.integers(0, 11))),
)
def test_no_vm_is_missing_or_counted_twice(before: list[int], story: list[tuple[str, int]]) -> None:
    """Processes with VMs from before the start, of which then some do something, end or begin.

    ``before``: VMs of each process; 0 is one of which only a vCPU is held.
    """
    with tempfile.TemporaryDirectory() as proc:
        living: dict[int, int] = {}  # by address: the process
        for process, count in enumerate(before):
            directory = Path(proc, str(PID + process), "fd")
            directory.mkdir(parents=True)
            for number in range(count or 1):
                kind = "kvm-vm" if count else "kvm-vcpu:0"
                (directory / str(number)).symlink_to(f"anon_inode:{kind}")
                living[AT + len(living) * 4096] = PID + process
        vms = VmTable(proc)
        events = vms.scan(1)
        keys: dict[int, int] = {}  # by address
        for ts, (what, choice) in enumerate(story, 2):
            at = sorted(living)[choice % len(living)] if living else AT
            if what == "begin":
                at = AT - (ts << 12)
                living[at] = PID + choice % len(before)
                events += vms.created(at, living[at], ts)
            elif not living:
                continue
            elif what == "touch":
                key, new = vms.key(at, living[at], ts)
                events += new
                assert keys.setdefault(at, key) == key
            else:
                gone = vms.destroyed(at, living[at], ts)
                events += gone
                assert [type(one) for one in gone] == [VmGone]
                if at in keys:
                    assert told(gone) == [("VmGone", keys.pop(at))]
                else:
                    assert not {key for _, key in told(gone)} & set(keys.values())
                del living[at]
            alive = [key for kind, key in told(events) if kind == "VmSeen"]
            for _, key in [one for one in told(events) if one[0] == "VmGone"]:
                alive.remove(key)
            assert Counter(living.values()) == {pid: len(of) for pid, of in vms.pids().items()}
            assert sorted(alive) == sorted(key for of in vms.pids().values() for key in of)


def test_a_vm_that_cannot_be_looked_up_is_named_by_reads_that_cannot_hang(tmp_path: Path) -> None:
    """For instance if its process holds mmap_lock; it is looked up again later."""
    vms = holding(tmp_path, "kvm-vm")
    process = tmp_path / str(PID)
    (process / "comm").write_text("qemu-kvm\n")
    cmdline = process / "cmdline"
    cmdline.unlink(missing_ok=True)
    os.mkfifo(cmdline)  # opening it waits for a writer
    (seen,) = vms.scan(5)
    assert isinstance(seen, VmSeen)
    assert (seen.pid, seen.name) == (PID, "qemu-kvm")
    assert seen.unread == f"/proc/{PID} did not answer in time"
    assert vms.reap(6) == []  # it hung a moment ago
    cmdline.unlink()
    cmdline.write_bytes(b"qemu-kvm\0-name\0web-1\0")
    READER._hung.clear()
    assert vms.reap(7) == [VmSeen(7, 1, PID, "web-1", None, "qemu")]
    assert vms.reap(8) == []


def test_processes_behind_one_that_hangs_are_found(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(proc_reader, "STALL_SECONDS", 0.3)
    for pid in (7, 8, 9):
        (tmp_path / str(pid)).mkdir()
        (tmp_path / str(pid) / "comm").write_text(f"vmm-{pid}\n")
    os.mkfifo(tmp_path / "8/cmdline")  # opening it waits for a writer
    reader = ProcReader()
    found = processes._of_each(identity.identify, [7, 8, 9], str(tmp_path), 60, reader)
    assert {pid: who.name for pid, who in found.items()} == {7: "vmm-7", 9: "vmm-9"}
    assert reader.hangs == 1
    reader.close()
