"""Facts of an incident's timeline and of its verdicts, which ``views.timeline`` puts into words."""

from __future__ import annotations

from dataclasses import dataclass
from enum import StrEnum, auto

from kvmtrace.events import Event, Owner


class EntryKind(StrEnum):
    """What an entry of the timeline is about; ``views.timeline`` puts it into words."""

    POISON = auto()
    FOUND = auto()
    OWNER = auto()
    MAPPED = auto()  # by a VM that does not own it
    EXIT = auto()
    REFUSAL = auto()
    SIGNAL = auto()
    OWN_SIGNAL = auto()  # to the thread that poisoned the page itself
    NOTIFIED_AGAIN = auto()  # although the page is unpoisoned
    VCPU_STATE = auto()
    PAGE_REPLACED = auto()
    UNPOISON = auto()
    REBOOT = auto()
    SOFT_OFFLINE = auto()
    VM_GONE = auto()
    HARDWARE_ERROR = auto()
    MORE_HARDWARE_ERRORS = auto()  # of kinds for which there was no room
    CLOCK_STEP = auto()


class JoinedBy(StrEnum):
    """By what an event was joined to an incident."""

    LOOKUP = auto()  # by ``Owned.via``
    PAGE_TABLE = auto()  # the entry at the signal's address has the pfn
    PAGE_TABLE_CHANGED = auto()
    PAGE_FLAGS = auto()
    PFN = auto()
    VM = auto()  # the gfn is not known
    GFN = auto()
    NEAR_GFN = auto()  # within the loss at gfn ``Join.at``
    NEAR_HVA = auto()  # within the loss at hva ``Join.at``
    GMEM_THREAD = auto()  # memory_failure called guest_memfd and then traced its result
    POISONING_THREAD = auto()
    EARLIER_POISONING_THREAD = auto()
    CONSUMING_THREAD = auto()
    NOTIFIED_THREAD = auto()
    PAGE_ADDRESS = auto()
    ADDRESS = auto()  # exact to ``Join.at`` bytes
    CLOCK = auto()


@dataclass(frozen=True, slots=True)
class Join:
    """By what an event was joined to an incident; ``at``: see ``JoinedBy``."""

    by: JoinedBy
    at: int | None = None


@dataclass(frozen=True, slots=True)
class TimelineEntry:
    """An entry of an incident's timeline: from ``ts`` to ``last_ts``, ``count`` times.

    ``event``: the first one of the kind, which has the other facts. ``owner``: of an OWNER entry.
    ``vm``: whom it concerns, by key. ``vmm``: False where a notified process runs no VM.
    """

    ts: int
    kind: EntryKind
    event: Event | None = None
    joined_by: Join | None = None
    vm: int | None = None
    count: int = 1
    last_ts: int | None = None
    owner: Owner | None = None
    vmm: bool = True


class FindingKind(StrEnum):
    """What a verdict rests on; ``views.timeline`` puts it into words."""

    VM_GONE = auto()  # after_ns: since the first notification, since_last_ns: since the last
    LOOPS = auto()  # vcpu, count, within_ns
    LOOPED = auto()  # the same, of a loop that was cut off by the end of the VM
    LOOP_ENDED = auto()  # the same, of a loop that ended on its own
    THREAD_ENDED = auto()  # vcpu, tid, after_ns
    ASLEEP = auto()  # vcpu, tid, after_ns: outside KVM_RUN, and used no CPU time
    AWAKE_BETWEEN = auto()  # vcpu, tid, cpu_ns: outside KVM_RUN in all samples, but ran
    MENDED_BETWEEN = auto()  # the same, and its VM has another page in place of the poisoned one
    RAN_ON = auto()  # vcpu, tid, state, after_ns, cpu_ns
    TOO_EARLY = auto()  # vcpu, tid, state, after_ns
    NOT_NOTIFIED_AGAIN = auto()
    PAGE_REPLACED = auto()  # hva
    NO_VCPU_NOTIFIED = auto()
    NO_SAMPLE = auto()


@dataclass(frozen=True, slots=True)
class Finding:
    """One fact that a verdict rests on; ``FindingKind`` lists the fields that each kind has.

    ``vcpu`` None: a thread that is no vCPU, or unknown. ``state``: see ``events.VcpuState``.
    ``cpu_ns``: CPU time that the thread used between the samples, None where not known.
    """

    kind: FindingKind
    vcpu: int | None = None
    tid: int | None = None
    state: str | None = None
    count: int = 0
    within_ns: int = 0
    after_ns: int = 0
    since_last_ns: int = 0
    cpu_ns: int | None = None
    hva: int | None = None
