"""The model: immutable snapshots of what is known, which every view renders.

``correlate.Correlator`` builds them (VMs, incidents, totals); ``session.Session`` adds what the
source reports of itself (host, probes, losses).
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from enum import StrEnum

from kvmtrace import kvm
from kvmtrace.events import ClockStep, Event, Host, Owner, VmSeen, vm_label, wall_time
from kvmtrace.facts import Finding, TimelineEntry
from kvmtrace.probes import Probe, ProbeRuns

CAUSES = ("hwpoison", "conversion", "userfault", "backing", "unannotated", "other")

# Incidents that the model holds; what has no room is counted as lost.
MAX_INCIDENTS = 1024

# Seconds from poison to first delivery: a guest may access the page at once, or next week.
LATENCY_BUCKETS = (0.001, 0.01, 0.1, 1.0, 10.0, 60.0, 600.0, 3600.0, 86400.0)


class IncidentStatus(StrEnum):
    """How far an incident is."""

    LATENT = "latent"  # a VM has the page, and no VMM was notified
    DELIVERED = "delivered"  # a VMM was notified
    LOOPING = "looping"  # a vCPU is notified again and again, now
    UNOWNED = "unowned"  # no VM is known to have the page
    CLOSED = "closed"  # the page is unpoisoned, or its VMs are gone


class PageClass(StrEnum):
    """Whose a poisoned page is."""

    VM = "vm"
    KERNEL = "kernel"  # or memory_failure could not get hold of it: the host is at risk
    PROCESS = "process"  # still in use by a process or a file
    HANDLED = "handled"  # out of use


class VerdictWord(StrEnum):
    """What a VMM did after it was notified; of several VMs' verdicts, the first is the incident's.

    ``correlate.verdicts`` defines them.
    """

    LOOPING = "looping"
    STOPPED = "stopped"
    UNKNOWN = "unknown"
    EXITED = "exited"
    HANDLED = "handled"


@dataclass(frozen=True, slots=True)
class Vm:
    """One VM and its exact counts. Times are nanoseconds since the epoch.

    ``exits``: {(errno name, cause or None): exits}; the cause is None if no probe shows it.
    ``sigbus``: {"AR" | "AO": signals}. ``poisoned_pages``: pages that it has in open incidents.
    ``undelivered``: times that guest_memfd refused a poisoned page and no exit notified the VMM.
    ``forgotten_pages``: of ``poisoned_pages``, those whose incidents had no room; they may have
    been replaced since.
    """

    key: int
    pid: int
    name: str | None
    uuid: str | None
    vmm: str | None
    exits: Mapping[tuple[str, str | None], int]
    sigbus: Mapping[str, int]
    poisoned_pages: int
    last_ts: int | None
    gone: bool
    undelivered: int = 0
    vmid: str | None = None
    forgotten_pages: int = 0
    unread: str | None = None
    unit: str | None = None
    api_socket: str | None = None

    def exits_by_errno(self) -> dict[str, int]:
        """{errno name: exits}."""
        totals: dict[str, int] = {}
        for (errno, _), count in self.exits.items():
            totals[errno] = totals.get(errno, 0) + count
        return totals

    def exits_by_cause(self) -> dict[str, int]:
        """{cause: exits}; exits whose cause is unknown are in none."""
        totals: dict[str, int] = {}
        for (_, cause), count in self.exits.items():
            if cause is not None:
                totals[cause] = totals.get(cause, 0) + count
        return totals

    @property
    def label(self) -> str:
        return vm_label(self.pid, self.name, self.vmid)

    @property
    def identity(self) -> VmIdentity:
        """The VM as incidents remember it."""
        names = (self.name, self.uuid, self.vmm, None, self.vmid)
        return VmIdentity(self.key, self.pid, *names, self.unit, self.api_socket)


@dataclass(frozen=True, slots=True)
class VmIdentity:
    """A VM as an incident remembers it, also when the model no longer does."""

    key: int
    pid: int
    name: str | None = None
    uuid: str | None = None
    vmm: str | None = None
    gone_ts: int | None = None
    vmid: str | None = None
    unit: str | None = None
    api_socket: str | None = None

    @property
    def label(self) -> str:
        return vm_label(self.pid, self.name, self.vmid)


@dataclass(frozen=True, slots=True)
class ErrorHistory:
    """Errors that hardware reported at one place: how many, the first and the last."""

    count: int
    corrected: int
    first_ts: int
    last_ts: int


@dataclass(frozen=True, slots=True)
class Origin:
    """What the hardware reported of a page: its last report of the worst severity, and counts.

    ``via``: the reporters, in order of appearance. ``label``: the DIMM's, or what else it names
    (``dimm_names.names``); ``dimm``: all that was reported of it, including other pages.
    ``socket``, ``node``: of the memory. ``bank``, ``cpu``, ``status``: of the machine check.
    ``consumer_cpu``, ``consumer_socket``: where the bad data was used.
    """

    via: tuple[str, ...]
    history: ErrorHistory
    severity: str | None = None
    addr: int | None = None
    socket: int | None = None
    node: int | None = None
    bank: int | None = None
    cpu: int | None = None
    status: int | None = None
    label: str | None = None
    message: str | None = None
    dimm: ErrorHistory | None = None
    consumer_cpu: int | None = None
    consumer_socket: int | None = None


@dataclass(frozen=True, slots=True)
class Notification:
    """How often one vCPU of a VM was notified; ``vcpu`` None: a thread that is no vCPU, or unknown.

    ``most``: notifications of that page of a huge page which had most of them.
    """

    vm: int
    vcpu: int | None
    exits: int
    sigbus: Mapping[str, int]
    first_ts: int
    last_ts: int
    most: int | None = None

    @property
    def count(self) -> int:
        """Exits and signals together."""
        return self.exits + sum(self.sigbus.values())

    @property
    def repeats(self) -> int:
        """How often it was notified of the same page."""
        return self.count if self.most is None else self.most


@dataclass(frozen=True, slots=True)
class Verdict:
    """What a VM's VMM did after it was notified, and what that verdict rests on.

    ``evidence``: most important first. ``early``: it is unknown because the VMM was notified only
    just now.
    """

    vm: int
    word: VerdictWord
    evidence: tuple[Finding, ...]
    early: bool = False


@dataclass(frozen=True, slots=True)
class Incident:
    """A poison joined with its owners and deliveries; ``pfn`` None: the poison was not seen.

    ``exits``, ``sigbus``: deliveries. ``sigbus_at_poison``: signals that the poisoning thread got
    itself, outside KVM_RUN (madvise on its own mapping); no guest has accessed the page.
    ``sigbus_to_others``: signals to processes that had the page mapped and run no VM.
    ``undelivered``: refusals of guest_memfd that no exit delivered. ``before_start``: poisoned
    before kvmtrace started. ``rebooted_ts``: when the host was rebooted, if that ended it.
    ``size``: bytes lost, if known. ``omitted``: timeline entries that had
    no room. ``released``: owners that were later seen without the page. ``page_class``: None if the
    kernel's verdict is not known. ``guest_memfd``: the page is known to be of a guest_memfd.
    ``former_ids``: of incidents that turned out to be of the same page.
    """

    id: str
    state: IncidentStatus
    pfn: int | None
    page_type: str | None
    result: str | None
    poisoned_ts: int | None
    owners: tuple[Owner, ...]
    exits: int = 0
    sigbus: int = 0
    sigbus_at_poison: int = 0
    first_delivery_ts: int | None = None
    last_delivery_ts: int | None = None
    undelivered: int = 0
    before_start: bool = False
    unpoisoned_ts: int | None = None
    size: int | None = None
    origin: Origin | None = None
    vm_identities: Mapping[int, VmIdentity] = field(default_factory=dict)
    notifications: tuple[Notification, ...] = ()
    verdicts: tuple[Verdict, ...] = ()
    timeline: tuple[TimelineEntry, ...] = ()
    omitted: int = 0
    released: tuple[Owner, ...] = ()
    sigbus_to_others: int = 0
    page_shift: int = kvm.PAGE_SHIFT
    page_class: PageClass | None = None
    guest_memfd: bool = False
    rebooted_ts: int | None = None
    former_ids: tuple[str, ...] = ()

    @property
    def host_at_risk(self) -> bool:
        """Whether the kernel uses the page, or may: it can access it at any time."""
        return self.page_class == PageClass.KERNEL and self.state != IncidentStatus.CLOSED

    @property
    def verdict(self) -> VerdictWord | None:
        """The verdict that matters most; None if no VM was notified."""
        words = {verdict.word for verdict in self.verdicts}
        return next((word for word in VerdictWord if word in words), None)

    def lost_gfns(self, owner: Owner) -> tuple[int, int] | None:
        """First and last gfn that an owner may have lost; None if its gfn is not known."""
        return lost_gfns(owner, self.size, self.page_shift)


def lost_gfns(owner: Owner, size: int | None, page_shift: int) -> tuple[int, int] | None:
    """First and last gfn that an owner may have lost; None if its gfn is not known.

    A huge page is lost as a whole, as far as it is in the owner's memslot.
    """
    if owner.gfn is None:
        return None
    pages = max(1, (size or 0) >> page_shift)
    if pages == 1 or owner.hva is None:
        return owner.gfn, owner.gfn
    first = owner.gfn - (owner.hva >> page_shift) % pages
    return max(0, first), first + pages - 1


@dataclass(frozen=True, slots=True)
class Reported:
    """What hardware reported of a page, and its label: the DIMM's or see ``dimm_names.names``."""

    history: ErrorHistory
    label: str | None = None


@dataclass(frozen=True, slots=True)
class SoftOfflinedPage:
    """A page whose contents were moved away before it failed: no data is lost.

    ``errno``: why it could not be moved, 0 if it was. ``origin``: what hardware reported of it.
    """

    pfn: int
    ts: int
    errno: int
    origin: Origin | None = None


@dataclass(frozen=True, slots=True)
class KernelAccount:
    """The kernel's own counts and ours. ``handled``: its memory failures since the first reading.

    ``seen``: those that came as events. ``handled`` is None if the kernel does not count.
    ``hardware_corrupted_bytes``: HardwareCorrupted as last read.
    """

    at_start: Mapping[str, int]
    now: Mapping[str, int]
    handled: int | None
    seen: int
    hardware_corrupted_bytes: int | None = None

    @property
    def missed(self) -> int:
        """Memory failures that the kernel handled and kvmtrace did not see."""
        return max(0, (self.handled or 0) - self.seen)


@dataclass(frozen=True, slots=True)
class HistoryState:
    """What ``serve`` keeps on the disk. Times: nanoseconds since the epoch, by the wall clock.

    ``is_written``: False while the disk does not take it. ``size``: bytes. ``oldest_ns``: of the
    oldest event; ``last_write_ns``: when events were written last. ``written``: events since serve
    started; ``waiting``: those that the disk has not taken yet. ``dropped``: {why: events that were
    not kept}; ``deleted``: {why: events that were}. ``errors``: failed attempts to write.
    ``start``: what was known at the start, from earlier serves. ``was_cut``: the last of them may
    have counted more than it kept.
    """

    path: str
    is_written: bool
    size: int
    oldest_ns: int | None
    last_write_ns: int | None
    written: int
    waiting: int
    dropped: Mapping[str, int]
    deleted: Mapping[str, int]
    errors: int
    start: Snapshot | None = None
    was_cut: bool = False


@dataclass(frozen=True, slots=True)
class Latency:
    """Poison to first delivery: counts per bucket (not cumulative, last is +Inf), and the sum."""

    counts: tuple[int, ...] = (0,) * (len(LATENCY_BUCKETS) + 1)
    sum_seconds: float = 0.0


@dataclass(frozen=True, slots=True)
class Snapshot:
    """Everything a view may show. ``vms``: by key, including gone ones that are remembered.

    ``poisons``: {(page type, result): events}. ``lost``: {where: count}. ``dimms``: hardware errors
    by DIMM label. ``reported``: those by pfn, if a report named one page, poisoned or not.
    ``kernel_pages``: poisoned pages of the class KERNEL, including those whose incidents were
    forgotten. ``steps``: of the wall clock, in order. All times are by a clock that is not stepped;
    ``wall`` gives the time of day. ``since``: when watching began, as far as is known.
    ``history``: what serve keeps, if it does.
    """

    vms: Mapping[int, Vm] = field(default_factory=dict)
    incidents: tuple[Incident, ...] = ()
    poisons: Mapping[tuple[str, str], int] = field(default_factory=dict)
    latency: Latency = Latency()
    lost: Mapping[str, int] = field(default_factory=dict)
    last_ts: int | None = None
    soft_offlines: tuple[SoftOfflinedPage, ...] = ()
    dimms: Mapping[str, ErrorHistory] = field(default_factory=dict)
    kernel: KernelAccount | None = None
    page_shift: int = kvm.PAGE_SHIFT
    host: Host | None = None
    probes: tuple[Probe, ...] = ()
    probe_runs: Mapping[str, ProbeRuns] = field(default_factory=dict)
    kernel_pages: int = 0
    reported: Mapping[int, Reported] = field(default_factory=dict)
    steps: tuple[ClockStep, ...] = ()
    since: int | None = None
    history: HistoryState | None = None

    def incident(self, key: str) -> Incident | None:
        """Return the incident with this id, else the one that had it before."""
        known = {one.id: one for one in self.incidents}
        former = (one for one in self.incidents if key in one.former_ids)
        return known.get(key) or next(former, None)

    def wall(self, ts: int) -> int:
        """Return the wall clock's time at ``ts``, in nanoseconds since the epoch."""
        return wall_time(ts, self.steps)

    def of_log(self, host: Host, probes: tuple[Probe, ...], since: int | None = None) -> Snapshot:
        """Return a copy with the host of a recording, and its memory as last reported there."""
        corrupted = self.kernel.hardware_corrupted_bytes if self.kernel else None
        if corrupted is not None:
            host = replace(host, hardware_corrupted_bytes=corrupted)
        return replace(self, host=host, probes=probes, since=since)


@dataclass(frozen=True, slots=True)
class CorrelatedEvent:
    """An event with its joins, as the line views show it.

    ``vm``: identity at the time. ``owners``: all owners of a Poison, new ones of an Owned.
    ``wall_ts``: the wall clock's time, if it was stepped since kvmtrace started.
    """

    event: Event
    vm: VmSeen | None = None
    cause: str | None = None
    incident: str | None = None
    owners: tuple[tuple[Owner, VmSeen | None], ...] = ()
    wall_ts: int | None = None

    @property
    def wall(self) -> int:
        """When it happened, by the wall clock."""
        return self.event.ts if self.wall_ts is None else self.wall_ts
