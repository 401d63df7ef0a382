"""From what the eBPF programs send and count to events."""

from __future__ import annotations

import ctypes
import time
from collections.abc import Sequence
from typing import Any

from kvmtrace.events import Event, Lost
from kvmtrace.sources.bpf import records
from kvmtrace.sources.bpf.exits import BpfExits, ExitRecord
from kvmtrace.sources.bpf.hardware import BpfHardware, HwRecord, MceRecord
from kvmtrace.sources.bpf.maps import Maps
from kvmtrace.sources.bpf.poison import BpfPoison, PageRecord, PoisonRecord
from kvmtrace.sources.bpf.signals import BpfSignals, FaultRecord, SigbusRecord
from kvmtrace.sources.convert import Names
from kvmtrace.sources.vm_table import VmTable

RECORDS: dict[int, type[ctypes.Structure]] = {
    records.EXIT: ExitRecord,
    records.POISON: PoisonRecord,
    records.SIGBUS: SigbusRecord,
    records.FAULT: FaultRecord,
    records.MCE: MceRecord,
    records.VM_NEW: records.VmRecord,
    records.VM_GONE: records.VmRecord,
    records.HW: HwRecord,
    records.PAGE: PageRecord,
}
"""By ``Header.type``."""

# How often the kernel's counters are read while something is counted: there may be 16,384 of them.
READ_SECONDS = 1.0


class BpfTranslator:
    """Gives each record to its topic, reads the counters, and keeps the VMs.

    ``offset_ns``: epoch minus CLOCK_MONOTONIC. ``names``: page types and results as the kernel
    prints them, by number.
    """

    def __init__(self, offset_ns: int, names: Names, proc: str = "/proc") -> None:
        self._offset = offset_ns
        self._vms = VmTable(proc)
        self._poison = BpfPoison(self._vms, offset_ns, names)
        self._hardware = BpfHardware(offset_ns)
        self._next_read = self._next_losses = 0.0
        self._flushed = False
        self._start_over()

    def _start_over(self) -> None:
        self._exits = BpfExits(self._vms, self._offset)
        self._signals = BpfSignals(self._vms, self._offset)
        self._activity = 0
        self._lost = [0] * len(records.LOST_PLACES)

    def reset(self) -> list[Event]:
        """Forget the counters of earlier programs. The VMs that exist before any event."""
        self._start_over()
        return self._vms.scan(self._now())

    def key_for_struct(self, struct: int, generation: int, pid: int) -> tuple[int, list[Event]]:
        """The key of a VM that was found rather than reported, and its VmSeen if it is new."""
        return self._vms.key(struct, pid, self._now(), generation=generation)

    def struct_of(self, vm: int) -> tuple[int, int] | None:
        """Address and generation of a VM's struct kvm, if known."""
        return self._vms.struct_of(vm)

    def translate(self, raw: Sequence[bytes], maps: Maps) -> list[Event]:
        """Translate the records of one read of the ring buffer."""
        events: list[Event] = []
        # What is counted of a VM is counted before its end is recorded, so one reading of the
        # counters serves all VMs that end in these records.
        self._flushed = False
        for data in raw:
            header = records.Header.from_buffer_copy(data)
            record: Any = RECORDS[header.type].from_buffer_copy(data)
            if header.type != records.FAULT:
                events += self._signals.flush(header.tid)
            events += self._translate(header, record, maps)
        return events + self._signals.flush_overdue(self._now())

    def _translate(self, header: Any, record: Any, maps: Maps) -> list[Event]:
        match header.type:
            case records.EXIT:
                return self._exits.exit(record.key, record, header.ts, header.tid, header.tgid)
            case records.SIGBUS:
                return self._signals.signal(record)
            case records.FAULT:
                return self._signals.fault(record)
            case records.POISON:
                return self._poison.poison(record)
            case records.PAGE:
                return self._poison.page(record)
            case records.MCE:
                return [self._hardware.mce(record)]
            case records.HW:
                return [self._hardware.hw_error(record)]
            case records.VM_NEW:
                return self._vm_created(record, maps)
            case records.VM_GONE:
                return self._vm_gone(record, maps)
        return []

    def counters(self, maps: Maps, *, at_once: bool = False) -> list[Event]:
        """Events of what was counted and not reported, and of what was lost.

        Both are read once a second at most, or ``at_once`` if they will not be read again: there
        may be a call for every record, and each number is a system call.
        """
        events: list[Event] = []
        now = time.monotonic()
        is_due = at_once or now >= self._next_read
        if is_due and (active := maps.activity()) != self._activity:
            self._activity = active
            self._next_read = now + READ_SECONDS
            # Before the exits that they lead to: an exit that is counted meanwhile is not missing.
            refusals = maps.refusals()
            for key, count in maps.exits():
                events += self._exits.exit(key, count, count.last_ts, count.tid, count.tgid)
            for gfn, refused in refusals:
                events += self._exits.refusal(gfn, refused)
            events += self._signals.counted(maps.signals())
        if not at_once and now < self._next_losses:
            return events
        self._next_losses = now + READ_SECONDS
        lost = maps.lost()
        for place, total, before in zip(records.LOST_PLACES, lost, self._lost, strict=True):
            if total > before:
                events.append(Lost(self._now(), place, total - before))
        self._lost = lost
        return events

    def flush(self, maps: Maps) -> list[Event]:
        """Everything that is held back, before the programs are detached."""
        return self.counters(maps, at_once=True) + self.flush_pending_signals()

    def flush_pending_signals(self) -> list[Event]:
        """Signals that wait for their fault, as they are."""
        return self._signals.flush_all()

    def housekeeping(self) -> list[Event]:
        """The end of VMs that no record reported."""
        return self._vms.reap(self._now())

    def _vm_created(self, record: Any, maps: Maps) -> list[Event]:
        header = record.h
        events: list[Event] = []
        for generation in self._vms.generations(header.kvm):
            if generation != header.gen:
                events += self._flush_vm_counters((header.kvm, generation), maps)
        return events + self._vms.created(
            header.kvm,
            header.tgid,
            header.ts + self._offset,
            generation=header.gen,
            comm=record.comm.decode(errors="replace"),
        )

    def _vm_gone(self, record: Any, maps: Maps) -> list[Event]:
        header = record.h
        return self._flush_vm_counters((header.kvm, header.gen), maps) + self._vms.destroyed(
            header.kvm,
            header.tgid,
            header.ts + self._offset,
            generation=header.gen,
            comm=record.comm.decode(errors="replace"),
        )

    def _flush_vm_counters(self, struct: tuple[int, int], maps: Maps) -> list[Event]:
        """The events of all that was counted; then the counters of this VM are deleted."""
        events = self._signals.flush_vm(struct)  # their faults would have come by now
        if not self._flushed:
            events += self.counters(maps, at_once=True)
        self._flushed = True
        exits, refusals = self._exits.forget(struct)
        maps.forget_exits(exits)
        maps.forget_refusals(refusals)
        maps.forget_signals(self._signals.forget(struct))
        return events

    def _now(self) -> int:
        return time.monotonic_ns() + self._offset
