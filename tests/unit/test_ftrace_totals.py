"""Exact counts: the kernel's totals reconciled with the events that came."""

from __future__ import annotations

import re
from collections import Counter

from hypothesis import given
from hypothesis import strategies as st

from kvmtrace.linux.tracefs.histogram import HistogramReader
from kvmtrace.sources.ftrace.attach import PROBES
from kvmtrace.sources.ftrace.totals import (
    ExitKey,
    KernelTotals,
    RefusalKey,
    SignalDetails,
    SignalKey,
    VcpuOwner,
    unkeyed_key_of,
)
from kvmtrace.sources.tally import Tally

# As read on Linux 7.3.4.
TEXT = """# event histogram
#
# trigger info: hist:keys=vcpu.hex,ret,reason:vals=hitcount:sort=hitcount:size=4096 if ret < 0 && ret != -4 && ret != -11 [active]
#

{ vcpu: ffff8c0801610000, ret: 18446744073709551602, reason:          0 } hitcount:          2
{ vcpu: ffff8c0806e156d0, ret: 18446744073709551483, reason:         39 } hitcount:         21

KernelTotals:
    Hits: 23
    Entries: 2
    Dropped: 0


# event histogram
#
# trigger info: hist:keys=vcpu.hex,kvm.hex,vid:vals=hitcount,tgid:sort=hitcount:size=4096 if ret < 0 && ret != -4 && ret != -11 [active]
#

{ vcpu: ffff8c0801610000, kvm: ffff8c080160a000, vid:          0 } hitcount:          2  tgid:        300
{ vcpu: ffff8c0806e156d0, kvm: ffff8c0801814000, vid:          1 } hitcount:         21  tgid:       3066

KernelTotals:
    Hits: 23
    Entries: 2
    Dropped: 0


# event histogram
#
# trigger info: hist:keys=vcpu.hex,gpa.hex,flags.hex:vals=hitcount,size:sort=hitcount:size=4096 if ret == -133 && reason == 39 [active]
#

{ vcpu: ffff8c0806e156d0, gpa: 108000, flags: 0 } hitcount:         21  size:      86016

KernelTotals:
    Hits: 21
    Entries: 1
    Dropped: 0


# event histogram
#
# trigger info: hist:keys=vcpu.hex,gpa.hex,flags.hex:vals=hitcount,size:sort=hitcount:size=4096 if ret == -14 && reason == 39 [active]
#


KernelTotals:
    Hits: 0
    Entries: 0
    Dropped: 0
"""  # noqa: E501 (as the kernel prints it)

BARE = ExitKey(0xFFFF8C0801610000, -14, 0)
POISON = ExitKey(0xFFFF8C0806E156D0, -133, 39, 0x108000, 0)
REST = ExitKey(POISON.vcpu, -133, 39)


def counted(*texts: str, event: str = "run") -> KernelTotals:
    """The totals of a file that has these texts one after the other, and then the last."""
    left = list(texts)
    totals = KernelTotals()
    blocks = HistogramReader().read(event, lambda: left.pop(0) if len(left) > 1 else left[0])
    totals.add(event, blocks)
    return totals


def triggers(probe: str, fields: list[str]) -> tuple[str, ...]:
    """How the kernel counts a probe that has these fields."""
    return PROBES[probe].triggers(fields)


def with_dropped(*dropped: int) -> str:
    """The text, had there been no entries left in its first, second, … trigger."""
    parts = TEXT.split("Dropped: 0")
    numbers = [*dropped, *[0] * (len(parts) - 1 - len(dropped))]
    return "".join(f"{part}Dropped: {n}" for part, n in zip(parts, numbers, strict=False))


def test_the_hist_file_is_parsed() -> None:
    totals = counted(TEXT)
    assert totals.exits == {BARE: 2, POISON: 21}
    assert totals.sizes == {POISON: 4096}
    assert totals.vcpu_owners == {
        BARE.vcpu: {VcpuOwner(0xFFFF8C080160A000, 0, 150): 2},
        POISON.vcpu: {VcpuOwner(0xFFFF8C0801814000, 1, 146): 21},
    }
    assert (totals.unkeyed, totals.full, totals.exits_without_entry) == ({REST: 0}, False, 0)
    # A sum that no one number explains gives none.
    odd = counted(TEXT.replace("3066", "3067").replace("86016", "86017"))
    assert list(odd.vcpu_owners[POISON.vcpu]) == [VcpuOwner(0xFFFF8C0801814000, 1, None)]
    assert odd.sizes == {}
    assert counted("") == KernelTotals()


def test_a_row_caught_in_a_hit_is_read_again() -> None:
    """Its hits were printed, one more came, and then its values were printed."""
    # After 21 hits, of a process 146: 21 x 4096, 21 x 146.
    torn = TEXT.replace("86016", "90112").replace("3066", "3212")
    # Of a single hit, what is caught looks like a number as good as any.
    first = re.sub(r"hitcount: +21  (\w+: +)(?:86016|3066)", r"hitcount: 1  \g<1>8192", TEXT)
    assert first.count("8192") == 2
    second = first.replace("8192", "12288")
    for caught in (torn, first):
        assert counted(caught, TEXT).sizes == {POISON: 4096}
        assert counted(TEXT, caught, TEXT).sizes == {POISON: 4096}
        assert counted(caught, TEXT, second, TEXT).sizes == {POISON: 4096}
    never = counted(first, TEXT, second, first.replace("8192", "4711"))
    assert (never.exits[POISON], never.sizes) == (1, {})
    # Not over yet, and as often as it is read.
    assert counted(first.replace("8192", "0")).sizes == {}
    assert counted(first.replace("hitcount: 1 ", "hitcount: 0 ")).sizes == {}


def test_what_begins_between_two_readings_waits_for_the_next() -> None:
    """New places each time that the file is read: those of the first time are certain."""
    row = "{ vcpu: ffff8c0806e156d0, gpa: 108000, flags: 0 }"
    place = next(line for line in TEXT.splitlines() if line.startswith(row))
    more = [place.replace("108000", f"10{page}000") for page in "9abc"]
    texts = [TEXT.replace(place, "\n".join([place, *more[:n]])) for n in range(5)]
    totals = counted(*texts)
    assert (totals.exits, totals.sizes) == ({BARE: 2, POISON: 21}, {POISON: 4096})
    assert len(counted(texts[-1]).sizes) == 5


def test_what_is_known_is_not_read_again() -> None:
    reader, readings = HistogramReader(), []

    def read() -> str:
        readings.append(TEXT)
        return TEXT

    for _ in range(3):
        reader.read("run", read)
    assert len(readings) == 2 + 1 + 1


def test_what_had_no_entry_is_counted_by_the_first_trigger() -> None:
    more = "reason:         39 } hitcount:         "
    totals = counted(with_dropped(3, 7, 9).replace(f"{more}21", f"{more}30"))
    assert totals.exits == {BARE: 2, POISON: 21}
    assert (totals.unkeyed, totals.full) == ({REST: 9}, True)
    # That no entry was left to name a vCPU's VM loses no exit.
    assert totals.exits_without_entry == 3
    # Exits between the blocks' readings are not taken for such without an entry.
    assert counted(TEXT.replace(f"{more}21", f"{more}30")).unkeyed == {REST: 0}
    assert counted(TEXT.replace(f"{more}21", f"{more}20")).unkeyed == {REST: 0}


def test_triggers_count_every_failed_exit() -> None:
    full = triggers("run", ["vcpu", "ret", "reason", "gpa", "flags", "size", "tgid"])
    assert len(full) == 4
    assert full[0].endswith("if ret < 0 && ret != -4 && ret != -11")
    assert "vals=hitcount,size" in full[2]
    lean = triggers("run", ["vcpu", "ret", "reason"])
    assert lean == (full[0], full[1].replace(",tgid", ""))
    assert triggers("poison", ["pfn"]) == ()


def test_memory_faults_without_an_errno_are_counted() -> None:
    """arm64's nested virtualization: a probe of its own."""
    where, whose = triggers("vncr", ["vcpu", "kvm", "vid", "gpa", "flags", "size", "tgid"])
    assert where.endswith("if ret == 0 && reason == 39")
    text = (
        f"# trigger info: {where} [active]\n#\n\n"
        "{ vcpu: ffff8c0806e156d0, gpa: 108000, flags: 0 } hitcount:         21  size:      86016\n"
        "\nTotals:\n    Hits: 23\n    Entries: 1\n    Dropped: 2\n\n\n"
        f"# trigger info: {whose} [active]\n#\n\n"
        "{ vcpu: ffff8c0806e156d0, kvm: ffff8c0801814000, vid: 1 } hitcount: 21  tgid: 3066\n"
    )
    totals = counted(text, event="vncr")
    key = ExitKey(POISON.vcpu, 0, 39, 0x108000, 0)
    assert (totals.exits, totals.sizes, totals.exits_without_entry) == ({key: 21}, {key: 4096}, 2)
    assert totals.vcpu_owners == {POISON.vcpu: {VcpuOwner(0xFFFF8C0801814000, 1, 146): 21}}
    assert (totals.unkeyed, totals.full) == ({}, False)


def test_vms_whose_guest_memfd_never_failed() -> None:
    _, failing = triggers("gmem", ["kvm", "gfn", "ret"])
    text = f"# trigger info: {failing} [active]\n#\n\n"
    row = "{ kvm: ffff8cc583666000, ret: 18446744073709551602 } hitcount:          7\n"
    ends = "\nTotals:\n    Hits: 7\n    Entries: 1\n    Dropped: %d\n"
    totals = counted(text + row + ends % 0, event="gmem")
    assert totals.gmem_efault_vms == {0xFFFF8CC583666000}
    assert not totals.gmem_never_failed(0xFFFF8CC583666000)
    assert totals.gmem_never_failed(VCPU)
    assert totals.of({VCPU}).gmem_never_failed(VCPU)
    assert counted(text + ends % 0, event="gmem").gmem_never_failed(VCPU)
    # Nobody counted, or not all of it.
    for content in ("", text + row + ends % 1, text + row.replace("ffff8cc583666000", "no")):
        assert not counted(content, event="gmem").gmem_never_failed(VCPU)


def test_signals_and_refusals_are_counted_too() -> None:
    (to_other,) = triggers("sigbus", ["code", "addr", "lsb", "tid", "tgid"])
    (to_self,) = triggers("sigbus_forced", ["code", "addr", "lsb"])
    assert "keys=tid,code,addr.hex:vals=hitcount,lsb,tgid" in to_other
    assert "keys=common_pid,code,addr.hex:vals=hitcount,lsb:" in to_self
    totals = counted(
        "# trigger info: hist:keys=tid,code,addr.hex:vals=hitcount,lsb,tgid:sort=hitcount:size=4096"
        " if code == 4 || code == 5 [active]\n#\n\n"
        "{ tid:        186, code:          4, addr: 7f0d20003000 } hitcount:       3000"
        "  lsb:      36000  tgid:     555000\n\nTotals:\n    Hits: 3000\n    Dropped: 2\n",
        event="sigbus",
    )
    key = SignalKey("sigbus", 186, 4, 0x7F0D20003000)
    assert totals.signals == {key: 3000}
    assert totals.signal_details == {key: SignalDetails(12, 185)}
    assert totals.signals_without_entry == 2
    totals = counted(
        "# trigger info: hist:keys=kvm.hex,gfn.hex:vals=hitcount,tgid:sort=hitcount:size=4096"
        " if ret == -133 [active]\n#\n\n"
        "{ kvm: ffff8cc583666000, gfn: 103 } hitcount:          7  tgid:       1295\n",
        event="gmem",
    )
    assert totals.refusals == {RefusalKey(0xFFFF8CC583666000, 0x103): 7}
    assert totals.refusal_pids == {0xFFFF8CC583666000: 185}


def test_events_are_reported_as_they_come_and_totals_add_the_rest() -> None:
    tally = Tally[ExitKey]()
    assert [tally.event(BARE) for _ in range(3)] == [True] * 3
    assert tally.total({BARE: 3}) == []
    assert tally.total({BARE: 10}) == [(BARE, 7)]
    # The total had these already.
    assert [tally.event(BARE) for _ in range(7)] == [False] * 7
    assert tally.event(BARE) is True


def test_what_the_kernel_had_no_entry_for_is_lost_unless_its_event_came() -> None:
    tally = Tally[ExitKey]()
    for _ in range(5):
        tally.event(BARE)
    tally.total({POISON: 3})
    assert tally.newly_lost(5) == 0
    assert tally.newly_lost(9) == 4
    assert tally.newly_lost(9) == 0
    assert tally.newly_lost(10) == 1


@given(
    st.lists(
        st.tuples(st.sampled_from(["kept", "dropped", "read"]), st.integers(1, 5)), max_size=60
    )
)
def test_the_sum_of_what_is_reported_is_what_happened(steps: list[tuple[str, int]]) -> None:
    """However events are dropped and whenever totals are read, no exit is reported twice or not."""
    tally = Tally[ExitKey]()
    happened = reported = 0
    in_ring = 0
    for what, count in [*steps, ("read", 1)]:
        if what == "read":
            totals = {BARE: happened}
            # Some of the events may be read before, others after the totals.
            early = in_ring // count
            reported += sum(tally.event(BARE) for _ in range(early))
            reported += sum(n for _, n in tally.total(totals))
            reported += sum(tally.event(BARE) for _ in range(in_ring - early))
            in_ring = 0
            assert reported == happened
        else:
            happened += count
            in_ring += count if what == "kept" else 0
    assert reported == happened


class FullKernel:
    """A kernel with room for two addresses, a ring that drops, and who reads both."""

    def __init__(self) -> None:
        self.tally = Tally[ExitKey](unkeyed_key_of)
        self.happened: Counter[ExitKey] = Counter()
        self.reported: Counter[ExitKey] = Counter()
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

    def totals(self) -> KernelTotals:
        unkeyed = {ExitKey(VCPU, -14, 39): self.dropped}
        return KernelTotals(dict(self.entries), unkeyed=unkeyed, full=self.dropped > 0)

    def settle(self, totals: KernelTotals) -> None:
        """As FtraceTranslator.batch does: what the ring has is reported before the counts."""
        for key in self.ring:
            self.reported[key] += self.tally.event(key)
        self.ring.clear()
        for key, count in self.tally.total(totals.exits) + self.tally.unkeyed(totals.unkeyed):
            self.reported[key] += count
        if totals.full:
            self.tally.forget_unkeyed(totals.exits)
        assert self.reported.total() <= self.happened.total()


VCPU = BARE.vcpu
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
    assert kernel.reported.total() == kernel.happened.total()
    assert not kernel.reported - kernel.happened - Counter({ExitKey(VCPU, -14, 39): 1 << 32})
    # Two entries, and the one for all the rest: nothing else is remembered.
    kernel.settle(kernel.totals())
    assert len(kernel.tally) <= 3


def test_what_has_no_entry_even_together_is_lost() -> None:
    tally = Tally[ExitKey](unkeyed_key_of)
    tally.event(POISON)
    tally.total({BARE: 3})
    assert tally.unkeyed({}) == []
    assert tally.newly_lost(4) == 3
    # Those of a vCPU that has such an entry are counted there.
    tally.unkeyed({ExitKey(POISON.vcpu, -133, 39): 0})
    assert tally.newly_lost(6) == 3


def test_a_row_that_makes_no_sense_is_counted_as_one_without_an_entry() -> None:
    broken = TEXT.replace("vcpu: ffff8c0801610000, ret", "vcpu: no, ret")
    totals = counted(broken)
    assert (totals.exits, totals.exits_without_entry) == ({POISON: 21}, 2)
    other = "# trigger info: hist:keys=kvm.hex,gfn.hex:vals=hitcount [active]\n#\n\n"
    totals = counted(f"{other}{{ kvm: ff }} hitcount:          7\n", event="gmem")
    assert (totals.refusals, totals.refusals_without_entry) == ({}, 7)
    totals = counted(
        f"{other}{{ tid: x, code: 4, addr: 7 }} hitcount:          7\n", event="sigbus"
    )
    assert (totals.signals, totals.signals_without_entry) == ({}, 7)
