"""Failed exits of KVM_RUN, with what the fault handler knew of them.

Two joins on the thread, and why neither can be stale:

- ``faultin`` with ``run``: both carry ``vcpu->stat.exits``, which grows with every VM exit; the
  fault that ends KVM_RUN is the last exit of it, so the numbers are equal for this very fault only.
- ``gmem`` with ``faultin``: see records.asked_by.
"""

from __future__ import annotations

import signal
from collections import OrderedDict
from collections.abc import Collection
from typing import Any, NamedTuple

from kvmtrace import kvm
from kvmtrace.events import Event, Exit
from kvmtrace.sources.ftrace import records
from kvmtrace.sources.ftrace.fields import (
    HAS_PRIVATE,
    RET,
    VCPU,
    ProbeRequest,
    helper,
    needed,
    optional,
    values,
)
from kvmtrace.sources.ftrace.muting import ExitMuting
from kvmtrace.sources.ftrace.records import Record
from kvmtrace.sources.ftrace.totals import ExitKey, KernelTotals, VcpuOwner, rest_of
from kvmtrace.sources.ftrace.vms import VmResolver
from kvmtrace.sources.limits import HIST_ENTRIES, MAX_EXIT_DETAILS, MAX_THREADS
from kvmtrace.sources.tally import Tally

KVM_PFN_ERR_HWPOISON = 0x7FF0000000000001  # include/linux/kvm_host.h: KVM_PFN_ERR_MASK | 1

# The most frequent events are judged in the kernel: EINTR and EAGAIN are how KVM_RUN ordinarily
# ends for a signal or an uninitialised vCPU. With a SIGBUS pending, EINTR shows which vCPU it was
# sent to.
_FAILED = "ret < 0 && ret != -4 && ret != -11"
_SIGBUS_PENDING = f"pending & {1 << signal.SIGBUS - 1:#x}"
_WITHOUT_ERRNO = f"ret == 0 && reason == {kvm.EXIT_MEMORY_FAULT}"

_RUN = (
    *VCPU,
    needed("reason", "vcpu->run->exit_reason:u32"),
    optional("gpa", "vcpu->run->memory_fault.gpa:x64"),
    optional("flags", "vcpu->run->memory_fault.flags:x64"),
    optional("size", "vcpu->run->memory_fault.size:x64"),
    optional("exits", "vcpu->stat.exits"),
    helper("pending", "$current->pending.signal.sig:x64"),
    RET,
)

# Three keys are all that a trigger takes, so failed exits have several: one counts all of them by
# vCPU and kind, one each annotated kind by address, and one names which VM and vCPU a ``struct
# kvm_vcpu`` is.


def _keys_by_address(fields: Collection[str]) -> str:
    return f"hist:keys=vcpu.hex,gpa.hex,flags.hex:{values(fields, 'size')}:size={HIST_ENTRIES}"


def _keys_by_owner(fields: Collection[str]) -> str:
    return f"hist:keys=vcpu.hex,kvm.hex,vid:{values(fields, 'tgid')}:size={HIST_ENTRIES}"


def _run_triggers(fields: Collection[str]) -> tuple[str, ...]:
    by_kind = f"hist:keys=vcpu.hex,ret,reason:vals=hitcount:size={HIST_ENTRIES}"
    found: tuple[str, ...] = (f"{by_kind} if {_FAILED}", f"{_keys_by_owner(fields)} if {_FAILED}")
    if "gpa" in fields and "flags" in fields:
        by_address = _keys_by_address(fields)
        found += tuple(f"{by_address} if ret == {ret} && reason == 39" for ret in (-133, -14))
    return found


def _vncr_triggers(fields: Collection[str]) -> tuple[str, ...]:
    keys = (_keys_by_address(fields), _keys_by_owner(fields))
    return tuple(f"{one} if {_WITHOUT_ERRNO}" for one in keys)


PROBES = {
    "run": ProbeRequest(
        "faults",
        (*_RUN, helper("has_private", f"vcpu->kvm->{HAS_PRIVATE}")),
        arm64=(*_RUN, helper("has_private", "\\0:u8")),  # no VM has private memory there
        filters=(("pending", f"({_FAILED}) || (ret == -4 && {_SIGBUS_PENDING})"), ("ret", _FAILED)),
        triggers=_run_triggers,
    ),
    "vncr": ProbeRequest(
        "faults",
        (
            *VCPU,
            needed("reason", "vcpu->run->exit_reason:u32"),
            needed("gpa", "vcpu->run->memory_fault.gpa:x64"),
            needed("flags", "vcpu->run->memory_fault.flags:x64"),
            optional("size", "vcpu->run->memory_fault.size:x64"),
            RET,
        ),
        filters=(("ret", _WITHOUT_ERRNO),),
        triggers=_vncr_triggers,
    ),
    "faultin": ProbeRequest(
        "faults",
        (
            *VCPU,
            optional("exits", "vcpu->stat.exits"),
            needed("gfn", "fault->gfn:x64"),
            optional("pfn", "fault->pfn:x64"),
            optional("write", "fault->write"),
            optional("exec", "fault->exec"),
            optional("private", "fault->is_private"),
            optional("prefetch", "fault->prefetch"),
            RET,
        ),
        # kvm_handle_guest_abort(vcpu): HPFAR_EL2 holds the address of the page (bits 39:4 are
        # 47:12 of it), ESR_EL2 the syndrome (arch/arm64/include/asm/kvm_emulate.h, esr.h).
        arm64=(
            *VCPU,
            optional("exits", "vcpu->stat.exits"),
            needed("hpfar", "vcpu->arch.fault.hpfar_el2:x64"),
            optional("esr", "vcpu->arch.fault.esr_el2:x64"),
            RET,
        ),
        filters=(
            ("pfn", f"(ret < 0 && ret != -4) || pfn == {KVM_PFN_ERR_HWPOISON:#x}"),
            ("ret", "ret < 0 && ret != -4"),
        ),
    ),
    "run_under_way": ProbeRequest("faults", filters=(("errno", _FAILED.replace("ret", "errno")),)),
    "arm_sea": ProbeRequest(
        "poison",
        (
            *VCPU,
            needed("reason", "vcpu->run->exit_reason:u32"),
            needed("flags", "vcpu->run->arm_sea.flags:x64"),
            needed("gpa", "vcpu->run->arm_sea.gpa:x64"),
            RET,
        ),
        filters=(("ret", f"ret == 0 && reason == {kvm.EXIT_ARM_SEA}"),),
    ),
}

_GPA_VALID = 1 << 0  # KVM_EXIT_ARM_SEA_FLAG_GPA_VALID, include/uapi/linux/kvm.h


class _Detail(NamedTuple):
    """What an exit's key does not have."""

    gfn: int | None = None
    private: bool | None = None
    access: str | None = None
    gmem: int | None = None
    size: int | None = None
    tid: int | None = None


class _Fault(NamedTuple):
    fields: dict[str, Any]
    gmem: int | None


class FtraceExits:
    """``run``, ``gmem`` and ``faultin`` records, and the kernel's counts → ``Exit``."""

    def __init__(self, people: VmResolver) -> None:
        self.watches_gmem = False
        """The ``gmem`` probe is attached: that it has no record means something."""
        self.behind = False
        """Events were dropped since the counts were settled: the counts may have more."""
        self.tally: Tally[ExitKey] = Tally(rest_of)
        self.storms = ExitMuting()
        self._people = people
        self._gmem: OrderedDict[int, dict[str, Any]] = OrderedDict()  # by thread
        self._faults: OrderedDict[int, _Fault] = OrderedDict()  # by thread
        self._vcpus: dict[int, VcpuOwner] = {}
        self._details: OrderedDict[ExitKey, _Detail] = OrderedDict()
        self._again: dict[tuple[ExitKey, int, _Detail], tuple[int, int, int]] = {}
        self._doubtful = False
        self._ordinary: set[int] = set()
        """``struct kvm`` of VMs that can have no private memory."""
        self._odd: set[int] = set()
        """``struct kvm`` of VMs that exited with flags that are not mainline's."""

    def begin(self, doubtful: bool) -> None:
        """A batch of records begins. ``doubtful``: some before or in it were dropped."""
        self._doubtful = doubtful
        if doubtful:
            self.behind = True
            self._gmem.clear()
            self._faults.clear()

    def end(self) -> list[Event]:
        """The batch is over: exits that were the same as others in it, counted together."""
        again, self._again = self._again, {}
        return [
            _exit(ts, (vm, vid), key, detail, count)
            for (key, vm, detail), (count, ts, vid) in again.items()
            if count
        ]

    def vm(self, record: Record) -> None:
        """Note whether the record's VM may have private memory."""
        if record.fields.get("has_private") == 0:
            self._ordinary.add(record.fields["kvm"])

    def gmem(self, record: Record) -> None:
        """kvm_gmem_get_pfn failed."""
        tid = record.fields["common_pid"]
        self._gmem[tid] = record.fields
        _bound(self._gmem, MAX_THREADS)

    def faultin(self, record: Record) -> None:
        """The fault handler failed; so will KVM_RUN, unless it was but a prefault."""
        fields = record.fields
        tid = fields["common_pid"]
        asked = self._gmem.pop(tid, None)
        if fields.get("prefetch"):
            return
        gmem: int | None = None
        if asked is not None and records.asked_by(asked, fields):
            gmem = -asked["ret"]
        elif self.watches_gmem and not self._doubtful:
            # It was not asked: there would be a record, unless that is muted.
            gmem = None if self.storms.mutes(fields["kvm"], fields["gfn"]) else 0
        self._faults[tid] = _Fault(fields, gmem)
        _bound(self._faults, MAX_THREADS)

    def run(self, record: Record) -> list[Event]:
        """KVM_RUN failed."""
        fields = record.fields
        tid = fields["common_pid"]
        self._gmem.pop(tid, None)
        key = records.exit_key(fields)
        self.vm(record)
        if _is_odd(key):
            self._odd.add(fields["kvm"])
        detail = _detail(key, fields, self._faults.pop(tid, None))
        known = self._details.get(key)
        if detail.gmem is None and known is not None:
            detail = known
        detail = self._asked(detail, key, fields["kvm"])
        self.storms.event(key, fields["kvm"])
        return self._told(record, key, detail)

    def _told(self, record: Record, key: ExitKey, detail: _Detail) -> list[Event]:
        """An exit by its event, unless it was counted already or is like another of this batch."""
        fields = record.fields
        if detail != self._details.get(key):
            self._details[key] = detail
            _bound(self._details, MAX_EXIT_DETAILS)
        vid = fields["vid"]
        self._vcpus[key.vcpu] = VcpuOwner(fields["kvm"], vid, fields.get("tgid") or None)
        vm = self._people.key(record)
        # Where the kernel counts nothing, an event is all there ever is.
        if self.storms.counted and not self.tally.event(key):
            return []
        same = (key, vm, detail)
        if same in self._again:
            self._again[same] = (self._again[same][0] + 1, record.ts, vid)
            return []
        self._again[same] = (0, record.ts, vid)
        return [_exit(record.ts, (vm, vid), key, detail, 1)]

    def run_under_way(self, record: Record) -> list[Event]:
        """KVM_RUN failed, by the tracepoint behind it.

        A call that was under way when the probes were attached returns past ``run``. Its
        vCPU is that of the fault that has just failed in it. The kernel's counts do not have it.
        """
        tid, errno = record.fields["common_pid"], record.fields["errno"]
        fault = self._faults.pop(tid, None)
        # With some exits muted or dropped, a fault may be left over from one of those.
        if fault is None or fault.fields["ret"] != errno or self._doubtful or self.storms:
            return []
        key = ExitKey(fault.fields["vcpu"], errno, record.fields["reason"])
        detail = _detail(key, {**fault.fields, "common_pid": tid}, fault)
        vm = self._people.key(Record(record.ts, "run", fault.fields))
        return [_exit(record.ts, (vm, fault.fields["vid"]), key, detail, 1)]

    def arm_sea(self, record: Record) -> Event:
        """KVM_RUN reports a synchronous external abort: no errno, and no other probe sees it."""
        fields = record.fields
        gfn = kvm.gfn_of(fields["gpa"]) if fields["flags"] & _GPA_VALID else None
        vm, tid = self._people.key(record), fields["common_pid"]
        return Exit(record.ts, vm, fields["vid"], 0, fields["reason"], False, tid, gfn=gfn)

    def vncr(self, record: Record) -> list[Event]:
        """KVM_RUN returns 0 with a memory fault (arm64, arch/arm64/kvm/nested.c).

        The handler asks guest_memfd in the same thread, and only where that failed it says so.
        """
        fields = record.fields
        key = records.exit_key(fields)
        detail = _detail(key, fields, None)
        asked = self._gmem.pop(fields["common_pid"], None)
        if asked is not None and (asked["kvm"], asked["gfn"]) == (fields["kvm"], detail.gfn):
            detail = detail._replace(gmem=-asked["ret"])
        return self._told(record, key, detail)

    def settle(self, totals: KernelTotals, now: int) -> list[Event]:
        """Exits that the kernel counted and no event reported."""
        self._learn(totals)
        events: list[Event] = []
        for key, count in self.tally.total(totals.exits) + self.tally.rests(totals.rests):
            whose = self._vcpus.get(key.vcpu)
            if whose is None:
                continue
            detail = self._details.get(key)
            if detail is None:
                detail = _detail(key, {"size": totals.sizes.get(key)}, None)
            detail = self._asked(detail, key, whose.kvm)
            if detail.gmem is None and self.watches_gmem and totals.converts_only(whose.kvm):
                detail = self._not_asked(detail, key, whose.kvm)
            vm = self._people.key_of(whose.kvm, whose.tgid, now)
            events.append(_exit(now, (vm, whose.vid), key, detail, count))
        return events

    def unsettled(self, struct: int) -> bool:
        """Whether the counts may have more of a VM than the events."""
        return self.behind or self.storms.in_vm(struct)

    def settle_vm(self, struct: int, totals: KernelTotals, now: int) -> list[Event]:
        """``settle`` for one VM; also if no event of it ever came through."""
        self._learn(totals)
        return self.settle(totals.of(self._vcpus_of(struct)), now)

    def forget(self, struct: int) -> None:
        """The VM is gone: its addresses may be another's soon."""
        self.storms.gone(struct)
        self._ordinary.discard(struct)
        self._odd.discard(struct)
        vcpus = self._vcpus_of(struct)
        for vcpu in vcpus:
            del self._vcpus[vcpu]
        if vcpus:
            for key in [key for key in self._details if key.vcpu in vcpus]:
                del self._details[key]

    def _asked(self, detail: _Detail, key: ExitKey, struct: int) -> _Detail:
        """No conversion where nothing is private: guest_memfd failed, though no probe saw it."""
        if not detail.gmem and struct in self._ordinary and self._is_mainlines(key, struct):
            return detail._replace(gmem=kvm.EFAULT)
        return detail

    def _not_asked(self, detail: _Detail, key: ExitKey, struct: int) -> _Detail:
        """A conversion: guest_memfd of this VM has never failed, as the kernel counts it."""
        return detail._replace(gmem=0) if self._is_mainlines(key, struct) else detail

    def _is_mainlines(self, key: ExitKey, struct: int) -> bool:
        """An annotated EFAULT that is a conversion or a failure of guest_memfd, nothing else."""
        odd = struct in self._odd if key.flags is None else _is_odd(key)
        return key.ret == -kvm.EFAULT and records.annotated(key.ret, key.reason) and not odd

    def _learn(self, totals: KernelTotals) -> None:
        for vcpu in totals.whose:
            whose = totals.owner(vcpu)
            if vcpu not in self._vcpus and whose is not None:
                self._vcpus[vcpu] = whose
        odd = {key.vcpu for key in totals.exits if _is_odd(key)}
        self._odd |= {self._vcpus[vcpu].kvm for vcpu in odd if vcpu in self._vcpus}

    def _vcpus_of(self, struct: int) -> Collection[int]:
        return {vcpu for vcpu, whose in self._vcpus.items() if whose.kvm == struct}


def _is_odd(key: ExitKey) -> bool:
    """A flag that is not mainline's may mean something else altogether."""
    return bool((key.flags or 0) & ~kvm.MEMORY_EXIT_FLAG_PRIVATE)


def _detail(key: ExitKey, fields: dict[str, Any], fault: _Fault | None) -> _Detail:
    gfn = kvm.gfn_of(key.gpa) if key.gpa is not None else None
    private = None
    if key.flags is not None:
        private = bool(key.flags & kvm.MEMORY_EXIT_FLAG_PRIVATE)
    access = gmem = None
    if fault is not None and records.same_exit(fault.fields, fields):
        seen = fault.fields
        if gfn is None or gfn == seen["gfn"]:
            gfn, gmem, access = seen["gfn"], fault.gmem, records.access(seen)
            if private is None and "private" in seen:
                private = bool(seen["private"])
    size = fields.get("size") if key.gpa is not None else None
    return _Detail(gfn, private, access, gmem, size, fields.get("common_pid"))


def _exit(ts: int, vcpu: tuple[int, int], key: ExitKey, detail: _Detail, count: int) -> Exit:
    vm, number = vcpu
    return Exit(
        ts,
        vm,
        number,
        -key.ret,
        key.reason,
        annotated=records.annotated(key.ret, key.reason),
        tid=detail.tid,
        flags=key.flags,
        gpa=key.gpa,
        size=detail.size,
        gfn=detail.gfn,
        private=detail.private,
        access=detail.access,
        gmem=detail.gmem,
        count=count,
    )


def _bound(pending: OrderedDict[Any, Any], limit: int) -> None:
    while len(pending) > limit:
        pending.popitem(last=False)
