"""How a probe is defined: ProbeRequest, and the fields that several topics share.

A field has alternatives, from the most complete to those that older kernels take: BTF argument
names (``vcpu->kvm``, Linux 6.6) come before registers (``$arg1``). A field is left out if no
alternative fits, which costs one fact. Only a missing ``needed`` field costs the probe.
``{struct.member}`` is an offset from BTF.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Collection
from dataclasses import dataclass

from kvmtrace.linux.tracefs.dynamic_events import Field


@dataclass(frozen=True, slots=True)
class Sift:
    """Two events: one of every call, with little to fetch, and the probe's own, made from it.

    ``every``: fields of the former. ``conditions``: (field that it needs, condition); the first
    whose field there is limits which calls are made into the latter. ``fields``: of the latter, and
    ``arm64`` in addition, or ``x86``.
    """

    every: tuple[Field, ...]
    conditions: tuple[tuple[str, str], ...]
    fields: tuple[Field, ...]
    arm64: tuple[Field, ...] = ()
    x86: tuple[Field, ...] = ()

    def fields_on(self, machine: str, known: Collection[str]) -> tuple[Field, ...]:
        """The latter's fields for an architecture, of those ``known`` in the former."""
        found = (*self.fields, *(self.arm64 if machine == "aarch64" else self.x86))
        return tuple(
            one
            for one in found
            if all(name in known for name in re.findall(r"\$(\w+)", one.alternatives[0]))
        )


@dataclass(frozen=True, slots=True)
class ProbeRequest:
    """What one probe records, and where.

    ``ring``: a name in limits.RING_KIB. ``fields``: none for a tracepoint, which has its own.
    ``arm64``: the fields there, if they differ. ``at_entry``: fields at the function's entry, for
    kernels that refuse the others. ``filters``: (field that it needs, condition); the first whose
    field there is limits what goes into the ring. ``triggers``: fields that there are → hist
    triggers, which totals.KernelTotals reads. ``sift``: replaces ``fields`` where the kernel takes
    it, for a function that mostly returns what does not matter.
    """

    ring: str
    fields: tuple[Field, ...] = ()
    arm64: tuple[Field, ...] = ()
    at_entry: tuple[Field, ...] = ()
    filters: tuple[tuple[str, str], ...] = ()
    triggers: Callable[[Collection[str]], tuple[str, ...]] = lambda _fields: ()
    sift: Sift | None = None

    def fields_on(self, machine: str) -> tuple[Field, ...]:
        """The fields for an architecture (``os.uname().machine``)."""
        return self.arm64 if machine == "aarch64" and self.arm64 else self.fields


def optional(name: str, *alternatives: str) -> Field:
    """A field that costs one fact if it is missing."""
    return Field(name, alternatives)


def helper(name: str, *alternatives: str) -> Field:
    """A field whose value can be found in another way, too."""
    return Field(name, alternatives, helper=True)


def needed(name: str, *alternatives: str) -> Field:
    """A field without which the probe is useless."""
    return Field(name, alternatives, needed=True)


def values(fields: Collection[str], *wanted: str) -> str:
    """A trigger's ``vals=``: hits, and those of ``wanted`` that the event has."""
    return ",".join(["vals=hitcount", *(name for name in wanted if name in fields)])


RET = needed("ret", "$retval:s32")
COMM = helper("comm", "$comm:string")

# The process, not the thread that made the VM (kvm->userspace_pid), which may have ended.
TGID = "kvm->mm->owner->tgid"
MAKER = "kvm->userspace_pid"

# Whether a VM may have private memory, and so exits that convert it.
HAS_PRIVATE = "arch.has_private_mem:u8"

VCPU = (
    needed("vcpu", "vcpu:x64"),
    needed("kvm", "vcpu->kvm:x64"),
    needed("vid", "vcpu->vcpu_id"),
    helper("tgid", f"vcpu->{TGID}"),
    helper("maker", f"vcpu->{MAKER}"),
)


def slot_fields(at: str) -> tuple[Field, ...]:
    """The memslot at the argument ``at``; read by memslots.Memslots.add."""
    return (
        optional("base", f"{at}->base_gfn"),
        optional("npages", f"{at}->npages"),
        optional("hva", f"{at}->userspace_addr"),
        optional("flags", f"{at}->flags"),
        optional("as_id", f"{at}->as_id"),
        optional("pgoff", f"{at}->gmem.pgoff"),
        optional("ino", f"{at}->gmem.file->f_inode->i_ino"),
    )
