"""Who is meant: VM keys by the address of a ``struct kvm``, processes by thread."""

from __future__ import annotations

import re
from collections import OrderedDict
from collections.abc import Callable

from kvmtrace.events import Event
from kvmtrace.sources.ftrace.records import Record
from kvmtrace.sources.vm_table import VmTable

_MAX_VMS = 4096
_TGID = re.compile(rb"^Tgid:[ \t]+([0-9]{1,10})$", re.MULTILINE)


def tgid_of(tid: int, proc: str = "/proc") -> int | None:
    """The process of a thread that still runs."""
    try:
        # Bytes: a thread may call itself anything.
        with open(f"{proc}/{tid}/status", "rb") as status:
            found = _TGID.search(status.read())
    except OSError:
        return None
    return int(found[1]) if found else None


class VmResolver:
    """The VM table, asked with records. Events that this leads to go to ``out``.

    ``tgid_of``: thread → process, for records without it.
    """

    def __init__(self, vms: VmTable, tgid_of: Callable[[int], int | None]) -> None:
        self.vms = vms
        self.out: list[Event] = []
        self._tgid_of = tgid_of
        self._keys: OrderedDict[int, int] = OrderedDict()

    def key(self, record: Record, ts: int | None = None) -> int:
        """The key of the VM at ``fields["kvm"]``; VmSeen, if new, at ``ts``."""
        struct = record.fields["kvm"]
        return self._key(struct, self._maker_of(record), ts or record.ts, record.fields.get("comm"))

    def key_of(self, struct: int, pid: int | None, ts: int) -> int:
        """Likewise for an address that only the counts have; its last key, if it is gone."""
        known = self._keys.get(struct)
        return self._key(struct, pid or 0, ts, None) if known is None else known

    def known(self, struct: int) -> int | None:
        """The key of the VM at this address, or of the last one that was there."""
        return self._keys.get(struct)

    def lives(self, struct: int) -> bool:
        """Whether a VM at this address is known, and its end is not."""
        return bool(self.vms.generations(struct))

    def began(self, record: Record) -> None:
        """kvm_arch_init_vm; see VmTable.created."""
        struct, comm = record.fields["kvm"], record.fields.get("comm")
        self.out += self.vms.created(struct, self._maker_of(record), record.ts, comm=comm)
        self.key(record)

    def gone(self, record: Record) -> None:
        """kvm_destroy_vm."""
        struct, comm = record.fields["kvm"], record.fields.get("comm")
        self.out += self.vms.destroyed(struct, self._maker_of(record), record.ts, comm=comm)

    def process_of(self, tid: int, tgid: int | None) -> int:
        """The process of a thread; the thread itself where it has ended and no record has it."""
        return tgid or self._tgid_of(tid) or tid

    def only_vm_of(self, pid: int) -> int | None:
        """The VM of a process that runs just one."""
        keys = self.vms.of_pid(pid)
        return keys[0] if len(keys) == 1 else None

    def struct_of(self, vm: int) -> int | None:
        """Address of a VM's struct kvm, if it was reported."""
        at = self.vms.struct_of(vm)
        return None if at is None else at[0]

    def _maker_of(self, record: Record) -> int:
        fields = record.fields
        tid = fields["common_pid"]
        return int(fields.get("tgid") or self._tgid_of(tid) or fields.get("maker") or tid)

    def _key(self, struct: int, pid: int, ts: int, comm: str | None) -> int:
        key, events = self.vms.key(struct, pid, ts, comm=comm)
        self.out += events
        self._keys[struct] = key
        while len(self._keys) > _MAX_VMS:
            self._keys.popitem(last=False)
        return key
