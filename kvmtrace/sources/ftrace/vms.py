"""VMs and processes of records: ``vm_new``, ``vm_gone``; VM keys by address of ``struct kvm``."""

from __future__ import annotations

import re
from collections.abc import Callable

from kvmtrace.bounded import BoundedDict
from kvmtrace.events import Event
from kvmtrace.sources.ftrace.fields import (
    COMM,
    HAS_PRIVATE,
    MAKER,
    RET,
    TGID,
    ProbeRequest,
    helper,
    needed,
)
from kvmtrace.sources.ftrace.records import Record
from kvmtrace.sources.limits import MAX_VM_ADDRESSES
from kvmtrace.sources.vm_table import VmTable

PROBES = {
    "vm_new": ProbeRequest(
        "poison",
        (
            needed("kvm", "kvm:x64"),
            helper("tgid", TGID),
            COMM,
            helper("has_private", f"kvm->{HAS_PRIVATE}"),
            RET,
        ),
        # Where a return probe cannot have arguments (before 6.6). A VM that then fails to be made
        # is one too many, until its process ends.
        at_entry=(needed("kvm", "$arg1:x64"), COMM),
        filters=(("ret", "ret == 0"),),
    ),
    "vm_gone": ProbeRequest(
        "poison",
        (needed("kvm", "kvm:x64", "$arg1:x64"), helper("tgid", TGID), helper("maker", MAKER), COMM),
    ),
}

_TGID = re.compile(rb"^Tgid:[ \t]+([0-9]{1,10})$", re.MULTILINE)


def tgid_of(tid: int, proc: str = "/proc") -> int | None:
    """The process of a thread; None if the thread has ended."""
    try:
        # Bytes, as a thread may have any name.
        with open(f"{proc}/{tid}/status", "rb") as status:
            found = _TGID.search(status.read())
    except OSError:
        return None
    return int(found[1]) if found else None


class VmResolver:
    """Resolves records to VM keys. ``table``'s events (VmSeen, VmGone) are added to ``events``.

    ``tgid_of``: thread → process, for records without it.
    """

    def __init__(self, table: VmTable, tgid_of: Callable[[int], int | None]) -> None:
        self.table = table
        self.events: list[Event] = []
        self._tgid_of = tgid_of
        self._keys: BoundedDict[int, int] = BoundedDict(MAX_VM_ADDRESSES)

    def key(self, record: Record, ts: int | None = None) -> int:
        """The key of the VM at ``fields["kvm"]``. If it is new, adds a VmSeen at ``ts``."""
        struct = record.fields["kvm"]
        return self._key(struct, self._vmm_of(record), ts or record.ts, record.fields.get("comm"))

    def key_of(self, struct: int, pid: int | None, ts: int) -> int:
        """The same for an address from the counts; the last VM's key if that was destroyed."""
        known = self._keys.get(struct)
        return self._key(struct, pid or 0, ts, None) if known is None else known

    def known_key(self, struct: int) -> int | None:
        """The key of the VM at this address, or of the last one that was there; None if unknown."""
        return self._keys.get(struct)

    def is_alive(self, struct: int) -> bool:
        """Whether a VM at this address is known and not destroyed."""
        return bool(self.table.generations(struct))

    def vm_created(self, record: Record) -> None:
        """kvm_arch_init_vm returned."""
        struct, comm = record.fields["kvm"], record.fields.get("comm")
        self.events += self.table.created(struct, self._vmm_of(record), record.ts, comm=comm)
        self.key(record)

    def vm_destroyed(self, record: Record) -> None:
        """kvm_destroy_vm was called."""
        struct, comm = record.fields["kvm"], record.fields.get("comm")
        self.events += self.table.destroyed(struct, self._vmm_of(record), record.ts, comm=comm)

    def pid_of(self, tid: int, tgid: int | None) -> int:
        """The process of a thread; the thread's own ID if the thread has ended."""
        return tgid or self._tgid_of(tid) or tid

    def only_vm_of(self, pid: int) -> int | None:
        """The VM of a process that runs exactly one."""
        keys = self.table.of_pid(pid)
        return keys[0] if len(keys) == 1 else None

    def struct_of(self, vm: int) -> int | None:
        """The address of a VM's ``struct kvm``; None if it was not reported."""
        at = self.table.struct_of(vm)
        return None if at is None else at[0]

    def _vmm_of(self, record: Record) -> int:
        fields = record.fields
        tid = fields["common_pid"]
        return int(fields.get("tgid") or self._tgid_of(tid) or fields.get("maker") or tid)

    def _key(self, struct: int, pid: int, ts: int, comm: str | None) -> int:
        key, events = self.table.key(struct, pid, ts, comm=comm)
        self.events += events
        self._keys[struct] = key
        return key
