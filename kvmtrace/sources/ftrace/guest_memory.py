"""What can be looked up of VMs' memory at any time: slots that were seen, holders of guest_memfds.

On kernels without typecasts in probe arguments (before 7.3) the probe on a poisoned guest_memfd
page has its inode and nothing of its VM; but /proc shows which processes hold that inode.
"""

from __future__ import annotations

from kvmtrace.events import Event, Owner
from kvmtrace.sources import guest_memory
from kvmtrace.sources.ftrace.memslots import Memslots
from kvmtrace.sources.ftrace.vms import VmResolver
from kvmtrace.vmm import processes


class FtraceMemory:
    """guestmem.Memory of the ftrace source."""

    def __init__(self, people: VmResolver, guest: Memslots, proc: str = "/proc") -> None:
        self._people = people
        self._guest = guest
        self._proc = proc

    def slots(self, vm: int) -> tuple[guest_memory.Memslot, ...] | None:
        """Memslots that were made, or faulted on, since the start; None where there are none."""
        struct = self._people.struct_of(vm)
        known = self._guest.slots(struct) if struct is not None else {}
        return tuple(
            guest_memory.Memslot(None, slot.base, slot.npages, slot.hva or 0, space)
            for (space, _), slot in known.items()
        )

    def huge_entry(self, vm: int, hva: int) -> int | None:
        """Nothing: the VMM's page table cannot be read."""
        return None

    def page(self, pfn: int) -> tuple[guest_memory.Page, list[Event]] | None:
        """Of a guest_memfd page: its VM, if one VM alone can have it."""
        page = self._guest.page(pfn)
        if page is None:
            return None
        inode, index = page
        devices: dict[int, int] = {}
        owners: list[Owner] = []
        vms_of = self._people.vms.pids()
        for pid, held in processes.guest_memfds(vms_of, self._proc).items():
            if inode in held:
                devices[pid] = held[inode]
                owners += [Owner(vm, None) for vm in vms_of[pid]]
        if len(owners) != 1:
            # Several: the descriptor was passed on, or a process runs more than one VM.
            return None
        (device,) = devices.values()
        return guest_memory.Page(inode, device, index, tuple(owners)), []
