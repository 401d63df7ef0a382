"""Look up guest memory at any time: memslots that were reported, processes with a guest_memfd.

On kernels without typecasts in probe arguments (before 7.3) the probe on a poisoned guest_memfd
page has its inode but not its VM. /proc shows which processes have that inode open.
"""

from __future__ import annotations

from kvmtrace.events import Event, Owner
from kvmtrace.sources import guest_memory
from kvmtrace.sources.ftrace.memslots import Memslots
from kvmtrace.sources.ftrace.vms import VmResolver
from kvmtrace.vmm import processes


class FtraceMemory:
    """The ftrace source's implementation of sources.guest_memory.Memory."""

    def __init__(self, vms: VmResolver, guest: Memslots, proc: str = "/proc") -> None:
        self._vms = vms
        self._guest = guest
        self._proc = proc

    def slots(self, vm: int) -> tuple[guest_memory.Memslot, ...] | None:
        """The memslots that were created, changed, or faulted on since the start."""
        struct = self._vms.struct_of(vm)
        return self._guest.slots(struct) if struct is not None else ()

    def huge_entry(self, vm: int, hva: int) -> int | None:
        """Return None: the VMM's page table cannot be read."""
        return None

    def page(self, pfn: int) -> tuple[guest_memory.Page, list[Event]] | None:
        """A guest_memfd page with its VM, if only one VM can have it; else None."""
        page = self._guest.page(pfn)
        if page is None:
            return None
        inode, index = page
        devices: dict[int, int] = {}
        owners: list[Owner] = []
        vms_of = self._vms.table.pids()
        for pid, held in processes.guest_memfds(vms_of, self._proc).items():
            if inode in held:
                devices[pid] = held[inode]
                owners += [Owner(vm, None) for vm in vms_of[pid]]
        if len(owners) != 1:
            # Several owners: the descriptor was passed on, or a process runs several VMs.
            return None
        (device,) = devices.values()
        return guest_memory.Page(inode, device, index, tuple(owners)), []
