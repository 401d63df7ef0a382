"""What a VMM may be asked to do while a page of its VM's memory is gone: what was tried, no guess.

Tried with QEMU 10.0 for anonymous, memfd and hugetlb memory, at every run of the tests
(tests/lab/qemu_guest.py); once by hand with QEMU 7.2 and 11.1, and with virsh of libvirt 11.3.
For every other VMM only what holds for all: a process that starts anew has other pages, and
migration, snapshots and dumps read every page.
"""

from __future__ import annotations

import re
from dataclasses import dataclass

from kvmtrace.model import Party

_UUID = re.compile(r"[0-9a-f]{8}(-[0-9a-f]{4}){3}-[0-9a-f]{12}")
# virsh takes digits for the number of a running domain, and a dash for an option.
_PLAIN_NAME = re.compile(r"(?=.*[A-Za-z_])[A-Za-z0-9_][\w.+-]{0,23}", re.ASCII)


@dataclass(frozen=True, slots=True)
class Vmm:
    """What is known of a kind of VMM, with a kind of memory.

    ``replaces``: what makes it put another page in place while it goes on; None: nothing known to.
    ``reading``: why it must not read all of the memory.
    ``huge``: what it needs where a huge page is gone; None: not known.
    ``reset``, ``stop_and_start``: command lines for that, ``{vm}`` being the VM.
    """

    replaces: str | None = None
    reading: str = "that reads every page, the lost one too"
    huge: str | None = None
    reset: str | None = None
    stop_and_start: str | None = None


_UNTRIED = Vmm()
_STOP_AND_START = "with libvirt: virsh destroy {vm} && virsh start {vm}"

_ORDINARY = {
    # Before 10.0 a reset mends anonymous memory only, and lifts the ban on migration all the same:
    # with memfd or hugetlb, QEMU then dies as it migrates (7.2, seen).
    "qemu": Vmm(
        replaces=(
            "where QEMU is 10.0 or newer, reboot the guest or reset the VM (monitor: "
            "system_reset): QEMU then puts another page in place, and can migrate the VM again"
        ),
        reading="QEMU refuses, or dies as it reads the lost page",
        huge=(
            "the host needs a free huge page for that (HugePages_Free in /proc/meminfo): without "
            "one, QEMU does not start, and after a reset it dies where the page was"
        ),
        reset="with libvirt: virsh reset {vm}",
        stop_and_start=_STOP_AND_START,
    ),
}
# QEMU 10 has guest_memfd for confidential VMs only, which the lab cannot run.
_GUEST_MEMFD = {"qemu": Vmm(stop_and_start=_STOP_AND_START)}


def known(vmm: str | None, *, guest_memfd: bool) -> Vmm:
    """What is known of a VMM (``Party.vmm``), for a lost page of guest_memfd or other memory."""
    return (_GUEST_MEMFD if guest_memfd else _ORDINARY).get(vmm or "", _UNTRIED)


def for_virsh(party: Party) -> str | None:
    """The VM as virsh takes it, safe to paste into a shell; None if libvirt did not start it."""
    # libvirt gives every VM a UUID. Names are what tenants chose.
    if party.uuid is None or not _UUID.fullmatch(party.uuid):
        return None
    return party.name if party.name and _PLAIN_NAME.fullmatch(party.name) else party.uuid
