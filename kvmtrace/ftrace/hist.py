"""Exact counts, made in the kernel: hist triggers on the events that come in storms.

A trigger sees every event, whether or not the ring had room for it (kernel/trace/trace.h,
__event_trigger_test_discard: triggers come before the filter, and with a filter the entry is built
outside of the ring). Three keys are all that a trigger takes, so failed exits have one trigger per
kind of exit, and one that tells which VM and vCPU a ``struct kvm_vcpu`` is.
"""

from __future__ import annotations

import re
from collections.abc import Collection, Iterable, Iterator
from dataclasses import dataclass, field
from typing import NamedTuple

from kvmtrace.ftrace.fields import FAILED

ENTRIES = 4096  # per trigger; a power of two, allocated at once by the kernel

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


class RefusedKey(NamedTuple):
    """A page that guest_memfd refused: ``struct kvm`` and gfn."""

    kvm: int
    gfn: int


class SignalKey(NamedTuple):
    """What makes signals "the same": by which function, to which thread, and for which address."""

    probe: str
    tid: int
    code: int
    addr: int


class SignalFacts(NamedTuple):
    """What the counts tell beside; None where they do not."""

    lsb: int | None = None
    tgid: int | None = None


def triggers(event: str, fields: Iterable[str]) -> tuple[str, ...]:
    """The triggers for an event that has these fields; () where nothing counts it."""
    have = set(fields)
    size = f":size={ENTRIES}"

    def values(*wanted: str) -> str:
        return ",".join(["vals=hitcount", *(name for name in wanted if name in have)])

    match event:
        case "gmem":
            return (f"hist:keys=kvm.hex,gfn.hex:{values('tgid')}{size} if ret == -133",)
        case "sigbus" | "sigbus_forced":
            tid = "tid" if "tid" in have else "common_pid"
            codes = "code == 4 || code == 5"
            return (f"hist:keys={tid},code,addr.hex:{values('lsb', 'tgid')}{size} if {codes}",)
        case "run":
            annotates = {"gpa", "flags"} <= have
            bare = f"{FAILED} && !({_ANNOTATED})" if annotates else FAILED
            found: tuple[str, ...] = (
                f"hist:keys=vcpu.hex,ret,reason:vals=hitcount{size} if {bare}",
                f"hist:keys=vcpu.hex,kvm.hex,vid:{values('tgid')}{size} if {FAILED}",
            )
            if annotates:
                keys = f"keys=vcpu.hex,gpa.hex,flags.hex:{values('size')}{size}"
                for ret in (-133, -14):
                    found += (f"hist:{keys} if ret == {ret} && reason == 39",)
            return found
    return ()


@dataclass(slots=True)
class Totals:
    """One reading of all triggers: counts by key, who the vCPUs are, what no entry was left for."""

    exits: dict[ExitKey, int] = field(default_factory=dict)
    sizes: dict[ExitKey, int] = field(default_factory=dict)
    whose: dict[int, dict[Whose, int]] = field(default_factory=dict)
    dropped: int = 0
    refused: dict[RefusedKey, int] = field(default_factory=dict)
    refusers: dict[int, int] = field(default_factory=dict)
    """{struct kvm: process}"""
    refused_dropped: int = 0
    signals: dict[SignalKey, int] = field(default_factory=dict)
    facts: dict[SignalKey, SignalFacts] = field(default_factory=dict)
    signals_dropped: int = 0

    def of(self, vcpus: Collection[int]) -> Totals:
        """Exits of some vCPUs only."""
        exits = {key: count for key, count in self.exits.items() if key.vcpu in vcpus}
        return Totals(exits, self.sizes)

    def owner(self, vcpu: int) -> Whose | None:
        """Whose a vCPU most likely is: its address may have been used before."""
        candidates = self.whose.get(vcpu)
        return max(candidates, key=lambda whose: candidates[whose]) if candidates else None

    def read(self, event: str, text: str) -> None:
        """Add what the ``hist`` file of an event says."""
        for block in _blocks(text):
            match event:
                case "run":
                    self._run(block)
                case "gmem":
                    self._refused(block)
                case "sigbus" | "sigbus_forced":
                    self._signals(event, block)

    def _run(self, block: _Block) -> None:
        whose = ",kvm" in block.keys
        self.dropped += 0 if whose else block.dropped
        ret = re.match(r"ret == (-\d+)", block.condition)
        for parts, count, means in block.rows:
            vcpu = int(parts[0], 16)
            if whose:
                who = Whose(int(parts[1], 16), int(parts[2]), means.get("tgid") or None)
                self.whose.setdefault(vcpu, {})[who] = count
                continue
            if ret is not None:
                key = ExitKey(vcpu, int(ret[1]), 39, int(parts[1], 16), int(parts[2], 16))
                if "size" in means:
                    self.sizes[key] = means["size"]
            else:
                key = ExitKey(vcpu, _signed(int(parts[1])), int(parts[2]))
            self.exits[key] = self.exits.get(key, 0) + count

    def _refused(self, block: _Block) -> None:
        self.refused_dropped += block.dropped
        for parts, count, means in block.rows:
            key = RefusedKey(int(parts[0], 16), int(parts[1], 16))
            self.refused[key] = count
            if means.get("tgid"):
                self.refusers[key.kvm] = means["tgid"]

    def _signals(self, event: str, block: _Block) -> None:
        self.signals_dropped += block.dropped
        for parts, count, means in block.rows:
            key = SignalKey(event, int(parts[0]), _signed(int(parts[1])), int(parts[2], 16))
            self.signals[key] = count
            self.facts[key] = SignalFacts(means.get("lsb"), means.get("tgid"))


_BLOCK = re.compile(r"^# trigger info: hist:(?P<spec>.*)$", re.MULTILINE)
_ROW = re.compile(r"^\{ (?P<key>[^}]*) \} hitcount: +(?P<count>\d+)(?P<values>.*)$", re.MULTILINE)
_VALUE = re.compile(r"(\w+): +(\d+)")


class _Block(NamedTuple):
    """One trigger's part of a ``hist`` file. ``rows``: (key's parts, count, {value: mean})."""

    keys: str
    condition: str
    dropped: int
    rows: list[tuple[list[str], int, dict[str, int]]]


def _blocks(text: str) -> Iterator[_Block]:
    blocks = list(_BLOCK.finditer(text))
    for index, block in enumerate(blocks):
        end = blocks[index + 1].start() if index + 1 < len(blocks) else len(text)
        body = text[block.end() : end]
        rows = []
        for row in _ROW.finditer(body):
            parts = [part.partition(":")[2].strip() for part in row["key"].split(",")]
            count = int(row["count"])
            # A value is the sum over all hits: of equal numbers, it tells the number.
            means = {
                name: int(total) // count
                for name, total in _VALUE.findall(row["values"])
                if int(total) % count == 0
            }
            rows.append((parts, count, means))
        dropped = re.search(r"^ +Dropped: (\d+)", body, re.MULTILINE)
        keys = block["spec"].partition(":vals=")[0]
        condition = block["spec"].partition(" if ")[2]
        yield _Block(keys, condition, int(dropped[1]) if dropped else 0, rows)


def parse(text: str) -> Totals:
    """From the text of ``run``'s ``hist`` file alone."""
    totals = Totals()
    totals.read("run", text)
    return totals


def _signed(number: int) -> int:
    return number - (1 << 64) if number >> 63 else number
