"""Exact counts: the kernel's totals reconciled with the events that came."""

from __future__ import annotations

from collections import Counter

from hypothesis import given
from hypothesis import strategies as st

from kvmtrace.ftrace import hist
from kvmtrace.ftrace.hist import (
    ExitKey,
    RefusedKey,
    SignalFacts,
    SignalKey,
    Totals,
    Whose,
)
from kvmtrace.ftrace.tally import Tally

# Linux 7.3.4, as read; two blocks of four, with a "Dropped" made up in the first.
TEXT = """# event histogram
#
# trigger info: hist:keys=vcpu.hex,ret,reason:vals=hitcount:sort=hitcount:size=4096 if ret < 0 && ret != -4 && ret != -11 && !(reason == 39 && (ret == -14 || ret == -133)) [active]
#

{ vcpu: ffff8cc582ee0000, ret: 18446744073709551602, reason:          0 } hitcount:          2

Totals:
    Hits: 5
    Entries: 1
    Dropped: 3


# event histogram
#
# trigger info: hist:keys=vcpu.hex,kvm.hex,vid:vals=hitcount,tgid:sort=hitcount:size=4096 if ret < 0 && ret != -4 && ret != -11 [active]
#

{ vcpu: ffff8cc582ee0000, kvm: ffff8cc583666000, vid:          0 } hitcount:          2  tgid:      12234
{ vcpu: ffff8cc582ee39e0, kvm: ffff8cc5828d8000, vid:          1 } hitcount:         22  tgid:     134575

Totals:
    Hits: 24
    Entries: 2
    Dropped: 7


# event histogram
#
# trigger info: hist:keys=vcpu.hex,gpa.hex,flags.hex:vals=hitcount,size:sort=hitcount:size=4096 if ret == -133 && reason == 39 [active]
#

{ vcpu: ffff8cc582ee39e0, gpa: 108000, flags: 8 } hitcount:         21  size:      86016

Totals:
    Hits: 21
    Entries: 1
    Dropped: 0


"""  # noqa: E501

BARE = ExitKey(0xFFFF8CC582EE0000, -14, 0)
POISON = ExitKey(0xFFFF8CC582EE39E0, -133, 39, 0x108000, 8)


def test_the_hist_file_is_understood() -> None:
    totals = hist.parse(TEXT)
    assert totals.exits == {BARE: 2, POISON: 21}
    assert totals.sizes == {POISON: 4096}
    # A sum that no one number explains tells none.
    assert totals.whose == {
        BARE.vcpu: {Whose(0xFFFF8CC583666000, 0, 6117): 2},
        POISON.vcpu: {Whose(0xFFFF8CC5828D8000, 1, None): 22},
    }
    # That no entry was left to tell whose a vCPU is loses no exit.
    assert totals.dropped == 3
    assert hist.parse("") == Totals()


def test_triggers_count_every_failed_exit_once() -> None:
    full = hist.triggers("run", ["vcpu", "ret", "reason", "gpa", "flags", "size", "tgid"])
    assert len(full) == 4
    assert "!(reason == 39 && (ret == -14 || ret == -133))" in full[0]
    assert "vals=hitcount,size" in full[2]
    lean = hist.triggers("run", ["vcpu", "ret", "reason"])
    assert len(lean) == 2
    assert "39" not in lean[0]
    assert hist.triggers("poison", ["pfn"]) == ()


def test_signals_and_refusals_are_counted_too() -> None:
    (to_other,) = hist.triggers("sigbus", ["code", "addr", "lsb", "tid", "tgid"])
    (to_self,) = hist.triggers("sigbus_forced", ["code", "addr", "lsb"])
    assert "keys=tid,code,addr.hex:vals=hitcount,lsb,tgid" in to_other
    assert "keys=common_pid,code,addr.hex:vals=hitcount,lsb:" in to_self
    totals = Totals()
    totals.read(
        "sigbus",
        "# trigger info: hist:keys=tid,code,addr.hex:vals=hitcount,lsb,tgid:sort=hitcount:size=4096"
        " if code == 4 || code == 5 [active]\n#\n\n"
        "{ tid:        186, code:          4, addr: 7f0d20003000 } hitcount:       3000"
        "  lsb:      36000  tgid:     555000\n\nTotals:\n    Hits: 3000\n    Dropped: 2\n",
    )
    key = SignalKey("sigbus", 186, 4, 0x7F0D20003000)
    assert totals.signals == {key: 3000}
    assert totals.facts == {key: SignalFacts(12, 185)}
    assert totals.signals_dropped == 2
    totals.read(
        "gmem",
        "# trigger info: hist:keys=kvm.hex,gfn.hex:vals=hitcount,tgid:sort=hitcount:size=4096"
        " if ret == -133 [active]\n#\n\n"
        "{ kvm: ffff8cc583666000, gfn: 103 } hitcount:          7  tgid:       1295\n",
    )
    assert totals.refused == {RefusedKey(0xFFFF8CC583666000, 0x103): 7}
    assert totals.refusers == {0xFFFF8CC583666000: 185}


def test_events_are_told_as_they_come_and_totals_tell_the_rest() -> None:
    tally = Tally[ExitKey]()
    assert [tally.event(BARE) for _ in range(3)] == [True] * 3
    assert tally.total({BARE: 3}) == []
    assert tally.total({BARE: 10}) == [(BARE, 7)]
    # These were told by the total already.
    assert [tally.event(BARE) for _ in range(7)] == [False] * 7
    assert tally.event(BARE) is True


def test_what_the_kernel_had_no_entry_for_is_lost_unless_its_event_came() -> None:
    tally = Tally[ExitKey]()
    for _ in range(5):
        tally.event(BARE)
    tally.total({POISON: 3})
    assert tally.lost(5) == 0
    assert tally.lost(9) == 4
    assert tally.lost(9) == 0
    assert tally.lost(10) == 1


@given(
    st.lists(
        st.tuples(st.sampled_from(["kept", "dropped", "read"]), st.integers(1, 5)), max_size=60
    )
)
def test_the_sum_of_what_is_told_is_what_happened(steps: list[tuple[str, int]]) -> None:
    """However events are dropped and whenever totals are read, no exit is told twice or not."""
    tally = Tally[ExitKey]()
    happened = told = 0
    in_ring = 0
    for what, count in [*steps, ("read", 1)]:
        if what == "read":
            totals = {BARE: happened}
            # Some of the events may be read before, others after the totals.
            early = in_ring // count
            told += sum(tally.event(BARE) for _ in range(early))
            told += sum(n for _, n in tally.total(totals))
            told += sum(tally.event(BARE) for _ in range(in_ring - early))
            in_ring = 0
            assert told == happened
        else:
            happened += count
            in_ring += count if what == "kept" else 0
    assert told == happened


class FullKernel:
    """A kernel with room for two addresses, a ring that drops, and who reads both."""

    def __init__(self) -> None:
        self.tally = Tally[ExitKey](hist.rest_of)
        self.happened: Counter[ExitKey] = Counter()
        self.told: Counter[ExitKey] = Counter()
        self.entries: dict[ExitKey, int] = {}
        self.dropped = 0
        self.ring: list[ExitKey] = []

    def exit(self, address: int, *, kept: bool) -> None:
        key = ExitKey(VCPU, -14, 39, address, 8)
        self.happened[key] += 1
        if key in self.entries or len(self.entries) < 2:
            self.entries[key] = self.entries.get(key, 0) + 1
        else:
            self.dropped += 1
        self.ring += [key] * kept

    def totals(self) -> Totals:
        rests = {ExitKey(VCPU, -14, 39): self.dropped}
        return Totals(dict(self.entries), rests=rests, full=self.dropped > 0)

    def settle(self, totals: Totals) -> None:
        """As Joiner.batch does: what the ring has is told before the counts."""
        for key in self.ring:
            self.told[key] += self.tally.event(key)
        self.ring.clear()
        for key, count in self.tally.total(totals.exits) + self.tally.rests(totals.rests):
            self.told[key] += count
        if totals.full:
            self.tally.fold(totals.exits)
        assert self.told.total() <= self.happened.total()


VCPU = 0xFFFF8CC582EE0000
EXITS = st.tuples(st.integers(0, 5), st.booleans())


@given(st.lists(st.tuples(st.lists(EXITS, max_size=8), st.lists(EXITS, max_size=4)), max_size=12))
def test_exits_without_an_entry_lose_their_address_only(
    rounds: list[tuple[list[tuple[int, bool]], list[tuple[int, bool]]]],
) -> None:
    """``rounds``: exits before the counts are read, and exits before the ring is read then."""
    kernel = FullKernel()
    for early, late in rounds:
        for address, kept in early:
            kernel.exit(address, kept=kept)
        totals = kernel.totals()
        for address, kept in late:
            kernel.exit(address, kept=kept)
        kernel.settle(totals)
    for _ in range(2):
        kernel.settle(kernel.totals())
    assert kernel.told.total() == kernel.happened.total()
    assert not kernel.told - kernel.happened - Counter({ExitKey(VCPU, -14, 39): 1 << 32})
    # Two entries, and the one for all the rest: nothing else is remembered.
    kernel.settle(kernel.totals())
    assert len(kernel.tally) <= 3


def test_what_has_no_entry_even_together_is_lost() -> None:
    tally = Tally[ExitKey](hist.rest_of)
    tally.event(POISON)
    tally.total({BARE: 3})
    assert tally.rests({}) == []
    assert tally.lost(4) == 3
    # Those of a vCPU that has such an entry are counted there.
    tally.rests({ExitKey(POISON.vcpu, -133, 39): 0})
    assert tally.lost(6) == 3
