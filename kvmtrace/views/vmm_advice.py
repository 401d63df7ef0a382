"""What a VMM can do while a page of its VM's memory is lost: only what was tried.

Tried with QEMU 10.0 for anonymous, memfd and hugetlb memory, at every run of the tests
(tests/lab/qemu_guest.py); once by hand with QEMU 7.2 and 11.1, and with virsh of libvirt 11.3.
Proxmox VE's commands are those of qm(1).
For every other VMM, what holds for all: a process that is started again has other pages, and
migration, snapshots and dumps read every page. A DAX file or a device keeps its lost pages, and so
does a file in tmpfs or hugetlbfs that was not removed (shmem_error_remove_folio,
hugetlbfs_error_remove_folio).
"""

from __future__ import annotations

import re
from dataclasses import dataclass

from kvmtrace import page_types
from kvmtrace.model import VmIdentity

_UUID = re.compile(r"[0-9a-f]{8}(-[0-9a-f]{4}){3}-[0-9a-f]{12}")
# virsh takes digits for the number of a running domain, and a dash for an option.
_PLAIN_NAME = re.compile(r"(?=.*[A-Za-z_])[A-Za-z0-9_][\w.+-]{0,23}", re.ASCII)


@dataclass(frozen=True, slots=True)
class Vmm:
    """What is known of a kind of VMM, with a kind of memory.

    ``replaces``: what makes it put another page in place, with ``{how}`` for the commands; None:
    nothing is known to. ``reading``: why it must not read all of the memory. ``huge``: what it
    needs if a huge page is lost; None: not known.
    """

    replaces: str | None = None
    reading: str = "each of these reads every page, the lost one too"
    huge: str | None = None


_UNTRIED = Vmm()

_TRIED = {
    # Before 10.0, a reset replaces only pages of anonymous memory, but always allows migration:
    # with memfd or hugetlb, QEMU then dies as it migrates (seen with 7.2).
    "qemu": Vmm(
        replaces=(
            "where QEMU is 10.0 or newer, reboot the guest or reset the VM ({how}): QEMU then puts "
            "another page in place, and can migrate the VM again"
        ),
        reading="QEMU refuses, or dies as it reads the lost page",
        huge=(
            "the host needs a free huge page for that (HugePages_Free in /proc/meminfo): without "
            "one, QEMU does not start, and after a reset it dies where the page was"
        ),
    ),
}


def known(vmm: str | None, *, guest_memfd: bool, page_type: str | None = None) -> Vmm:
    """Return what is known of a VMM, for a lost page of guest_memfd or of other memory."""
    # QEMU 10 has guest_memfd for confidential VMs only, which the lab cannot run.
    if guest_memfd or page_types.is_of_a_device(page_type or ""):
        return _UNTRIED
    return _TRIED.get(vmm or "", _UNTRIED)


DEVICE = "the DAX file or device that the page belongs to"


def reset(vm: VmIdentity | None) -> str:
    """Commands that reset a VM of QEMU."""
    if vmid := _of_proxmox(vm):
        return f"Proxmox VE: qm reset {vmid}"
    virsh = _for_virsh(vm)
    return "monitor: system_reset" + (f"; libvirt: virsh reset {virsh}" if virsh else "")


def stop_and_start(vm: VmIdentity | None) -> str | None:
    """Commands that stop a VM and start it; None if they are not known."""
    if vmid := _of_proxmox(vm):
        return f"with Proxmox VE: qm stop {vmid} && qm start {vmid}"
    virsh = _for_virsh(vm)
    # A transient domain is gone once it is destroyed: there is nothing to start.
    command = f"virsh destroy {virsh} && virsh start {virsh}"
    return f"with libvirt, if persistent: {command}" if virsh else None


def _of_proxmox(vm: VmIdentity | None) -> str | None:
    """The number of a VM that Proxmox VE started; libvirt does not have it."""
    vmid = vm.vmid if vm is not None and vm.vmm == "qemu" else None
    return vmid if vmid and re.fullmatch("[0-9]{1,12}", vmid) else None


def _for_virsh(vm: VmIdentity | None) -> str | None:
    """The VM's name or uuid for virsh, safe to paste into a shell; None if it is not libvirt's."""
    # libvirt's VMs of QEMU's all have a UUID. Names are what tenants chose.
    if vm is None or vm.vmm != "qemu" or not _UUID.fullmatch(vm.uuid or ""):
        return None
    return vm.name if vm.name and _PLAIN_NAME.fullmatch(vm.name) else vm.uuid
