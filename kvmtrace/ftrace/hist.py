"""Exact counts, made in the kernel: hist triggers on the ``run`` event.

A trigger sees every failed KVM_RUN, whether or not the ring had room for the event
(kernel/trace/trace.h, __event_trigger_test_discard: triggers come before the filter, and with a
filter the entry is built outside of the ring). Three keys are all that a trigger takes, so there is
one trigger per kind of exit, and one that tells which VM and vCPU a ``struct kvm_vcpu`` is.
"""

from __future__ import annotations

import re
from collections.abc import Collection, Iterable
from dataclasses import dataclass, field
from typing import NamedTuple

ENTRIES = 4096  # per trigger; a power of two, allocated at once by the kernel

_FAILED = "ret < 0 && ret != -4 && ret != -11"
_ANNOTATED = "reason == 39 && (ret == -14 || ret == -133)"


class ExitKey(NamedTuple):
    """What makes exits "the same". ``gpa``, ``flags``: only where the exit is annotated."""

    vcpu: int
    ret: int
    reason: int
    gpa: int | None = None
    flags: int | None = None


class Whose(NamedTuple):
    """``struct kvm`` and number of a vCPU, and its process (None: not told)."""

    kvm: int
    vid: int
    tgid: int | None


def triggers(fields: Iterable[str]) -> dict[str, str]:
    """{name: trigger} for the ``run`` event with these fields."""
    have = set(fields)
    annotates = {"gpa", "flags"} <= have
    size = ",size" if "size" in have else ""
    pid = ",tgid" if "tgid" in have else ""
    bare = f"{_FAILED} && !({_ANNOTATED})" if annotates else _FAILED
    found = {
        "bare": f"hist:keys=vcpu.hex,ret,reason:vals=hitcount:size={ENTRIES} if {bare}",
        "whose": f"hist:keys=vcpu.hex,kvm.hex,vid:vals=hitcount{pid}:size={ENTRIES} if {_FAILED}",
    }
    if annotates:
        keys = f"keys=vcpu.hex,gpa.hex,flags.hex:vals=hitcount{size}:size={ENTRIES}"
        for ret in (-133, -14):
            found[f"fault{ret}"] = f"hist:{keys} if ret == {ret} && reason == 39"
    return found


@dataclass(slots=True)
class Totals:
    """One reading of all triggers: exits by key, who the vCPUs are, exits no entry was left for."""

    exits: dict[ExitKey, int] = field(default_factory=dict)
    sizes: dict[ExitKey, int] = field(default_factory=dict)
    whose: dict[int, dict[Whose, int]] = field(default_factory=dict)
    dropped: int = 0

    def of(self, vcpus: Collection[int]) -> Totals:
        """Those of some vCPUs only."""
        exits = {key: count for key, count in self.exits.items() if key.vcpu in vcpus}
        return Totals(exits, self.sizes)


_BLOCK = re.compile(r"^# trigger info: hist:(?P<spec>.*)$", re.MULTILINE)
_ROW = re.compile(r"^\{ (?P<key>[^}]*) \} hitcount: +(?P<count>\d+)(?P<values>.*)$", re.MULTILINE)
_VALUE = re.compile(r"(\w+): +(\d+)")


def parse(text: str) -> Totals:
    """From the text of the event's ``hist`` file."""
    totals = Totals()
    blocks = list(_BLOCK.finditer(text))
    for index, block in enumerate(blocks):
        end = blocks[index + 1].start() if index + 1 < len(blocks) else len(text)
        body = text[block.end() : end]
        condition = block["spec"].partition(" if ")[2]
        whose = ",kvm" in block["spec"].partition(":vals=")[0]
        if not whose:
            dropped = re.search(r"^ +Dropped: (\d+)", body, re.MULTILINE)
            totals.dropped += int(dropped[1]) if dropped else 0
        ret = re.match(r"ret == (-\d+)", condition)
        for row in _ROW.finditer(body):
            parts = [part.partition(":")[2].strip() for part in row["key"].split(",")]
            count = int(row["count"])
            # A value is the sum over all hits: of equal numbers, it tells the number.
            means = {
                name: int(total) // count
                for name, total in _VALUE.findall(row["values"])
                if int(total) % count == 0
            }
            vcpu = int(parts[0], 16)
            if whose:
                who = Whose(int(parts[1], 16), int(parts[2]), means.get("tgid") or None)
                totals.whose.setdefault(vcpu, {})[who] = count
                continue
            if ret is not None:
                key = ExitKey(vcpu, int(ret[1]), 39, int(parts[1], 16), int(parts[2], 16))
                if "size" in means:
                    totals.sizes[key] = means["size"]
            else:
                key = ExitKey(vcpu, _signed(int(parts[1])), int(parts[2]))
            totals.exits[key] = totals.exits.get(key, 0) + count
    return totals


class Tally:
    """Reconciles events with totals, so that what is told adds up to what happened.

    An exit is known by its event (``event``), by the kernel's total (``total``), or both. What was
    told of a key is never more than its exits so far, and after ``totals`` never less than the
    total: the larger of "events seen" and "kernel's total" is told, each exit once.
    """

    def __init__(self) -> None:
        self._seen: dict[ExitKey, int] = {}
        self._told: dict[ExitKey, int] = {}
        self._in_kernel: set[ExitKey] = set()
        self._lost = 0

    def event(self, key: ExitKey) -> bool:
        """An event of this key was read: whether it has to be told now."""
        seen = self._seen[key] = self._seen.get(key, 0) + 1
        if seen <= self._told.get(key, 0):
            return False
        self._told[key] = seen
        return True

    def total(self, totals: Totals) -> list[tuple[ExitKey, int]]:
        """Exits of which no event came: [(key, how many)], told by this."""
        owed = []
        self._in_kernel.update(totals.exits)
        for key, total in totals.exits.items():
            told = self._told.get(key, 0)
            if total > told:
                owed.append((key, total - told))
                self._told[key] = total
        return owed

    def lost(self, totals: Totals) -> int:
        """Exits newly lost: those the kernel had no entry for, less those whose events came."""
        if not totals.dropped:
            return 0
        seen = sum(n for key, n in self._seen.items() if key not in self._in_kernel)
        lost = max(0, totals.dropped - seen)
        fresh, self._lost = max(0, lost - self._lost), max(lost, self._lost)
        return fresh

    def __len__(self) -> int:
        return len(self._told)


def _signed(number: int) -> int:
    return number - (1 << 64) if number >> 63 else number
