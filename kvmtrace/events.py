"""Events: what the kernel reported, one frozen record each.

A field that the source cannot have is ``None``, never 0. Times are nanoseconds since the epoch
(UTC). Sources convert them from CLOCK_MONOTONIC, with which both BPF and tracefs stamp, by one
offset that is measured at the start: differences of times are durations, even if the wall clock is
stepped. ``wall_time`` gives the time of day. ``vm`` is a key that the source gives to one ``struct
kvm`` for its lifetime and never reuses; ``VmSeen`` has what is known of that VM.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

from kvmtrace import kvm


@dataclass(frozen=True, slots=True)
class Owner:
    """One place where a page is guest memory.

    ``vm``: key. ``gfn``: guest frame number, in host pages. ``hva``: address in the VMM.
    """

    vm: int
    gfn: int | None
    hva: int | None = None


def vm_label(pid: int, name: str | None, vmid: str | None) -> str:
    """What people call a VM: the name, else ``pid N``; Proxmox VE's number in front."""
    name = name or f"pid {pid}"
    return f"{vmid} ({name})" if vmid else name


@dataclass(frozen=True, slots=True)
class Event:
    """Base of all events. ``ts``: nanoseconds since the epoch."""

    kind: ClassVar[str]
    ts: int


@dataclass(frozen=True, slots=True)
class VmSeen(Event):
    """A VM was discovered; comes again, with the same key, when more is known of it.

    ``vmid``: Proxmox VE's number for it. ``unit``: the systemd unit that is this VM alone.
    ``api_socket``: the path of its VMM's API on the host. ``unread``: why its process could not be
    looked up; only what can be read without a risk of hanging is known then
    (``linux.proc_reader``).
    """

    kind: ClassVar[str] = "vm_seen"
    vm: int
    pid: int
    name: str | None = None
    uuid: str | None = None
    vmm: str | None = None
    vmid: str | None = None
    unread: str | None = None
    unit: str | None = None
    api_socket: str | None = None

    @property
    def label(self) -> str:
        return vm_label(self.pid, self.name, self.vmid)


@dataclass(frozen=True, slots=True)
class VmGone(Event):
    """kvm_destroy_vm ran, or the VMM's process has ended if that was missed."""

    kind: ClassVar[str] = "vm_gone"
    vm: int


@dataclass(frozen=True, slots=True)
class Exit(Event):
    """KVM_RUN failed; ``count`` exits of exactly this kind, the last of them at ``ts``.

    ``errno`` 0: KVM_RUN returned 0 although it failed: with reason 41 a synchronous external abort,
    with reason 39 a memory fault of arm64's nested virtualization (kvm_handle_vncr_abort).
    ``annotated``: reason 39 with EFAULT, EHWPOISON or 0, so that flags, gpa and size are valid
    (Documentation/virt/kvm/api.rst, KVM_EXIT_MEMORY_FAULT). ``vcpu``, ``reason`` and ``annotated``
    are None if the kernel's map had no room for a counter of their own. ``gmem``: the errno with
    which kvm_gmem_get_pfn failed for this fault, 0 if it was not called, None if that was not
    watched. ``gfn`` may come from the fault handler if the exit is not annotated. ``access``: some
    of "r", "w", "x".
    """

    kind: ClassVar[str] = "exit"
    vm: int
    vcpu: int | None
    errno: int
    reason: int | None
    annotated: bool | None
    tid: int | None = None
    flags: int | None = None
    gpa: int | None = None
    size: int | None = None
    gfn: int | None = None
    private: bool | None = None
    access: str | None = None
    gmem: int | None = None
    count: int = 1

    @property
    def is_poison(self) -> bool:
        """Whether it reports poison: EHWPOISON, or on arm64 KVM_EXIT_ARM_SEA or a nested fault."""
        if self.errno != 0:
            return self.errno == kvm.EHWPOISON
        nested = self.reason == kvm.EXIT_MEMORY_FAULT and self.gmem == kvm.EHWPOISON
        return nested or self.reason == kvm.EXIT_ARM_SEA


JOIN_NS = 5_000_000_000
"""How long memory_failure may take from a step that is reported to the ``Poison`` of its thread.

Both are within one call. If it takes longer, the poison was lost."""


@dataclass(frozen=True, slots=True)
class GmemPage:
    """A page of a guest_memfd.

    ``index``: page offset in the guest_memfd. ``owners``: in the order found. ``complete``: False
    if the source could not read all bindings.
    """

    inode: int | None
    index: int
    owners: tuple[Owner, ...] = ()
    complete: bool = True


@dataclass(frozen=True, slots=True)
class Poison(Event):
    """memory_failure_event: type and result as this kernel prints them, and as numbers.

    ``gmem``: the page, if memory_failure called kvm_gmem_error_folio in the same thread before.
    """

    kind: ClassVar[str] = "poison"
    pfn: int
    page_type: str
    result: str
    page_type_nr: int | None = None
    result_nr: int | None = None
    tid: int | None = None
    gmem: GmemPage | None = None


@dataclass(frozen=True, slots=True)
class Owned(Event):
    """A VM owns the poisoned pfn; ``via``: how that was found ("pagemap", …).

    ``size``: bytes lost, if the mapping shows it (a hugetlb page is lost as a whole).
    """

    kind: ClassVar[str] = "owned"
    pfn: int
    owner: Owner
    via: str
    size: int | None = None


@dataclass(frozen=True, slots=True)
class Sigbus(Event):
    """A BUS_MCEERR_* SIGBUS for thread ``tid`` of ``pid``; 2**``lsb`` bytes at ``hva`` are lost.

    ``code`` SI_KERNEL: the kernel could not unmap the page that the thread accessed, and kills it
    (arch/x86/kernel/cpu/mce/core.c, kill_me_now); without ``hva``. ``sender``: the thread in which
    the kernel sent it. ``vcpu`` and ``gfn``: if sent within KVM_RUN, for that vCPU's access. ``vm``
    is None if the process runs no VM, or several of which the thread does not show one. ``pfn``:
    read from the process's page table at ``hva``. ``count``: signals that differ only in time; the
    last of them at ``ts``. ``comm``: the name of the process, if ``vm`` is None.
    """

    kind: ClassVar[str] = "sigbus"
    pid: int
    tid: int
    code: int
    hva: int | None
    lsb: int | None = None
    sender: int | None = None
    vm: int | None = None
    vcpu: int | None = None
    gfn: int | None = None
    pfn: int | None = None
    count: int = 1
    comm: str | None = None


@dataclass(frozen=True, slots=True)
class GmemRefusal(Event):
    """kvm_gmem_get_pfn returned EHWPOISON ``count`` times for a gfn, the last time at ``ts``.

    KVM_RUN may not have notified the VMM: some callers ignore the error.
    """

    kind: ClassVar[str] = "refused"
    vm: int
    gfn: int
    count: int = 1


@dataclass(frozen=True, slots=True)
class MachineCheck:
    """The registers of a machine check (mce:mce_record).

    ``cpu``, ``socket``: where the record was read; the memory is there only if a memory controller
    reports. ``vendor``: the CPU's ("AuthenticAMD"); the meaning of some bits depends on it.
    ``ipid``: AMD's MCA_IPID, the kind of unit that has the bank. ``fru``: AMD's name of the part to
    replace.
    """

    bank: int
    cpu: int
    socket: int
    status: int
    misc: int | None = None
    vendor: str | None = None
    ipid: int | None = None
    fru: str | None = None


@dataclass(frozen=True, slots=True)
class HwError(Event):
    """A memory error as the hardware or the firmware reported it; what is not reported is None.

    ``via``: the tracepoint or function that reported it ("ras:mc_event", …). ``severity``:
    "corrected", "deferred", "recoverable" or "fatal". ``addr``: physical, exact to ``grain`` bytes.
    ``count``: errors that this report stands for. ``label``: the DIMM's, or what else of memory it
    names (``dimm_names.names``). ``label_from``: where the label is from, "edac", "smbios" or "fru"
    (FRU text of firmware's record). ``check``: the registers, if it is a machine check; then
    ``addr`` is a register too, ``pfn`` is None unless that is a physical address, one report may
    stand for several errors, and the rest follows from the registers
    (``sources.convert.machine_check``).
    """

    kind: ClassVar[str] = "hw_error"
    via: str
    severity: str | None = None
    addr: int | None = None
    pfn: int | None = None
    grain: int | None = None
    count: int = 1
    label: str | None = None
    message: str | None = None
    node: int | None = None
    socket: int | None = None
    label_from: str | None = None
    check: MachineCheck | None = None


@dataclass(frozen=True, slots=True)
class SoftOffline(Event):
    """soft_offline_page returned 0, or failed with ``errno``. No data is lost."""

    kind: ClassVar[str] = "soft_offline"
    pfn: int
    errno: int


@dataclass(frozen=True, slots=True)
class Unpoison(Event):
    """unpoison_memory unpoisoned a page."""

    kind: ClassVar[str] = "unpoison"
    pfn: int


@dataclass(frozen=True, slots=True)
class Found(Event):
    """A page that was poisoned before kvmtrace started (/proc/kpageflags, KPF_HWPOISON)."""

    kind: ClassVar[str] = "found"
    pfn: int


@dataclass(frozen=True, slots=True)
class KernelCounts(Event):
    """The kernel's own counts: /sys/devices/system/node/nodeN/memory_failure, HardwareCorrupted.

    ``failures``: all nodes together, by the files' names ("total", "recovered", …).
    ``at_start``: the first reading, before any event.
    """

    kind: ClassVar[str] = "kernel_counts"
    failures: tuple[tuple[str, int], ...]
    hardware_corrupted_bytes: int | None = None
    at_start: bool = False


@dataclass(frozen=True, slots=True)
class VcpuState(Event):
    """State of a vCPU's thread some time after it was notified of poison (/proc/PID/task/TID).

    ``state``: "running", "waiting" (asleep in KVM_RUN), "outside" (asleep elsewhere) or "gone";
    ``ran_ns``: CPU time since the previous sample, None in the first.
    """

    kind: ClassVar[str] = "vcpu"
    vm: int
    tid: int
    state: str
    vcpu: int | None = None
    ran_ns: int | None = None


@dataclass(frozen=True, slots=True)
class PageReplaced(Event):
    """The poisoned page ``pfn`` is no longer at ``hva`` (its start) of a VM's process."""

    kind: ClassVar[str] = "released"
    vm: int
    pfn: int
    hva: int


@dataclass(frozen=True, slots=True)
class Tick(Event):
    """No other event until ``ts``."""

    kind: ClassVar[str] = "quiet"


@dataclass(frozen=True, slots=True)
class ClockStep(Event):
    """The wall clock was stepped by ``step_ns``: set, or the host was suspended meanwhile.

    From ``ts`` on it is ``offset_ns`` ahead of the clock of all events, which is never stepped.
    ``ts``: when the wall clock was last seen without the step. ``suspended_ns``: how long the host
    was suspended, if it was.
    """

    kind: ClassVar[str] = "clock"
    step_ns: int
    offset_ns: int
    suspended_ns: int | None = None


@dataclass(frozen=True, slots=True)
class Reboot(Event):
    """The host began another boot: no page is poisoned any more, and no VM of before runs.

    In what was kept of several boots only. A ``VmGone`` follows for each VM.
    """

    kind: ClassVar[str] = "reboot"


LAST_NS = (1 << 63) - 1
"""The greatest time that can be represented, in the year 2262."""


def wall_time(ts: int, steps: Sequence[ClockStep]) -> int:
    """Return the wall clock's time at ``ts``. ``steps``: all steps, or the last of them."""
    for step in reversed(steps):
        if step.ts <= ts:
            return min(max(0, ts + step.offset_ns), LAST_NS)
    if steps:
        return min(max(0, ts + steps[0].offset_ns - steps[0].step_ns), LAST_NS)
    return ts


def elapsed(ts: int, now: int, steps: Sequence[ClockStep]) -> int:
    """Nanoseconds from ``ts`` to ``now``, including the time in which the host was suspended."""
    suspended = sum(step.suspended_ns or 0 for step in steps if ts < step.ts <= now)
    return now - ts + suspended


@dataclass(frozen=True, slots=True)
class Lost(Event):
    """``count`` items were lost at ``where`` since the last Lost of that place."""

    kind: ClassVar[str] = "lost"
    where: str
    count: int


@dataclass(frozen=True, slots=True)
class Host:
    """The machine being watched. ``source_why``: why this source was chosen.

    ``epoch_offset_ns``: event times minus its CLOCK_MONOTONIC, whatever becomes of the wall clock.
    """

    name: str
    kernel: str
    source: str
    source_why: str | None = None
    hardware_corrupted_bytes: int | None = None
    page_shift: int = kvm.PAGE_SHIFT
    epoch_offset_ns: int | None = None


KINDS: dict[str, type[Event]] = {
    one.kind: one
    for one in list(vars().values())
    if isinstance(one, type) and issubclass(one, Event) and one is not Event
}
"""All events of this file."""
