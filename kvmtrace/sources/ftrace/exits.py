"""Failed exits of KVM_RUN: ``run``, ``vncr``, ``faultin``, ``run_under_way``, ``arm_sea``.

Records of one thread are joined in two ways. Neither join can use a stale record:

- ``faultin`` with ``run``: both have ``vcpu->stat.exits``, which grows with every VM exit. The
  fault that ends KVM_RUN is its last exit, so only that fault has the same number.
- ``gmem`` with ``faultin``: see records.is_call_of_fault.
"""

from __future__ import annotations

import signal
from collections.abc import Collection
from typing import Any, NamedTuple

from kvmtrace import kvm
from kvmtrace.bounded import BoundedDict
from kvmtrace.events import Event, Exit
from kvmtrace.sources.ftrace import records
from kvmtrace.sources.ftrace.fields import (
    HAS_PRIVATE,
    RET,
    VCPU,
    ProbeRequest,
    Sift,
    helper,
    needed,
    optional,
    values,
)
from kvmtrace.sources.ftrace.muting import ExitMuting
from kvmtrace.sources.ftrace.records import Record
from kvmtrace.sources.ftrace.totals import ExitKey, KernelTotals, VcpuOwner, unkeyed_key_of
from kvmtrace.sources.ftrace.vms import VmResolver
from kvmtrace.sources.limits import HIST_ENTRIES, MAX_EXIT_DETAILS, MAX_THREADS
from kvmtrace.sources.tally import Tally

KVM_PFN_ERR_HWPOISON = 0x7FF0000000000001  # include/linux/kvm_host.h: KVM_PFN_ERR_MASK | 1

# EINTR and EAGAIN are how KVM_RUN ordinarily ends for a signal or an uninitialised vCPU; the kernel
# keeps them out of the ring. With a SIGBUS pending, EINTR shows which vCPU the signal was sent to.
_FAILED = "ret < 0 && ret != -4 && ret != -11"
_SIGBUS_PENDING = f"pending & {1 << signal.SIGBUS - 1:#x}"
_PENDING = "$current->pending.signal.sig:x64"
_WITHOUT_ERRNO = f"ret == 0 && reason == {kvm.EXIT_MEMORY_FAULT}"

_RUN = (
    *VCPU,
    needed("reason", "vcpu->run->exit_reason:u32"),
    optional("gpa", "vcpu->run->memory_fault.gpa:x64"),
    optional("flags", "vcpu->run->memory_fault.flags:x64"),
    optional("size", "vcpu->run->memory_fault.size:x64"),
    optional("exits", "vcpu->stat.exits"),
    helper("pending", _PENDING),
    RET,
)
_HAS_PRIVATE_MEM = HAS_PRIVATE.partition(":")[0]
_NO_PRIVATE_MEMORY = helper("has_private", "\\0:u8")  # no VM of arm64 has any

# To fetch these at each return, and to try five filters, costs more than the probe itself.
_KVM = "+{kvm_vcpu.kvm}($vcpu)"
_KVM_RUN = "+{kvm_vcpu.run}($vcpu)"
_SIFT = Sift(
    every=(needed("vcpu", "vcpu:x64"), helper("pending", _PENDING), RET),
    conditions=(
        ("pending", f"ret < 0 && ret != -11 && (ret != -4 || {_SIGBUS_PENDING})"),
        ("ret", _FAILED),
    ),
    fields=(
        needed("vcpu", "$vcpu:x64"),
        needed("kvm", f"{_KVM}:x64"),
        needed("vid", "+{kvm_vcpu.vcpu_id}($vcpu):s32"),
        helper("tgid", f"+{{task_struct.tgid}}(+{{mm_struct.owner}}(+{{kvm.mm}}({_KVM}))):s32"),
        helper("maker", f"+{{kvm.userspace_pid}}({_KVM}):s32"),
        needed("reason", f"+{{kvm_run.exit_reason}}({_KVM_RUN}):u32"),
        optional("gpa", f"+{{kvm_run.memory_fault.gpa}}({_KVM_RUN}):x64"),
        optional("flags", f"+{{kvm_run.memory_fault.flags}}({_KVM_RUN}):x64"),
        optional("size", f"+{{kvm_run.memory_fault.size}}({_KVM_RUN}):u64"),
        optional("exits", "+{kvm_vcpu.stat.exits}($vcpu):u64"),
        helper("pending", "$pending:x64"),
        needed("ret", "$ret:s32"),
    ),
    x86=(helper("has_private", f"+{{kvm.{_HAS_PRIVATE_MEM}}}({_KVM}):u8"),),
    arm64=(_NO_PRIVATE_MEMORY,),
)

# A trigger takes three keys at most, so failed exits have several triggers: one counts all exits by
# vCPU and kind, one per annotated errno counts by address, and one shows the VM and the number of
# each ``struct kvm_vcpu``.


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
        arm64=(*_RUN, _NO_PRIVATE_MEMORY),
        filters=(("pending", f"({_FAILED}) || (ret == -4 && {_SIGBUS_PENDING})"), ("ret", _FAILED)),
        triggers=_run_triggers,
        sift=_SIFT,
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
    """What is known of exits beside their key. ``gmem``: errno of guest_memfd, 0 if not called."""

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
    """Records and the kernel's counts → ``Exit``, each exit once."""

    def __init__(self, vms: VmResolver) -> None:
        self.watches_gmem = False
        """The ``gmem`` probe is attached: without its record, guest_memfd was not called."""
        self.counts_pending = False
        """Records were dropped since the counts were read: the counts may have more exits."""
        self.tally: Tally[ExitKey] = Tally(unkeyed_key_of)
        self.muting = ExitMuting()
        self._vms = vms
        self._gmem: BoundedDict[int, dict[str, Any]] = BoundedDict(MAX_THREADS)  # by thread
        self._faults: BoundedDict[int, _Fault] = BoundedDict(MAX_THREADS)  # by thread
        self._vcpus: dict[int, VcpuOwner] = {}
        self._details: BoundedDict[ExitKey, _Detail] = BoundedDict(MAX_EXIT_DETAILS)
        self._batched: dict[tuple[ExitKey, int, _Detail], tuple[int, int, int]] = {}
        self._faults_dropped = False
        self._vms_without_private_memory: set[int] = set()
        """Addresses of VMs that cannot have private memory."""
        self._vms_with_unknown_flags: set[int] = set()
        """Addresses of VMs that exited with flags that mainline does not have."""

    def begin(self, faults_dropped: bool) -> None:
        """Begin a batch. ``faults_dropped``: records before or in it were dropped."""
        self._faults_dropped = faults_dropped
        if faults_dropped:
            self.counts_pending = True
            self._gmem.clear()
            self._faults.clear()

    def end(self) -> list[Event]:
        """End the batch: one event for all exits that equal an earlier one of the batch."""
        batched, self._batched = self._batched, {}
        return [
            _exit(ts, (vm, vid), key, detail, count)
            for (key, vm, detail), (count, ts, vid) in batched.items()
            if count
        ]

    def note_private_memory(self, record: Record) -> None:
        """Remember the record's VM if it cannot have private memory."""
        if record.fields.get("has_private") == 0:
            self._vms_without_private_memory.add(record.fields["kvm"])

    def gmem(self, record: Record) -> None:
        """kvm_gmem_get_pfn failed."""
        self._gmem[record.fields["common_pid"]] = record.fields

    def faultin(self, record: Record) -> None:
        """The fault handler failed. KVM_RUN will fail too, unless this was a prefault."""
        fields = record.fields
        tid = fields["common_pid"]
        call = self._gmem.pop(tid, None)
        if fields.get("prefetch"):
            return
        gmem: int | None = None
        if call is not None and records.is_call_of_fault(call, fields):
            gmem = -call["ret"]
        elif self.watches_gmem and not self._faults_dropped:
            # Not called: there would be a record, unless it is muted.
            gmem = None if self.muting.is_muted(fields["kvm"], fields["gfn"]) else 0
        self._faults[tid] = _Fault(fields, gmem)

    def run(self, record: Record) -> list[Event]:
        """KVM_RUN failed."""
        fields = record.fields
        tid = fields["common_pid"]
        self._gmem.pop(tid, None)
        key = records.exit_key(fields)
        self.note_private_memory(record)
        if _has_unknown_flag(key):
            self._vms_with_unknown_flags.add(fields["kvm"])
        detail = _detail(key, fields, self._faults.pop(tid, None))
        known = self._details.get(key)
        if detail.gmem is None and known is not None:
            detail = known
        detail = self._infer_gmem_errno(detail, key, fields["kvm"])
        self.muting.event(key, fields["kvm"])
        return self._report(record, key, detail)

    def _report(self, record: Record, key: ExitKey, detail: _Detail) -> list[Event]:
        """Report an exit now, unless the counts had it or it equals an earlier one of the batch."""
        fields = record.fields
        self._details[key] = detail
        vid = fields["vid"]
        self._vcpus[key.vcpu] = VcpuOwner(fields["kvm"], vid, fields.get("tgid") or None)
        vm = self._vms.key(record)
        # Without counts in the kernel, every exit is reported by its event.
        if self.muting.counted and not self.tally.event(key):
            return []
        same = (key, vm, detail)
        if same in self._batched:
            self._batched[same] = (self._batched[same][0] + 1, record.ts, vid)
            return []
        self._batched[same] = (0, record.ts, vid)
        return [_exit(record.ts, (vm, vid), key, detail, 1)]

    def run_under_way(self, record: Record) -> list[Event]:
        """KVM_RUN failed, seen by the tracepoint at its end.

        A call that was under way when the probes were attached bypasses ``run`` and the counts, but
        not the tracepoint. The vCPU is that of the last failed fault of the thread.
        """
        tid, errno = record.fields["common_pid"], record.fields["errno"]
        fault = self._faults.pop(tid, None)
        # If exits are muted or dropped, the fault may be a left-over of one of them.
        if fault is None or fault.fields["ret"] != errno or self._faults_dropped or self.muting:
            return []
        key = ExitKey(fault.fields["vcpu"], errno, record.fields["reason"])
        detail = _detail(key, {**fault.fields, "common_pid": tid}, fault)
        vm = self._vms.key(Record(record.ts, "run", fault.fields))
        return [_exit(record.ts, (vm, fault.fields["vid"]), key, detail, 1)]

    def arm_sea(self, record: Record) -> Event:
        """KVM_RUN returns 0 with a synchronous external abort; no other probe sees it."""
        fields = record.fields
        gfn = kvm.gfn_of(fields["gpa"]) if fields["flags"] & _GPA_VALID else None
        vm, tid = self._vms.key(record), fields["common_pid"]
        return Exit(record.ts, vm, fields["vid"], 0, fields["reason"], False, tid, gfn=gfn)

    def vncr(self, record: Record) -> list[Event]:
        """KVM_RUN returns 0 with a memory fault (arm64, arch/arm64/kvm/nested.c).

        It does so only if guest_memfd failed, called in the same thread.
        """
        fields = record.fields
        key = records.exit_key(fields)
        detail = _detail(key, fields, None)
        call = self._gmem.pop(fields["common_pid"], None)
        if call is not None and (call["kvm"], call["gfn"]) == (fields["kvm"], detail.gfn):
            detail = detail._replace(gmem=-call["ret"])
        return self._report(record, key, detail)

    def unreported(self, totals: KernelTotals, now: int) -> list[Event]:
        """Exits that the kernel counted and no event has reported."""
        self._remember_vcpu_owner(totals)
        events: list[Event] = []
        for key, count in self.tally.total(totals.exits) + self.tally.unkeyed(totals.unkeyed):
            owner = self._vcpus.get(key.vcpu)
            if owner is None:
                continue
            detail = self._details.get(key)
            if detail is None:
                detail = _detail(key, {"size": totals.sizes.get(key)}, None)
            detail = self._infer_gmem_errno(detail, key, owner.kvm)
            if detail.gmem is None and self.watches_gmem and totals.gmem_never_failed(owner.kvm):
                detail = self._infer_conversion(detail, key, owner.kvm)
            vm = self._vms.key_of(owner.kvm, owner.tgid, now)
            events.append(_exit(now, (vm, owner.vid), key, detail, count))
        return events

    def needs_totals(self, struct: int) -> bool:
        """Whether the counts may have exits of this VM that no event has reported."""
        return self.counts_pending or self.muting.any_muted_in(struct)

    def unreported_of_vm(self, struct: int, totals: KernelTotals, now: int) -> list[Event]:
        """The same for one VM, even if there was no event of it."""
        self._remember_vcpu_owner(totals)
        return self.unreported(totals.of(self._vcpus_of(struct)), now)

    def forget(self, struct: int) -> None:
        """Forget a destroyed VM: its addresses may be another VM's soon."""
        self.muting.forget_vm(struct)
        self._vms_without_private_memory.discard(struct)
        self._vms_with_unknown_flags.discard(struct)
        vcpus = self._vcpus_of(struct)
        for vcpu in vcpus:
            del self._vcpus[vcpu]
        if vcpus:
            for key in [key for key in self._details if key.vcpu in vcpus]:
                del self._details[key]

    def _infer_gmem_errno(self, detail: _Detail, key: ExitKey, struct: int) -> _Detail:
        """Without private memory there are no conversions: guest_memfd failed, though unseen."""
        if (
            not detail.gmem
            and struct in self._vms_without_private_memory
            and self._is_mainline_gmem_efault(key, struct)
        ):
            return detail._replace(gmem=kvm.EFAULT)
        return detail

    def _infer_conversion(self, detail: _Detail, key: ExitKey, struct: int) -> _Detail:
        """A conversion, as by the kernel's counts the VM's guest_memfd has never failed."""
        return detail._replace(gmem=0) if self._is_mainline_gmem_efault(key, struct) else detail

    def _is_mainline_gmem_efault(self, key: ExitKey, struct: int) -> bool:
        """Whether an exit can only be a conversion or a failure of guest_memfd."""
        if key.ret != -kvm.EFAULT or not records.annotated(key.ret, key.reason):
            return False
        if key.flags is None:
            return struct not in self._vms_with_unknown_flags
        return not _has_unknown_flag(key)

    def _remember_vcpu_owner(self, totals: KernelTotals) -> None:
        for vcpu in totals.vcpu_owners:
            owner = totals.owner(vcpu)
            if vcpu not in self._vcpus and owner is not None:
                self._vcpus[vcpu] = owner
        for key in totals.exits:
            if _has_unknown_flag(key) and key.vcpu in self._vcpus:
                self._vms_with_unknown_flags.add(self._vcpus[key.vcpu].kvm)

    def _vcpus_of(self, struct: int) -> Collection[int]:
        return {vcpu for vcpu, owner in self._vcpus.items() if owner.kvm == struct}


def _has_unknown_flag(key: ExitKey) -> bool:
    """Whether the exit has a flag that mainline lacks: it may mean something else."""
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
