"""From what the eBPF programs say (records and counters) to events."""

from __future__ import annotations

import ctypes
import time
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any, Protocol

from kvmtrace import kvm, sanitize
from kvmtrace.events import (
    Event,
    Exit,
    GmemPoison,
    GmemRefusal,
    HwError,
    Lost,
    Mce,
    Owner,
    Poison,
    Sigbus,
    SoftOffline,
    Unpoison,
)
from kvmtrace.linux import cper, mce, smbios
from kvmtrace.sources.bpf import records
from kvmtrace.sources.bpf.signals import SignalCounts
from kvmtrace.sources.vm_table import VmTable

_HW_VIA: dict[int, tuple[str, Mapping[int, str]]] = {
    records.HW_MC_EVENT: ("ras:mc_event", cper.EDAC),
    records.HW_EXTLOG: ("ras:extlog_mem_event", cper.CPER),
    records.HW_APEI: ("GHES", cper.GHES),
    records.HW_ARM: ("ras:arm_event", cper.GHES),
    records.HW_NON_STANDARD: ("ras:non_standard_event", {}),
}

# How often the kernel's counters are read while something is counted: there may be 16,384 of them.
READ_SECONDS = 1.0

# A signal waits this long for the fault that it was sent from. That returns right after, but its
# thread may have to wait for a CPU in between.
SIGNAL_WAIT_NS = 500_000_000

_Names = tuple[Mapping[int, str], Mapping[int, str]]


class Counters(Protocol):
    """The side of the BPF maps that the translator reads."""

    def activity(self) -> int: ...

    def counters(self) -> list[tuple[records.ExitKeyRecord, records.ExitCount]]: ...

    def refused(self) -> list[tuple[records.RefusalKeyRecord, records.RefusedCount]]: ...

    def signals(self) -> list[tuple[records.SigbusKey, records.SigbusCount]]: ...

    def forget_signals(self, keys: list[records.SigbusKey]) -> None: ...

    def forget_refused(self, keys: list[records.RefusalKeyRecord]) -> None: ...

    def forget(self, keys: list[records.ExitKeyRecord]) -> None: ...

    def lost(self) -> list[int]: ...


class BpfTranslator:
    """Holds what must outlive one record: VM keys, totals already reported, signals held back.

    ``offset_ns``: epoch minus CLOCK_MONOTONIC. ``names``: page types and results as the kernel
    prints them, by number.
    """

    def __init__(self, offset_ns: int, names: _Names, proc: str = "/proc") -> None:
        self._offset = offset_ns
        self._types, self._results = names
        self._vms = VmTable(proc)
        self._firmware = smbios.read()
        self._told: dict[bytes, int] = {}  # by exit key: exits already in events
        self._keys: dict[tuple[int, int], dict[bytes, records.ExitKeyRecord]] = {}  # by VM
        self._refusals: dict[tuple[int, int], dict[bytes, records.RefusalKeyRecord]] = {}  # by VM
        self._activity = 0
        self._next_read = 0.0
        self._settled = False
        self._lost = [0] * len(records.LOST_PLACES)
        self._counts = SignalCounts()
        self._signals: dict[int, Sigbus] = {}  # by sending thread: the fault it is for is to follow

    def start(self) -> list[Event]:
        """The VMs that are there before any event; also when programs were attached anew."""
        self._told.clear()
        self._keys.clear()
        self._refusals.clear()
        self._counts = SignalCounts()
        self._activity = 0
        self._lost = [0] * len(records.LOST_PLACES)
        return self._vms.scan(self._now())

    def met(self, struct: int, generation: int, pid: int) -> tuple[int, list[Event]]:
        """The key of a VM that was found rather than reported, and its VmSeen if it is new."""
        return self._vms.key(struct, pid, self._now(), generation=generation)

    def struct_of(self, vm: int) -> tuple[int, int] | None:
        """Address and generation of a VM's struct kvm, if known."""
        return self._vms.struct_of(vm)

    def translate(self, raw: Sequence[bytes], kernel: Counters) -> list[Event]:
        """Translate the records of one read of the ring buffer."""
        events: list[Event] = []
        # What was counted of a VM before its end was counted before its record was read: one
        # reading serves all VMs that end in this batch.
        self._settled = False
        for data in raw:
            header = records.Header.from_buffer_copy(data)
            record: Any = records.RECORDS[header.type].from_buffer_copy(data)
            tid = header.tid
            if header.type == records.FAULT:
                events += self._fault(record)
                continue
            events += self._release(tid)
            if header.type == records.SIGBUS:
                count = self._counts.record(record)
                if not count:
                    continue  # the counters had it
                signal = replace(self._sigbus(record, events), count=count)
                self._counts.learn(signal)
                self._signals[tid] = signal
                if record.vcpu == -1 or record.target_tid != tid or signal.hva is None:
                    events += self._release(tid)
            elif header.type == records.EXIT:
                events += self._exit(record.key, record, header.ts, tid, header.tgid)
            elif header.type == records.POISON:
                events += self._poison(record)
            elif header.type == records.MCE:
                events.append(self._mce(record))
            elif header.type == records.HW:
                events.append(self._hw_error(record))
            elif header.type == records.PAGE:
                events += self._page(record)
            elif header.type == records.VM_NEW:
                events += self._began(record, kernel)
            elif header.type == records.VM_GONE:
                events += self._gone(record, kernel)
        now = self._now()
        for tid, held in list(self._signals.items()):
            if now - held.ts >= SIGNAL_WAIT_NS:
                events += self._release(tid)
        return events

    def counters(self, kernel: Counters, *, at_once: bool = False) -> list[Event]:
        """What was counted and not reported; what was lost.

        Once a second at most, or ``at_once``: for what ends with this.
        """
        events: list[Event] = []
        active, now = kernel.activity(), time.monotonic()
        if active != self._activity and (at_once or now >= self._next_read):
            self._activity = active
            self._next_read = now + READ_SECONDS
            for key, count in kernel.counters():
                events += self._exit(key, count, count.last_ts, count.tid, count.tgid)
            for gfn, answers in kernel.refused():
                events += self._refused(gfn, answers)
            for like, more, ts in self._counts.owed(kernel.signals()):
                signal = self._counts.known(like) or self._sigbus(like, events)
                events.append(replace(signal, ts=ts + self._offset, count=more))
        lost = kernel.lost()
        for place, now, before in zip(records.LOST_PLACES, lost, self._lost, strict=True):
            if now > before:
                events.append(Lost(self._now(), place, now - before))
        self._lost = lost
        return events

    def flush(self, kernel: Counters) -> list[Event]:
        """Everything still held back, before the programs go."""
        return self.counters(kernel, at_once=True) + self.release()

    def release(self) -> list[Event]:
        """Signals whose fault is waited for, as they are."""
        return [event for tid in list(self._signals) for event in self._release(tid)]

    def housekeeping(self) -> list[Event]:
        """VMs whose end was missed."""
        return self._vms.reap(self._now())

    # -- one kind each

    def _exit(
        self, key: records.ExitKeyRecord, counted: Any, at: int, tid: int, tgid: int
    ) -> list[Event]:
        """``counted``: an ExitCount or ExitRecord, with how many there were so far."""
        raw = bytes(key)
        told = self._told.get(raw, 0)
        count = counted.total - told
        if count <= 0:
            return []
        self._told[raw] = counted.total
        self._keys.setdefault((key.kvm, key.gen), {})[raw] = key
        ts = at + self._offset
        vm, events = self._vms.key(key.kvm, tgid, ts, generation=key.gen)
        gpa = _gpa(key, counted, told)
        gfn = kvm.gfn_of(gpa) if gpa is not None else None
        if gfn is None and key.gfn != records.NO_GFN:
            gfn = key.gfn
        private = records.access_private(key.access)
        if key.annotated:
            private = bool(key.flags & kvm.MEMORY_EXIT_FLAG_PRIVATE)
        events.append(
            Exit(
                ts,
                vm,
                None if key.vcpu == records.NO_VCPU else key.vcpu,
                -key.ret,
                None if key.reason == records.NO_REASON else key.reason,
                None if key.reason == records.NO_REASON else bool(key.annotated),
                tid=None if key.vcpu == records.NO_VCPU else tid,
                flags=key.flags if key.annotated else None,
                gpa=gpa,
                size=(key.size or None) if key.annotated else None,
                gfn=gfn,
                private=private,
                access=records.access_text(key.access),
                gmem=None if key.gmem == records.GMEM_NOT_WATCHED else -key.gmem,
                count=count,
            )
        )
        return events

    def _refused(self, key: records.RefusalKeyRecord, answers: records.RefusedCount) -> list[Event]:
        raw = bytes(key)
        count = answers.total - self._told.get(raw, 0)
        if count <= 0:
            return []
        self._told[raw] = answers.total
        self._refusals.setdefault((key.kvm, key.gen), {})[raw] = key
        ts = answers.last_ts + self._offset
        vm, events = self._vms.key(key.kvm, answers.tgid, ts, generation=key.gen)
        return [*events, GmemRefusal(ts, vm, key.gfn, count)]

    def _hw_error(self, record: Any) -> HwError:
        via, severities = _HW_VIA[record.via]
        if record.via == records.HW_NON_STANDARD:
            severities = self._firmware.non_standard
        facts: dict[str, Any] = {"severity": severities.get(record.severity)}
        label, message = _text(record.label), _text(record.message)
        if record.via == records.HW_MC_EVENT:
            addr = record.addr if record.valid else 0
            place = tuple(ctypes.c_int8(record.place >> shift).value for shift in (8, 16, 24))
            said = (record.severity, addr, record.grain_bits, record.count, label, message)
            told = cper.Edac(*said, (record.place & 0xFF, *place))
            facts = cper.edac(told, self._firmware.alike)
        elif record.via in (records.HW_EXTLOG, records.HW_APEI):
            section = cper.MemoryErrorSection(
                record.valid, record.addr, record.mask, record.place, record.kind
            )
            facts |= cper.memory(section, self._firmware.dimms, label)
        else:
            if record.valid:
                facts["addr"] = record.addr
            facts["message"] = message or None
        if "addr" in facts:
            facts["pfn"] = kvm.gfn_of(facts["addr"])
        return HwError(record.h.ts + self._offset, via, **facts)

    def _page(self, record: Any) -> list[Event]:
        ts = record.h.ts + self._offset
        if not record.unpoison:
            return [SoftOffline(ts, record.pfn, -record.ret)]
        return [Unpoison(ts, record.pfn)] if record.ret == 0 else []

    def _poison(self, record: Any) -> list[Event]:
        ts = record.h.ts + self._offset
        events: list[Event] = []
        if record.gmem.seen:
            owners = []
            for place in record.gmem.owners[: record.gmem.nr_owners]:
                vm, seen = self._vms.key(place.kvm, place.pid, ts, generation=place.gen)
                events += seen
                owners.append(Owner(vm, place.gfn, place.hva or None))
            events.append(
                GmemPoison(
                    ts,
                    record.h.tid,
                    record.gmem.inode or None,
                    record.gmem.index,
                    tuple(owners),
                    bool(record.gmem.complete),
                )
            )
        events.append(
            Poison(
                ts,
                record.pfn,
                self._types.get(record.page_type, str(record.page_type)),
                self._results.get(record.result, str(record.result)),
                record.page_type,
                record.result,
                record.h.tid,
            )
        )
        return events

    def _sigbus(self, record: Any, events: list[Event]) -> Sigbus:
        ts = record.h.ts + self._offset
        vm = None
        if record.h.kvm:
            vm, seen = self._vm(record.h)
            events += seen
        else:
            keys = self._vms.of_pid(record.target_tgid)
            vm = keys[0] if len(keys) == 1 else None
        return Sigbus(
            ts,
            record.target_tgid,
            record.target_tid,
            record.code,
            None if record.code == kvm.SI_KERNEL else record.hva,
            lsb=kvm.lsb_of(record.lsb) or None,
            sender=record.h.tid,
            vm=vm,
            vcpu=record.vcpu if record.vcpu >= 0 else None,
            comm=_text(record.comm),
        )

    def _fault(self, record: Any) -> list[Event]:
        """The fault handler's word on a poisoned page, right behind the signal it sent."""
        signal = self._signals.pop(record.h.tid, None)
        if signal is None:
            return []
        lsb = signal.lsb or kvm.PAGE_SHIFT
        if record.hva and signal.hva is not None and record.hva >> lsb != signal.hva >> lsb:
            return [signal]
        vm, events = self._vm(record.h)
        signal = replace(signal, vm=vm, vcpu=record.vcpu, gfn=record.gfn)
        self._counts.learn(signal)
        return [*events, signal]

    def _release(self, tid: int) -> list[Event]:
        held = self._signals.pop(tid, None)
        return [held] if held else []

    def _mce(self, record: Any) -> Mce:
        """``observe`` knows the CPU, and judges if the address is physical."""
        addr = record.addr if record.status & mce.ADDRV else None
        return Mce(
            record.h.ts + self._offset,
            addr,
            None if addr is None else kvm.gfn_of(addr),
            record.bank,
            record.mce_cpu,
            record.socket,
            record.status,
            record.misc,
            ipid=record.ipid or None,
            fru=mce.fru_text(record.status, bytes(record.vendor_data)),
        )

    def _began(self, record: Any, kernel: Counters) -> list[Event]:
        header = record.h
        events: list[Event] = []
        for generation in self._vms.generations(header.kvm):
            if generation != header.gen:
                events += self._settle((header.kvm, generation), kernel)
        return events + self._vms.created(
            header.kvm,
            header.tgid,
            header.ts + self._offset,
            generation=header.gen,
            comm=record.comm.decode(errors="replace"),
        )

    def _gone(self, record: Any, kernel: Counters) -> list[Event]:
        header = record.h
        return self._settle((header.kvm, header.gen), kernel) + self._vms.destroyed(
            header.kvm,
            header.tgid,
            header.ts + self._offset,
            generation=header.gen,
            comm=record.comm.decode(errors="replace"),
        )

    def _settle(self, struct: tuple[int, int], kernel: Counters) -> list[Event]:
        """All that was counted, before a VM is forgotten."""
        events = [] if self._settled else self.counters(kernel, at_once=True)
        self._settled = True
        keys, refused = self._keys.pop(struct, {}), self._refusals.pop(struct, {})
        kernel.forget(list(keys.values()))
        kernel.forget_refused(list(refused.values()))
        for raw in (*keys, *refused):
            self._told.pop(raw, None)
        kernel.forget_signals(self._counts.forget(struct))
        return events

    def _vm(self, header: Any) -> tuple[int, list[Event]]:
        ts = header.ts + self._offset
        return self._vms.key(header.kvm, header.tgid, ts, generation=header.gen)

    def _now(self) -> int:
        return time.monotonic_ns() + self._offset


def _gpa(key: records.ExitKeyRecord, counted: Any, told: int) -> int | None:
    """The address of all exits after the first ``told``; None where they differ in it."""
    if not key.annotated:
        return None
    if key.gpa != records.NO_GPA:
        return int(key.gpa)
    return int(counted.gpa) if 0 < counted.since <= told + 1 else None


def _text(raw: bytes) -> str:
    """Cleaned; it ends in "…" where the record had no room for the rest."""
    text = raw.decode(errors="replace")
    return sanitize.clean(text + "…" if len(raw) >= records.HW_TEXT - 1 else text)
