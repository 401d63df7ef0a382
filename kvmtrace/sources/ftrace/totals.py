"""Exact counts, made in the kernel by hist triggers (ProbeRequest.triggers) and read here.

A trigger sees every event, whether or not the ring had room for it (kernel/trace/trace.h,
__event_trigger_test_discard: triggers come before the filter, and with a filter the entry is built
outside of the ring). Entries are never removed, as clearing would lose hits of that moment. If a
trigger by address has no entry left, the trigger by vCPU and kind still counts the exit: it is
"unkeyed".
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Collection, Iterable, Mapping
from dataclasses import dataclass, field
from typing import NamedTuple

from kvmtrace.linux.tracefs.histogram import Block, signed


class ExitKey(NamedTuple):
    """What exits are counted by. ``gpa``, ``flags``: of annotated exits only."""

    vcpu: int
    ret: int
    reason: int
    gpa: int | None = None
    flags: int | None = None


def unkeyed_key_of(key: ExitKey) -> ExitKey | None:
    """The key of an annotated exit that has no entry for its address; None for other exits."""
    return None if key.gpa is None else ExitKey(key.vcpu, key.ret, key.reason)


class VcpuOwner(NamedTuple):
    """The VM (address of ``struct kvm``), number and process of a vCPU; None is unknown."""

    kvm: int
    vid: int
    tgid: int | None


class RefusalKey(NamedTuple):
    """A page that guest_memfd refused: address of ``struct kvm``, and gfn."""

    kvm: int
    gfn: int


class SignalKey(NamedTuple):
    """What signals are counted by: the function (probe), the thread, code and address."""

    probe: str
    tid: int
    code: int
    addr: int


class SignalDetails(NamedTuple):
    """What is counted along with signals; None where it is not."""

    lsb: int | None = None
    tgid: int | None = None


@dataclass(slots=True)
class KernelTotals:
    """One reading of all triggers. ``…_without_entry``: hits that the kernel had no entry for."""

    exits: dict[ExitKey, int] = field(default_factory=dict)
    sizes: dict[ExitKey, int] = field(default_factory=dict)
    vcpu_owners: dict[int, dict[VcpuOwner, int]] = field(default_factory=dict)
    exits_without_entry: int = 0
    refusals: dict[RefusalKey, int] = field(default_factory=dict)
    refusal_pids: dict[int, int] = field(default_factory=dict)
    """{address of struct kvm: process}"""
    refusals_without_entry: int = 0
    gmem_efault_vms: set[int] | None = None
    """Addresses of VMs whose guest_memfd failed with EFAULT; None if not all were counted."""
    signals: dict[SignalKey, int] = field(default_factory=dict)
    signal_details: dict[SignalKey, SignalDetails] = field(default_factory=dict)
    signals_without_entry: int = 0
    unkeyed: dict[ExitKey, int] = field(default_factory=dict)
    """Annotated exits without an entry for their address; not in ``exits``."""
    full: bool = False
    """No entries are left: a key that is not in ``exits`` now will never be."""

    def of(self, vcpus: Collection[int]) -> KernelTotals:
        """The same reading, with the exits of these vCPUs only."""
        exits = {key: count for key, count in self.exits.items() if key.vcpu in vcpus}
        unkeyed = {key: count for key, count in self.unkeyed.items() if key.vcpu in vcpus}
        return KernelTotals(
            exits, self.sizes, unkeyed=unkeyed, gmem_efault_vms=self.gmem_efault_vms
        )

    def owner(self, vcpu: int) -> VcpuOwner | None:
        """The most frequent owner of a vCPU; its address may have been used before."""
        candidates = self.vcpu_owners.get(vcpu)
        return max(candidates, key=lambda owner: candidates[owner]) if candidates else None

    def add(self, event: str, blocks: Iterable[Block]) -> None:
        """Add the ``hist`` file of one event."""
        without_entry: dict[int, int] = {}  # by errno
        for block in blocks:
            match event:
                case "run" | "vncr":
                    self._run(block, without_entry)
                case "gmem" if ",ret" in block.keys:
                    self._gmem_failures(block)
                case "gmem":
                    self._refusals(block)
                case "sigbus" | "sigbus_forced":
                    self._signals(event, block)

        self._subtract_keyed(without_entry)

    def _run(self, block: Block, without_entry: dict[int, int]) -> None:
        names_owner = ",kvm" in block.keys
        ret = None if names_owner else re.match(r"ret == (-?\d+)", block.condition)
        if ret is not None and int(ret[1]):
            without_entry[int(ret[1])] = block.dropped
        elif not names_owner:
            self.exits_without_entry += block.dropped
        for parts, count, means in block.rows:
            try:
                vcpu = int(parts[0], 16)
                if names_owner:
                    owner = VcpuOwner(int(parts[1], 16), int(parts[2]), means.get("tgid") or None)
                    self.vcpu_owners.setdefault(vcpu, {})[owner] = count
                    continue
                if ret is not None:
                    key = ExitKey(vcpu, int(ret[1]), 39, int(parts[1], 16), int(parts[2], 16))
                    if "size" in means:
                        self.sizes[key] = means["size"]
                else:
                    key = ExitKey(vcpu, signed(int(parts[1])), int(parts[2]))
            except (ValueError, IndexError):
                self.exits_without_entry += 0 if names_owner else count
                continue
            self.exits[key] = self.exits.get(key, 0) + count

    def _subtract_keyed(self, without_entry: Mapping[int, int]) -> None:
        """Turn counts by kind into ``unkeyed``: subtract what is counted by address.

        Exits go on while the blocks are read, so the difference may be too large. It is limited to
        the number of hits that the kernel had no entry for.
        """
        left = dict(without_entry)
        self.full |= any(left.values())
        keyed: Counter[ExitKey | None] = Counter()
        for key, count in self.exits.items():
            keyed[unkeyed_key_of(key)] += count
        for key in [key for key in self.exits if key.gpa is None and key.reason == 39]:
            if key.ret in left:
                count = min(max(0, self.exits.pop(key) - keyed[key]), left[key.ret])
                self.unkeyed[key] = count
                left[key.ret] -= count

    def gmem_never_failed(self, struct: int) -> bool:
        """Whether guest_memfd of this VM never failed: its annotated EFAULTs are conversions.

        This holds for the exits counted here only if ``gmem`` was read after them.
        """
        return self.gmem_efault_vms is not None and struct not in self.gmem_efault_vms

    def _gmem_failures(self, block: Block) -> None:
        try:
            found = {int(parts[0], 16) for parts, _, _ in block.rows}
        except (ValueError, IndexError):
            return
        if not block.dropped:
            self.gmem_efault_vms = found

    def _refusals(self, block: Block) -> None:
        self.refusals_without_entry += block.dropped
        for parts, count, means in block.rows:
            try:
                key = RefusalKey(int(parts[0], 16), int(parts[1], 16))
            except (ValueError, IndexError):
                self.refusals_without_entry += count
                continue
            self.refusals[key] = count
            if means.get("tgid"):
                self.refusal_pids[key.kvm] = means["tgid"]

    def _signals(self, event: str, block: Block) -> None:
        self.signals_without_entry += block.dropped
        for parts, count, means in block.rows:
            try:
                key = SignalKey(event, int(parts[0]), signed(int(parts[1])), int(parts[2], 16))
            except (ValueError, IndexError):
                self.signals_without_entry += count
                continue
            self.signals[key] = count
            self.signal_details[key] = SignalDetails(means.get("lsb"), means.get("tgid"))
