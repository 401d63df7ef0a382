"""Records of our probes → events. Pure but for the VM table: records in, in order of time.

The joins on a thread, and why none of them can be stale:

- ``faultin`` with ``run``: both carry ``vcpu->stat.exits``, which grows with every VM exit; a fault
  that ends KVM_RUN is the last exit of it, so the numbers are equal for this very fault only.
- ``gmem`` with ``faultin``: kvm_gmem_get_pfn is called from within the fault handler, so it is
  the thread's latest record, for the same gfn, and was called from the handler's own code.
- ``gmem_error`` with ``poison``: see correlate.py.
- ``sigbus`` with ``faultin``: KVM signals its own thread from within the fault handler, which
  then returns with the "poisoned" pfn.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable, Iterable
from typing import Any, NamedTuple

from kvmtrace import kvm
from kvmtrace.events import (
    Event,
    Exit,
    GmemPoison,
    Mce,
    Owned,
    Owner,
    Poison,
    Sigbus,
)
from kvmtrace.ftrace.fields import KVM_PFN_ERR_HWPOISON
from kvmtrace.ftrace.guest import GuestMemory
from kvmtrace.ftrace.hist import ExitKey, Tally, Totals, Whose
from kvmtrace.ftrace.storm import Storms
from kvmtrace.vms import VmTable

# A signal waits this long for the fault it was sent from; the fault returns right after.
SIGNAL_WAIT_NS = 50_000_000
# Callers of kvm_gmem_get_pfn further away than this are not the fault handler (it is one of the
# larger functions, and its helpers are beside it).
_NEAR = 0x8000
# A list head lies in the inode, around the address_space that is a part of it.
_HEAD_NEAR = 0x1000
_MCI_STATUS_ADDRV = 1 << 58  # arch/x86/include/asm/mce.h
_MAX_THREADS = 4096
_MAX_DETAILS = 16384


class Record(NamedTuple):
    """One event of ours: nanoseconds since the epoch, probe, fields."""

    ts: int
    probe: str
    fields: dict[str, Any]


class Detail(NamedTuple):
    """What an exit's key does not tell, found by joins."""

    gfn: int | None = None
    private: bool | None = None
    access: str | None = None
    gmem: int | None = None
    size: int | None = None
    tid: int | None = None


class _Fault(NamedTuple):
    fields: dict[str, Any]
    gmem: int | None


class Joiner:
    """Feed it batches of records; see ``batch``.

    ``tgid_of``: thread → process, where a record does not tell. ``names``: of
    memory_failure_event's ``type`` and ``result``.
    """

    def __init__(
        self,
        vms: VmTable,
        tgid_of: Callable[[int], int | None],
        names: tuple[dict[int, str], dict[int, str]],
    ) -> None:
        self.vms = vms
        self.watches_gmem = False
        """The ``gmem`` probe is attached: that it said nothing means something."""
        self.tally = Tally()
        self.storms = Storms()
        self._tgid_of = tgid_of
        self._types, self._results = names
        self._memory = GuestMemory()
        self._gmem: OrderedDict[int, dict[str, Any]] = OrderedDict()  # by thread
        self._faults: OrderedDict[int, _Fault] = OrderedDict()  # by thread
        self._errors: OrderedDict[int, tuple[int, int]] = OrderedDict()  # thread → (ino, index)
        self._signals: OrderedDict[int, Sigbus] = OrderedDict()  # by thread, waiting for a fault
        self._vcpus: dict[int, Whose] = {}
        self._keys: OrderedDict[int, int] = OrderedDict()  # struct kvm → its last VM key
        self._details: OrderedDict[ExitKey, Detail] = OrderedDict()
        self._owned: OrderedDict[tuple[int, int, int], None] = OrderedDict()
        self._more: dict[tuple[ExitKey, int, Detail], tuple[int, int, int]] = {}
        self._doubtful = False
        self._out: list[Event] = []

    def batch(
        self,
        records: Iterable[Record],
        now: int,
        *,
        totals: Totals | None = None,
        read_totals: Callable[[], Totals] = Totals,
        doubtful: bool = False,
    ) -> list[Event]:
        """Events of all ``records`` (in order of time), up to ``now``.

        ``totals``: the kernel's counts, read before the records were. ``doubtful``: some events of
        the faults' ring were dropped, so that kvm_gmem_get_pfn said nothing proves nothing, and
        that the counts of a VM have to be read (``read_totals``) before it is gone.
        """
        self._out = []
        self._more = {}
        self._doubtful = doubtful
        if doubtful:
            self._gmem.clear()
            self._faults.clear()
        handlers = {
            "run": self._run,
            "gmem": self._gmem_failed,
            "faultin": self._faultin,
            "poison": self._poison,
            "gmem_error": self._gmem_error,
            "sigbus": self._sigbus,
            "sigbus_forced": self._sigbus,
            "mce": self._mce,
            "vm_new": self._vm_new,
            "slot": self._slot,
        }
        for record in records:
            if record.probe == "vm_gone":
                self._vm_gone(record, read_totals)
            else:
                handlers[record.probe](record)
        if totals is not None:
            self._settle(totals, now)
            self.storms.reading(totals.exits)
        self._release_signals(now)
        for (key, vm, detail), (count, ts, vid) in self._more.items():
            if count:
                self._out.append(_exit(ts, (vm, vid), key, detail, count))
        self._out.sort(key=lambda event: event.ts)
        return self._out

    # -- VMs

    def _key(self, record: Record, ts: int | None = None) -> int:
        fields = record.fields
        pid = fields.get("tgid") or None
        if pid is None:
            pid = self._tgid_of(fields["common_pid"]) or fields.get("maker")
        key, events = self.vms.key(
            fields["kvm"], pid or fields["common_pid"], ts or record.ts, comm=fields.get("comm")
        )
        self._out += events
        self._keys[fields["kvm"]] = key
        _bound(self._keys, _MAX_THREADS)
        return key

    def _vm_new(self, record: Record) -> None:
        self._key(record)

    def _vm_gone(self, record: Record, read_totals: Callable[[], Totals]) -> None:
        struct = record.fields["kvm"]
        vcpus = {vcpu for vcpu, whose in self._vcpus.items() if whose.kvm == struct}
        if vcpus and (self._doubtful or self.storms.in_vm(struct)):
            self._settle(read_totals().of(vcpus), record.ts)
        pid = record.fields.get("tgid") or self._tgid_of(record.fields["common_pid"])
        self._out += self.vms.gone(struct, pid or record.fields.get("maker") or 0, record.ts)
        self._memory.forget(struct)
        self.storms.gone(struct)
        for vcpu in vcpus:
            del self._vcpus[vcpu]
        for key in [key for key in self._details if key.vcpu in vcpus]:
            del self._details[key]

    def _slot(self, record: Record) -> None:
        self._memory.changed(record.fields)

    # -- faults

    def _gmem_failed(self, record: Record) -> None:
        fields = record.fields
        self._memory.learn(fields)
        self._gmem[fields["common_pid"]] = fields
        _bound(self._gmem, _MAX_THREADS)
        found = self._memory.poisoned_pfn(fields["kvm"], fields["gfn"])
        if fields["ret"] != -kvm.EHWPOISON or found is None or fields["kvm"] not in self._keys:
            return
        pfn, hva = found
        self._own(record.ts, pfn, Owner(self._keys[fields["kvm"]], fields["gfn"], hva))

    def _own(self, ts: int, pfn: int, owner: Owner) -> None:
        if owner.gfn is None or (pfn, owner.vm, owner.gfn) in self._owned:
            return
        self._owned[pfn, owner.vm, owner.gfn] = None
        _bound(self._owned, _MAX_DETAILS)
        self._out.append(Owned(ts, pfn, owner, "fault"))

    def _faultin(self, record: Record) -> None:
        fields = record.fields
        tid = fields["common_pid"]
        asked = self._gmem.pop(tid, None)
        _arm64(fields)
        if fields.get("prefetch"):
            return  # nobody's access, and nothing KVM_RUN will tell of
        if fields.get("pfn") == KVM_PFN_ERR_HWPOISON and fields["ret"] >= 0:
            self._signalled(record)
            return
        gmem = None if self._doubtful or not self.watches_gmem else 0
        if asked is not None and asked["kvm"] == fields["kvm"] and asked["gfn"] == fields["gfn"]:
            called_from = asked.get("__probe_ret_ip", 0) - fields.get("__probe_func", 0)
            if abs(called_from) < _NEAR or "__probe_func" not in fields:
                gmem = -asked["ret"]
        elif gmem == 0 and self.storms.mutes(fields["kvm"], fields["gfn"]):
            gmem = None
        self._faults[tid] = _Fault(fields, gmem)
        _bound(self._faults, _MAX_THREADS)

    def _run(self, record: Record) -> None:
        fields = record.fields
        tid = fields["common_pid"]
        self._gmem.pop(tid, None)
        fault = self._faults.pop(tid, None)
        key = _exit_key(fields)
        detail = self._detail(key, fields, fault)
        known = self._details.get(key)
        if detail.gmem is None and known is not None:
            detail = known
        elif detail != known:
            self._details[key] = detail
            _bound(self._details, _MAX_DETAILS)
        whose = Whose(fields["kvm"], fields["vid"], fields.get("tgid") or None)
        self._vcpus[key.vcpu] = whose
        self.storms.event(key, whose.kvm)
        vm = self._key(record)
        if not self.tally.event(key):
            return
        same = (key, vm, detail)
        if same not in self._more:
            self._out.append(_exit(record.ts, (vm, whose.vid), key, detail, 1))
            self._more[same] = (0, record.ts, whose.vid)
        else:
            self._more[same] = (self._more[same][0] + 1, record.ts, whose.vid)

    def _detail(self, key: ExitKey, fields: dict[str, Any], fault: _Fault | None) -> Detail:
        annotated = key.gpa is not None
        gfn = kvm.gfn_of(key.gpa) if key.gpa is not None else None
        private = None
        if key.flags is not None:
            private = bool(key.flags & kvm.MEMORY_EXIT_FLAG_PRIVATE)
        access = gmem = None
        if fault is not None and _same(fault.fields, fields):
            seen = fault.fields
            if gfn is None or gfn == seen["gfn"]:
                gfn, gmem = seen["gfn"], fault.gmem
                access = _access(seen)
                if private is None and "private" in seen:
                    private = bool(seen["private"])
        return Detail(
            gfn,
            private,
            access,
            gmem,
            fields.get("size") if annotated else None,
            fields["common_pid"],
        )

    def _settle(self, totals: Totals, now: int) -> None:
        """Tell the exits that the kernel counted and no event told."""
        for vcpu, candidates in totals.whose.items():
            if vcpu not in self._vcpus:
                self._vcpus[vcpu] = max(candidates, key=lambda whose: candidates[whose])
        for key, count in self.tally.total(totals):
            whose = self._vcpus.get(key.vcpu)
            if whose is None:
                continue
            detail = self._details.get(key)
            if detail is None:
                bare = {"common_pid": None, "size": totals.sizes.get(key)}
                detail = self._detail(key, bare, None)
            vm = self._keys.get(whose.kvm)
            if vm is None:
                pid = whose.tgid or 0
                vm, events = self.vms.key(whose.kvm, pid, now)
                self._keys[whose.kvm] = vm
                self._out += events
            self._out.append(_exit(now, (vm, whose.vid), key, detail, count))

    # -- poison

    def _gmem_error(self, record: Record) -> None:
        fields = record.fields
        tid, index, ino = fields["common_pid"], fields["index"], fields.get("ino")
        owners: list[Owner] = []
        held: set[int] = set()
        if ino is not None:
            self._errors[tid] = (ino, index)
            _bound(self._errors, _MAX_THREADS)
            for struct, gfn, hva in self._memory.bindings(ino, index):
                if struct in self._keys:
                    owners.append(Owner(self._keys[struct], gfn, hva))
                    held.add(struct)
        listed = _listed(fields)
        if listed is not None and listed not in held:
            if listed in self._keys:
                owners.append(Owner(self._keys[listed], None))
            elif fields.get("tgid"):
                owners.append(Owner(self._key(record), None))
        complete = listed is not None and listed in held and _is_last(fields)
        self._out.append(GmemPoison(record.ts, tid, ino, index, tuple(owners), complete))

    def _poison(self, record: Record) -> None:
        fields = record.fields
        kind, result, tid = fields["type"], fields["result"], fields["common_pid"]
        page = self._errors.pop(tid, None)
        if page is not None:
            self._memory.poisoned(*page, fields["pfn"])
        self._out.append(
            Poison(
                record.ts,
                fields["pfn"],
                self._types.get(kind, str(kind)),
                self._results.get(result, str(result)),
                kind,
                result,
                tid,
            )
        )

    def _mce(self, record: Record) -> None:
        fields = record.fields
        addr = fields["addr"] if fields["status"] & _MCI_STATUS_ADDRV else None
        self._out.append(
            Mce(
                record.ts,
                addr,
                None if addr is None else addr >> kvm.PAGE_SHIFT,
                fields["bank"],
                fields["cpu"],
                fields["socketid"],
                fields["status"],
                fields.get("misc"),
            )
        )

    # -- signals

    def _sigbus(self, record: Record) -> None:
        fields = record.fields
        sender = fields["common_pid"]
        tid = fields.get("tid", sender)
        pid = fields.get("tgid") or self._tgid_of(tid) or tid
        event = Sigbus(
            record.ts, pid, tid, fields["code"], fields["addr"], fields.get("lsb"), sender
        )
        if record.probe == "sigbus" and tid == sender and event.code == kvm.BUS_MCEERR_AR:
            earlier = self._signals.pop(tid, None)
            if earlier is not None:
                self._out.append(self._with_vm(earlier))
            self._signals[tid] = event
            return
        self._out.append(self._with_vm(event))

    def _signalled(self, record: Record) -> None:
        event = self._signals.pop(record.fields["common_pid"], None)
        if event is None:
            return
        fields = record.fields
        vm = self._key(record, event.ts)
        self._out.append(_signal(event, vm, fields["vid"], fields["gfn"]))

    def _release_signals(self, now: int) -> None:
        late = [tid for tid, event in self._signals.items() if now - event.ts > SIGNAL_WAIT_NS]
        for tid in late:
            self._out.append(self._with_vm(self._signals.pop(tid)))

    @property
    def waiting(self) -> bool:
        """Whether a signal still waits for its fault."""
        return bool(self._signals)

    def _with_vm(self, event: Sigbus) -> Sigbus:
        vms = self.vms.of_pid(event.pid)
        return _signal(event, vms[0], None, None) if len(vms) == 1 else event


def _signal(event: Sigbus, vm: int, vcpu: int | None, gfn: int | None) -> Sigbus:
    return Sigbus(
        event.ts,
        event.pid,
        event.tid,
        event.code,
        event.hva,
        event.lsb,
        event.sender,
        vm,
        vcpu,
        gfn,
    )


def _exit_key(fields: dict[str, Any]) -> ExitKey:
    ret, reason = fields["ret"], fields["reason"]
    annotated = reason == kvm.EXIT_MEMORY_FAULT and -ret in (kvm.EFAULT, kvm.EHWPOISON)
    if annotated and "gpa" in fields and "flags" in fields:
        return ExitKey(fields["vcpu"], ret, reason, fields["gpa"], fields["flags"])
    return ExitKey(fields["vcpu"], ret, reason)


def _exit(ts: int, vcpu: tuple[int, int], key: ExitKey, detail: Detail, count: int) -> Exit:
    vm, number = vcpu
    return Exit(
        ts,
        vm,
        number,
        -key.ret,
        key.reason,
        annotated=key.gpa is not None,
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


def _same(fault: dict[str, Any], run: dict[str, Any]) -> bool:
    """Whether a fault record is of the exit that ended this KVM_RUN."""
    exits = fault.get("exits")
    return exits is not None and exits == run.get("exits") and fault["vcpu"] == run["vcpu"]


def _access(fault: dict[str, Any]) -> str | None:
    if "write" not in fault or "exec" not in fault:
        return None
    return "x" if fault["exec"] else "w" if fault["write"] else "r"


def _arm64(fields: dict[str, Any]) -> None:
    """Turn the syndrome registers of an arm64 guest abort into the fields that x86 has."""
    if "hpfar" not in fields:
        return
    fields["gfn"] = ((fields["hpfar"] & ~0xF & ((1 << 44) - 1)) << 8) >> kvm.PAGE_SHIFT
    if "esr" in fields:
        fields["exec"] = fields["esr"] >> 26 & 0x3F == 0x20  # ESR_ELx_EC_IABT_LOW
        fields["write"] = not fields["exec"] and bool(fields["esr"] & 1 << 6)  # ESR_ELx_WNR


def _listed(fields: dict[str, Any]) -> int | None:
    """The ``struct kvm`` of the first file on the guest_memfd's list, if it has one."""
    entry = fields.get("entry")
    if not entry or "kvm" not in fields or abs(entry - fields["mapping"]) < _HEAD_NEAR:
        return None
    return int(fields["kvm"]) or None


def _is_last(fields: dict[str, Any]) -> bool:
    """Whether the list's second entry is its head, so that the first one is all there is."""
    return bool(fields.get("next")) and abs(fields["next"] - fields["mapping"]) < _HEAD_NEAR


def _bound(pending: OrderedDict[Any, Any], limit: int) -> None:
    while len(pending) > limit:
        pending.popitem(last=False)
