"""Whose a struct kvm is: its address is used again, and any beginning or end may be missed."""

from __future__ import annotations

from collections import Counter
from pathlib import Path

from hypothesis import given
from hypothesis import strategies as st

from kvmtrace.events import Event, VmGone, VmSeen
from kvmtrace.vms import VmTable

AT, PID = 0xFFFF800000000000, 4194300


def table() -> VmTable:
    return VmTable("/nonexistent")


def found(proc: Path, ts: int) -> VmTable:
    """One that finds a process with a VM at ``ts``."""
    directory = proc / str(PID) / "fd"
    directory.mkdir(parents=True)
    (directory / "3").symlink_to("anon_inode:kvm-vm")
    vms = VmTable(str(proc))
    assert told(vms.scan(ts)) == [("VmSeen", 1)]
    return vms


def told(events: list[Event]) -> list[tuple[str, int]]:
    return [(type(e).__name__, e.vm) for e in events if isinstance(e, VmSeen | VmGone)]


def test_a_beginning_tells_that_the_last_one_here_has_ended() -> None:
    for generations in ((0, 0), (4, 5)):
        vms = table()
        first, second = generations
        assert told(vms.began(AT, PID, 1, generation=first)) == [("VmSeen", 1)]
        assert told(vms.began(AT, PID, 2, generation=second)) == [("VmGone", 1), ("VmSeen", 2)]
        assert told(vms.gone(AT, PID, 3, generation=second)) == [("VmGone", 2)]
        assert vms.pids() == {}


def test_what_told_of_it_first_does_not_matter() -> None:
    vms = table()
    assert vms.key(AT, PID, 2, generation=5)[0] == 1
    assert vms.began(AT, PID, 1, generation=5) == []
    assert vms.generations(AT) == [5]


def test_an_end_tells_of_a_vm_that_nobody_knew() -> None:
    vms = table()
    seen, gone = vms.gone(AT, PID, 3, comm="vmm")
    assert isinstance(seen, VmSeen)
    assert (seen.pid, seen.name, seen.ts) == (PID, "vmm", 3)
    assert told([gone]) == [("VmGone", seen.vm)]
    assert vms.pids() == {}


def test_one_found_by_its_process_may_have_begun_before(tmp_path: Path) -> None:
    vms = found(tmp_path, 5)
    assert vms.began(AT, PID, 4) == []
    assert told(vms.began(AT + 4096, PID, 6)) == [("VmSeen", 2)]
    assert told(vms.gone(AT, PID, 7)) == [("VmGone", 1)]


def test_one_that_begins_is_not_one_that_was_found_before(tmp_path: Path) -> None:
    vms = found(tmp_path, 5)
    assert told(vms.began(AT, PID, 6)) == [("VmSeen", 2)]
    assert told(vms.gone(AT, PID, 7)) == [("VmGone", 2)]
    assert vms.of_pid(PID) == [1]


def test_what_came_after_the_start_is_not_one_that_was_found_before(tmp_path: Path) -> None:
    """Though its first fault is read before its beginning."""
    vms = found(tmp_path, 5)
    assert vms.key(AT, PID, 8, generation=3)[0] == 2
    assert vms.began(AT, PID, 7, generation=3) == []
    assert told(vms.gone(AT, PID, 9, generation=3)) == [("VmGone", 2)]
    assert vms.key(AT + 4096, PID, 9)[0] == 1


def test_one_found_in_the_moment_of_its_end_has_ended() -> None:
    """By its address; the end has changed the generation meanwhile."""
    vms = table()
    assert vms.key(AT, PID, 5, generation=4)[0] == 1
    assert told(vms.gone(AT, PID, 4, generation=3)) == [("VmGone", 1)]


@given(
    st.lists(st.tuples(st.sampled_from((AT, AT + 4096)), st.booleans(), st.booleans())),
    st.booleans(),
)
def test_two_vms_are_one_only_if_nothing_was_told_between_them(
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
            events += vms.began(at, PID, ts, generation=generations[at])
        key, seen = vms.key(at, PID, ts, generation=generations[at])
        assert (key == lasts.get(at)) == (not begin_heard and at in lasts)
        events += seen
        lasts[at] = key
        if end_heard:
            events += vms.gone(at, PID, ts, generation=generations[at])
            generations[at] += counts
            del lasts[at]
        for event in events:
            if isinstance(event, VmSeen):
                assert event.vm not in alive
                alive.add(event.vm)
            elif isinstance(event, VmGone):
                alive.remove(event.vm)
    assert sorted(alive) == sorted(vms.of_pid(PID)) == sorted(lasts.values())
