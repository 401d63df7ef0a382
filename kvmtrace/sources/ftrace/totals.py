"""Exact counts, made in the kernel: hist triggers on the events that come in storms.

A trigger sees every event, whether or not the ring had room for it (kernel/trace/trace.h,
__event_trigger_test_discard: triggers come before the filter, and with a filter the entry is built
outside of the ring). Three keys are all that a trigger takes, so failed exits have several: one
for all of them by vCPU and kind, one for each annotated kind by address, and one that names which
VM and vCPU a ``struct kvm_vcpu`` is. Entries are never taken back (clearing would lose what is
counted meanwhile): when one by address has none left, the first still counts the rest.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Collection, Iterable, Mapping
from dataclasses import dataclass, field
from typing import NamedTuple

from kvmtrace.linux.tracefs.histogram import Block, signed


class ExitKey(NamedTuple):
    """What makes exits "the same". ``gpa``, ``flags``: only where the exit is annotated."""

    vcpu: int
    ret: int
    reason: int
    gpa: int | None = None
    flags: int | None = None


def rest_of(key: ExitKey) -> ExitKey | None:
    """Under which key an annotated exit is counted when there is no entry for its address."""
    return None if key.gpa is None else ExitKey(key.vcpu, key.ret, key.reason)


class VcpuOwner(NamedTuple):
    """``struct kvm`` and number of a vCPU, and its process (None: not known)."""

    kvm: int
    vid: int
    tgid: int | None


class RefusalKey(NamedTuple):
    """A page that guest_memfd refused: ``struct kvm`` and gfn."""

    kvm: int
    gfn: int


class SignalKey(NamedTuple):
    """What makes signals "the same": by which function, to which thread, and for which address."""

    probe: str
    tid: int
    code: int
    addr: int


class SignalDetails(NamedTuple):
    """What the counts hold beside; None where they do not."""

    lsb: int | None = None
    tgid: int | None = None


@dataclass(slots=True)
class KernelTotals:
    """One reading of all triggers: counts by key, who the vCPUs are, what no entry was left for."""

    exits: dict[ExitKey, int] = field(default_factory=dict)
    sizes: dict[ExitKey, int] = field(default_factory=dict)
    whose: dict[int, dict[VcpuOwner, int]] = field(default_factory=dict)
    dropped: int = 0
    refused: dict[RefusalKey, int] = field(default_factory=dict)
    refusers: dict[int, int] = field(default_factory=dict)
    """{struct kvm: process}"""
    refused_dropped: int = 0
    failing: set[int] | None = None
    """``struct kvm`` of VMs of which guest_memfd failed with EFAULT; None: not all were counted."""
    signals: dict[SignalKey, int] = field(default_factory=dict)
    facts: dict[SignalKey, SignalDetails] = field(default_factory=dict)
    signals_dropped: int = 0
    rests: dict[ExitKey, int] = field(default_factory=dict)
    """Annotated exits that no entry was left for; 0 while there is room. Not in ``exits``."""
    full: bool = False
    """Some were left without an entry: what is not in ``exits`` by now will never be."""

    def of(self, vcpus: Collection[int]) -> KernelTotals:
        """Exits of some vCPUs only."""
        exits = {key: count for key, count in self.exits.items() if key.vcpu in vcpus}
        rests = {key: count for key, count in self.rests.items() if key.vcpu in vcpus}
        return KernelTotals(exits, self.sizes, rests=rests, failing=self.failing)

    def owner(self, vcpu: int) -> VcpuOwner | None:
        """Whose a vCPU most likely is: its address may have been used before."""
        candidates = self.whose.get(vcpu)
        return max(candidates, key=lambda whose: candidates[whose]) if candidates else None

    def add(self, event: str, blocks: Iterable[Block]) -> None:
        """Add what the ``hist`` file of an event says."""
        without_entry: dict[int, int] = {}  # by errno
        for block in blocks:
            match event:
                case "run" | "vncr":
                    self._run(block, without_entry)
                case "gmem" if ",ret" in block.keys:
                    self._failing(block)
                case "gmem":
                    self._refused(block)
                case "sigbus" | "sigbus_forced":
                    self._signals(event, block)

        self._split(without_entry)

    def _run(self, block: Block, without_entry: dict[int, int]) -> None:
        whose = ",kvm" in block.keys
        ret = None if whose else re.match(r"ret == (-?\d+)", block.condition)
        if ret is not None and int(ret[1]):
            without_entry[int(ret[1])] = block.dropped
        elif not whose:
            self.dropped += block.dropped
        for parts, count, means in block.rows:
            try:
                vcpu = int(parts[0], 16)
                if whose:
                    who = VcpuOwner(int(parts[1], 16), int(parts[2]), means.get("tgid") or None)
                    self.whose.setdefault(vcpu, {})[who] = count
                    continue
                if ret is not None:
                    key = ExitKey(vcpu, int(ret[1]), 39, int(parts[1], 16), int(parts[2], 16))
                    if "size" in means:
                        self.sizes[key] = means["size"]
                else:
                    key = ExitKey(vcpu, signed(int(parts[1])), int(parts[2]))
            except (ValueError, IndexError):
                self.dropped += 0 if whose else count
                continue
            self.exits[key] = self.exits.get(key, 0) + count

    def _split(self, without_entry: Mapping[int, int]) -> None:
        """Of the exits by kind, keep what those by address do not count.

        Exits go on while the blocks are read, so that the difference may be one too many; the
        kernel's own account of what it had no entry for has the last word.
        """
        left = dict(without_entry)
        self.full |= any(left.values())
        placed: Counter[ExitKey | None] = Counter()
        for key, count in self.exits.items():
            placed[rest_of(key)] += count
        for key in [key for key in self.exits if key.gpa is None and key.reason == 39]:
            if key.ret in left:
                rest = min(max(0, self.exits.pop(key) - placed[key]), left[key.ret])
                self.rests[key] = rest
                left[key.ret] -= rest

    def converts_only(self, struct: int) -> bool:
        """Whether all annotated EFAULTs of this VM are conversions: its guest_memfd never failed.

        To be true of exits counted here, this has to be read after they are.
        """
        return self.failing is not None and struct not in self.failing

    def _failing(self, block: Block) -> None:
        try:
            found = {int(parts[0], 16) for parts, _, _ in block.rows}
        except (ValueError, IndexError):
            return
        if not block.dropped:
            self.failing = found

    def _refused(self, block: Block) -> None:
        self.refused_dropped += block.dropped
        for parts, count, means in block.rows:
            try:
                key = RefusalKey(int(parts[0], 16), int(parts[1], 16))
            except (ValueError, IndexError):
                self.refused_dropped += count
                continue
            self.refused[key] = count
            if means.get("tgid"):
                self.refusers[key.kvm] = means["tgid"]

    def _signals(self, event: str, block: Block) -> None:
        self.signals_dropped += block.dropped
        for parts, count, means in block.rows:
            try:
                key = SignalKey(event, int(parts[0]), signed(int(parts[1])), int(parts[2], 16))
            except (ValueError, IndexError):
                self.signals_dropped += count
                continue
            self.signals[key] = count
            self.facts[key] = SignalDetails(means.get("lsb"), means.get("tgid"))
