"""What a VMM can do while a page of its VM's memory is lost: only what was tried.

Tried with QEMU 10.0 for anonymous, memfd and hugetlb memory, at every run of the tests
(tests/lab/qemu_guest.py; by virsh of libvirt 11.3: tests/lab/libvirt_guest.py); once by hand with
QEMU 7.2 and 11.1.
For every other VMM, what holds for all: a process that is started again has other pages, and
migration, snapshots and dumps read every page. A DAX file or a device keeps its lost pages, and so
does a file in tmpfs or hugetlbfs that was not removed (shmem_error_remove_folio,
hugetlbfs_error_remove_folio).
"""

from __future__ import annotations

from dataclasses import dataclass

from kvmtrace import page_types


@dataclass(frozen=True, slots=True)
class Vmm:
    """What is known of a kind of VMM, with a kind of memory.

    ``replaces``: what makes it put another page in place, with ``{how}`` for the commands; None:
    nothing is known to. ``reading``: why it must not read all of the memory; ``refuses``: migration
    is known not to work. ``huge``: what it needs if a huge page is lost; None: not known.
    """

    replaces: str | None = None
    reading: str = "each of these reads every page, the lost one too"
    refuses: bool = False
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
        refuses=True,
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
