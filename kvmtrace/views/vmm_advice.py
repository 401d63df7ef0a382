"""What a VMM may be asked to do while a page of its VM's memory is gone: what was tried, no guess.

Tried with QEMU 10.0 for anonymous, memfd and hugetlb memory, at every run of the tests
(tests/lab/qemu_guest.py); once by hand with QEMU 7.2 and 11.1, and with virsh of libvirt 11.3.
Proxmox VE's commands are those of qm(1).
For every other VMM only what holds for all: a process that starts anew has other pages (but of a
DAX file or a device, or of a file in tmpfs or hugetlbfs that was not removed: these keep lost
pages, shmem_error_remove_folio and hugetlbfs_error_remove_folio), and migration, snapshots and
dumps read every page.
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

    ``replaces``: what makes it put another page in place and go on, ``{how}`` being the commands
    for that; None: nothing is known to. ``reading``: why it must not read all of the memory.
    ``huge``: what it needs where a huge page is gone; None: not known.
    """

    replaces: str | None = None
    reading: str = "each of these reads every page, the lost one too"
    huge: str | None = None


_UNTRIED = Vmm()

_TRIED = {
    # Before 10.0 a reset mends anonymous memory only, and lifts the ban on migration all the same:
    # with memfd or hugetlb, QEMU then dies as it migrates (7.2, seen).
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
    """What is known of a VMM, for a lost page of guest_memfd or of other memory."""
    # QEMU 10 has guest_memfd for confidential VMs only, which the lab cannot run.
    if guest_memfd or page_types.is_of_a_device(page_type or ""):
        return _UNTRIED
    return _TRIED.get(vmm or "", _UNTRIED)


DEVICE = "the DAX file or device that the page belongs to"


def reset(party: VmIdentity | None) -> str:
    """How people reset a VM of QEMU's."""
    if vmid := _of_proxmox(party):
        return f"Proxmox VE: qm reset {vmid}"
    virsh = _for_virsh(party)
    return "monitor: system_reset" + (f"; libvirt: virsh reset {virsh}" if virsh else "")


def stop_and_start(party: VmIdentity | None) -> str | None:
    """What people type to stop a VM and start it; None if that is not known."""
    if vmid := _of_proxmox(party):
        return f"with Proxmox VE: qm stop {vmid} && qm start {vmid}"
    virsh = _for_virsh(party)
    # A transient domain is gone once it is destroyed: there is nothing to start.
    command = f"virsh destroy {virsh} && virsh start {virsh}"
    return f"with libvirt, if persistent: {command}" if virsh else None


def _of_proxmox(party: VmIdentity | None) -> str | None:
    """The number of a VM that Proxmox VE started, which libvirt does not know."""
    vmid = party.vmid if party is not None and party.vmm == "qemu" else None
    return vmid if vmid and re.fullmatch("[0-9]{1,12}", vmid) else None


def _for_virsh(party: VmIdentity | None) -> str | None:
    """The VM as virsh takes it, safe to paste into a shell; None if libvirt did not start it."""
    # libvirt's VMs of QEMU's all have a UUID. Names are what tenants chose.
    if party is None or party.vmm != "qemu" or not _UUID.fullmatch(party.uuid or ""):
        return None
    return party.name if party.name and _PLAIN_NAME.fullmatch(party.name) else party.uuid
