"""Records of poison → events: which page, and whose."""

from __future__ import annotations

from typing import Any

import pytest

from kvmtrace.events import (
    JOIN_NS,
    Exit,
    GmemPage,
    GmemRefusal,
    HwError,
    Owned,
    Owner,
    Poison,
    SoftOffline,
    Unpoison,
)
from kvmtrace.sources.ftrace.records import Record
from tests.unit.ftrace_world import GFN, World


def slot(world: World, **other: Any) -> Record:
    known = {"change": 0, "old_base": 0, "old_as_id": 0, "base": 0x100, "npages": 64}
    known |= {"hva": 0x7F0000000000, "flags": 4, "as_id": 0, "pgoff": 16, "ino": 77}
    return world.record("slot", **known | other)


def error(world: World, index: int = 24, **other: Any) -> Record:
    mapping = 0xFFFFA00000000100
    known = {"mapping": mapping, "index": index, "ino": 77, "entry": mapping + 0x100000}
    return world.record("gmem_error", **known | {"next": mapping + 64} | other)


def poison(world: World) -> Record:
    return world.record("poison", pfn=0x1234, type=11, result=1)


def page_of(world: World, *records: Record) -> GmemPage:
    """The guest_memfd page of the poison after these records."""
    *_, event = world.feed(*records, poison(world))
    assert isinstance(event, Poison)
    assert event.gmem is not None
    return event.gmem


def test_the_owner_of_a_poisoned_page_is_known_by_its_slot() -> None:
    world = World()
    found = page_of(world, world.record("vm_new", ret=0), slot(world), error(world))
    assert (found.inode, found.index) == (77, 24)
    assert found.owners == (Owner(1, 0x108, 0x7F0000008000),)
    assert found.complete


@pytest.mark.parametrize(
    ("change", "gone"), [(1, True), (2, True), (3, False)], ids=["deleted", "moved", "flags"]
)
def test_slots_change(change: int, gone: bool) -> None:
    world = World()
    old = {"old_base": 0x100}
    new = {"base": 0x500} if change == 2 else {"npages": 0} if change == 1 else {}
    found = page_of(
        world,
        world.record("vm_new", ret=0),
        slot(world),
        slot(world, change=change, **old | new),
        error(world),
    )
    gfns = [owner.gfn for owner in found.owners]
    assert gfns == ([0x508] if change == 2 else [None] if gone else [0x108])
    assert found.complete == (change != 1)


def test_a_vm_that_was_there_before_owns_pages_somewhere() -> None:
    world = World()
    found = page_of(world, error(world))
    assert found.owners == (Owner(1, None),)
    assert not found.complete


def test_an_empty_list_names_no_owner() -> None:
    world = World()
    head = error(world)
    head.fields["entry"] = head.fields["mapping"] + 64
    found = page_of(world, head)
    assert (found.owners, found.complete) == ((), False)


def test_a_page_is_of_the_next_poison_of_its_thread() -> None:
    world = World()
    assert page_of(world, error(world), error(world, index=25)).index == 25
    (other,) = world.feed(poison(world))
    assert isinstance(other, Poison)
    assert other.gmem is None
    late = error(world)
    late = late._replace(ts=late.ts - JOIN_NS - 1000)  # its own poison was lost
    (other,) = world.feed(late, poison(world))
    assert isinstance(other, Poison)
    assert other.gmem is None


def test_a_fault_names_the_owner_if_the_slot_was_not_known() -> None:
    world = World()
    world.feed(error(world, index=8))
    world.feed(poison(world))
    events = world.feed(world.gmem(-133), world.faultin(-133), world.run(-133))
    assert events[0] == Owned(events[0].ts, 0x1234, Owner(1, GFN, 0x7F0000008000), "fault")
    again = world.feed(world.gmem(-133), world.faultin(-133), world.run(-133))
    assert [type(e) for e in again] == [GmemRefusal, Exit]


def test_poison_has_the_kernels_words_or_its_numbers() -> None:
    world = World()
    world.translator.poisons._names = {11: "dirty page"}, {}
    (event,) = world.feed(world.record("poison", pfn=0x1234, type=11, result=9))
    assert isinstance(event, Poison)
    assert (event.page_type, event.result, event.page_type_nr, event.result_nr) == (
        "dirty page",
        "9",
        11,
        9,
    )


def test_a_machine_check_without_a_valid_address() -> None:
    world = World()
    base = {"addr": 0x12345000, "bank": 4, "cpu": 1, "socketid": 0, "misc": 0x8C}
    events = world.feed(
        world.record("mce", status=1 << 58 | 1 << 63, **base),
        world.record("mce", status=1 << 63, **base),
    )
    assert [(e.addr, e.pfn) for e in events if isinstance(e, HwError)] == [
        (0x12345000, 0x12345),
        (None, None),
    ]


def test_pages_moved_away_and_pages_taken_back() -> None:
    world = World()
    events = world.feed(
        world.record("soft_offline", pfn=0x1234, ret=0),
        world.record("soft_offline", pfn=0x1235, ret=-16),
        world.record("unpoison", pfn=0x1236, ret=0),
        world.record("unpoison", pfn=0x1237, ret=-16),
    )
    assert events == [
        SoftOffline(events[0].ts, 0x1234, 0),
        SoftOffline(events[1].ts, 0x1235, 16),
        Unpoison(events[2].ts, 0x1236),
    ]
