"""The model: immutable snapshots of what is known, which every view draws from.

Built by ``correlate.Correlator`` (VMs, incidents, totals) and completed by ``live.Session`` with
what the source knows of itself (host, probes, what was lost).
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

from kvmtrace.events import Owner

CAUSES = ("hwpoison", "conversion", "backing", "unannotated", "other")
STATES = ("latent", "delivered", "looping", "unowned", "closed")

# Seconds from poison to first delivery: a guest may touch the page at once, or next week.
LATENCY_BUCKETS = (0.001, 0.01, 0.1, 1.0, 10.0, 60.0, 600.0, 3600.0, 86400.0)


@dataclass(frozen=True, slots=True)
class Probe:
    """What became of one probe. ``why``: the reason where it is not attached."""

    name: str
    attached: bool
    target: str | None = None
    via: str | None = None
    why: str | None = None


@dataclass(frozen=True, slots=True)
class ProbeRuns:
    """The kernel's own account of a probe (kernel.bpf_stats_enabled): runs and nanoseconds."""

    runs: int
    run_ns: int


@dataclass(frozen=True, slots=True)
class Host:
    """The machine being watched. ``source_why``: why this source was chosen."""

    name: str
    kernel: str
    source: str
    source_why: str | None = None
    hardware_corrupted_bytes: int | None = None


@dataclass(frozen=True, slots=True)
class Vm:
    """One VM and its exact counts. Times are nanoseconds since the epoch.

    ``exits``: {(errno name, cause or None): exits}; the cause is None where no probe could tell.
    ``sigbus``: {"AR" | "AO": signals}. ``poisoned_pages``: pages it holds in incidents not closed.
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
        """What people call it: the name, else ``pid N``."""
        return self.name or f"pid {self.pid}"


@dataclass(frozen=True, slots=True)
class Incident:
    """A poison joined with its owners and deliveries; ``pfn`` None: the poison was not seen.

    ``exits``, ``sigbus``: deliveries. ``sigbus_at_poison``: signals that the poisoning thread got
    for itself, outside KVM_RUN (madvise on its own mapping): no guest has touched anything.
    """

    id: str
    state: str
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


@dataclass(frozen=True, slots=True)
class Latency:
    """Poison to first delivery: counts per bucket (not cumulative, last is +Inf), and the sum."""

    counts: tuple[int, ...] = (0,) * (len(LATENCY_BUCKETS) + 1)
    sum_seconds: float = 0.0


@dataclass(frozen=True, slots=True)
class Snapshot:
    """Everything a view may show. ``vms`` by key, gone ones too while they are remembered.

    ``poisons``: {(page type, result): events}. ``lost``: {where: count}.
    """

    vms: Mapping[int, Vm] = field(default_factory=dict)
    incidents: tuple[Incident, ...] = ()
    poisons: Mapping[tuple[str, str], int] = field(default_factory=dict)
    latency: Latency = Latency()
    lost: Mapping[str, int] = field(default_factory=dict)
    last_ts: int | None = None
    host: Host | None = None
    probes: tuple[Probe, ...] = ()
    probe_runs: Mapping[str, ProbeRuns] = field(default_factory=dict)
