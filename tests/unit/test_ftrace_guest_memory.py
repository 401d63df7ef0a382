"""What the ftrace source can look up: slots that were seen, and who holds a guest_memfd."""

from __future__ import annotations

from pathlib import Path

from kvmtrace.events import Owner
from kvmtrace.sources.ftrace.guest_memory import FtraceMemory
from kvmtrace.sources.ftrace.memslots import Memslots
from kvmtrace.sources.ftrace.vms import VmResolver
from kvmtrace.sources.vm_table import VmTable

PFN, INDEX = 0x104CAA, 7
STRUCT = 0xFFFF800000000000


def process(proc: Path, pid: int, vms: int = 1, guest_memfd: str = "") -> int:
    """A VMM; the inode of the guest_memfd that it holds, 0 if none."""
    fd = proc / str(pid) / "fd"
    fd.mkdir(parents=True)
    for number in range(vms):
        (fd / str(10 + number)).symlink_to("anon_inode:kvm-vm")
    if not guest_memfd:
        return 0
    # stat(2) of a descriptor finds the inode without a path; here the path is one beside it.
    file = proc / "guest_memfd"
    file.touch()
    (fd / guest_memfd).hardlink_to(file)
    (fd / "5").symlink_to(guest_memfd)
    return file.stat().st_ino


def memory(proc: Path, inode: int) -> tuple[FtraceMemory, VmTable, Memslots]:
    vms, guest = VmTable(str(proc)), Memslots()
    vms.scan(1)
    guest.add_poisoned(inode, INDEX, PFN)
    return FtraceMemory(VmResolver(vms, lambda tid: None), guest, str(proc)), vms, guest


def test_the_holder_of_the_inode_owns_the_page(tmp_path: Path) -> None:
    process(tmp_path, 6)
    inode = process(tmp_path, 7, guest_memfd="anon_inode:[kvm-gmem]")
    known, vms, _ = memory(tmp_path, inode)
    answer = known.page(PFN)
    assert answer is not None
    page, events = answer
    assert (page.inode, page.index, events) == (inode, INDEX, [])
    assert page.owners == (Owner(vms.of_pid(7)[0], None),)
    assert known.page(PFN + 1) is None


def test_no_owner_is_named_where_two_are_possible(tmp_path: Path) -> None:
    process(tmp_path, 6, guest_memfd="anon_inode:[kvm-gmem]")
    inode = process(tmp_path, 7, guest_memfd="anon_inode:[kvm-gmem]")
    known, _, _ = memory(tmp_path, inode)
    assert known.page(PFN) is None


def test_no_owner_is_named_where_no_process_has_it_open(tmp_path: Path) -> None:
    process(tmp_path, 7, guest_memfd="anon_inode:[kvm-gmem]")
    known, _, _ = memory(tmp_path, 1)
    assert known.page(PFN) is None


def test_slots_are_those_that_were_seen(tmp_path: Path) -> None:
    process(tmp_path, 7)
    known, vms, guest = memory(tmp_path, 1)
    (vm,) = vms.of_pid(7)
    assert not known.slots(vm)  # which struct kvm it is was not reported yet
    vms.key(STRUCT, 7, 2)
    guest.add({"kvm": STRUCT, "base": 0x100, "npages": 16, "hva": 0x10000})
    guest.add({"kvm": STRUCT, "base": 0x200, "npages": 16, "as_id": 1})
    slots = [(one.gfn, one.pages, one.hva, one.space) for one in known.slots(vm) or ()]
    assert slots == [(0x100, 16, 0x10000, 0), (0x200, 16, 0, 1)]
