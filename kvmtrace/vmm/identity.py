"""Which VM is process N? Names, UUIDs and VMMs from /proc.

Everything read here was chosen by someone else (a tenant may name their VM), and it ends up on
terminals: ``clean`` is applied here, once, and nowhere downstream.
"""

from __future__ import annotations

import contextlib
import ctypes
import functools
import itertools
import os
from collections import defaultdict
from collections.abc import Iterable, Iterator
from dataclasses import dataclass

from kvmtrace.linux.read import read_text
from kvmtrace.sanitize import clean
from kvmtrace.vmm.command_line import options, program, says_nothing
from kvmtrace.vmm.paths import (
    instance_of_cgroup,
    machine_of_cgroup,
    name_of_disk,
    name_of_path,
    vmid_of_cgroup,
)

MAX_COMMAND_LINE = 1 << 20


@dataclass(frozen=True, slots=True)
class Identity:
    """What a VMM process is called; None where nothing names it.

    ``vmid``: the number by which Proxmox VE knows a VM; names need not differ there.
    """

    name: str | None = None
    uuid: str | None = None
    vmm: str | None = None
    vmid: str | None = None


def identify(pid: int, proc: str = "/proc", *, command_line: bool = True) -> Identity:
    """Name, UUID and VMM of a process; all None once it is gone. Never raises.

    A name that was given to the VM goes first, then one that only this VM can have (the directory
    of its socket, its container), then its disk's, then the process's own, which others may have
    too.

    ``command_line``: read it, which may hang (``proc_reader``); nothing else here does.
    """
    argv = _argv(read_text(f"{proc}/{pid}/cmdline", MAX_COMMAND_LINE)) if command_line else []
    comm = read_text(f"{proc}/{pid}/comm").rstrip("\n")
    cgroup = read_text(f"{proc}/{pid}/cgroup")
    exe = _exe(f"{proc}/{pid}/exe") or (os.path.basename(argv[0]) if argv else "")
    name, kind, arguments = program(exe, argv)
    said = options(kind, arguments)
    names = (
        said.name,
        machine_of_cgroup(cgroup),
        *(name_of_path(path) for path in _absolute(said.paths, f"{proc}/{pid}")),
        instance_of_cgroup(cgroup),
        *(name_of_disk(path) for path in _absolute(said.disks, f"{proc}/{pid}")),
        name if says_nothing(comm) else None,
        comm,
    )
    return Identity(
        next(filter(None, (clean(one) for one in names if one)), None),
        clean(said.uuid.lower()) or None if said.uuid else None,
        clean(kind or name or comm) or None,
        said.vmid or vmid_of_cgroup(cgroup),
    )


def process_name(pid: int, proc: str = "/proc") -> str | None:
    """What a process calls itself (comm); None once it is gone. Waits for no lock of its memory."""
    return clean(read_text(f"{proc}/{pid}/comm").rstrip("\n")) or None


def begun(pid: int, proc: str = "/proc") -> str | None:
    """When a process began (clock ticks since boot): another of the same pid began later."""
    # Of the first thread: for a whole process the kernel adds up the times of all of them.
    fields = read_text(f"{proc}/{pid}/task/{pid}/stat", 4096).rpartition(")")[2].split()
    return fields[19] if len(fields) > 19 else None


def vm_processes(proc: str = "/proc") -> dict[int, int]:
    """{pid: VMs} of processes that hold a VM or a vCPU, as far as descriptors show.

    A process that holds vCPUs only (the VM's descriptor is closed) counts 0, though it holds a VM
    at least; several if it holds vCPUs of one number. Processes whose descriptors may not be read
    are absent.
    """
    counts = {pid: count_vms(pid, proc) for pid in pids(proc)}
    return {pid: count for pid, count in counts.items() if count is not None}


def pids(proc: str = "/proc") -> list[int]:
    """The processes there are."""
    try:
        return sorted(int(entry) for entry in os.listdir(proc) if entry.isdecimal())
    except OSError:
        return []


def holds_vm(pid: int, proc: str = "/proc") -> bool:
    """Whether a process holds a VM or a vCPU now; False once it is gone."""
    return vm_descriptor(pid, proc) is not None


def vm_descriptor(pid: int, proc: str = "/proc", limit: int | None = None) -> str | None:
    """The first descriptor by which a process holds a VM or a vCPU; None without any.

    Raises ValueError if there is none among the first ``limit`` descriptors, and there are more.
    """
    try:
        with os.scandir(f"{proc}/{pid}/fd") as descriptors:
            for number, entry in enumerate(descriptors):
                if number == limit:
                    raise ValueError(f"more than {limit} descriptors")
                if is_vm_descriptor(pid, entry.name, proc):
                    return entry.name
    except OSError:
        pass  # gone, or not ours to see
    return None


def is_vm_descriptor(pid: int, descriptor: str, proc: str = "/proc") -> bool:
    """Whether that is one. It takes no lock that its process can hold for long."""
    what = _kvm_object(f"{proc}/{pid}/fd/{descriptor}") or ""
    return what.startswith(("kvm-vm", "kvm-vcpu"))


# As files of one inode each (6.18), and in a file system of their own (7.2).
_GUEST_MEMFD = ("anon_inode:[kvm-gmem]", "/[kvm-gmem] (deleted)")


def guest_memfds(pid: int, proc: str = "/proc") -> dict[int, int]:
    """{inode: device} of the guest_memfds that a process holds; {} once it is gone."""
    found = {}
    directory = f"{proc}/{pid}/fd"
    try:
        descriptors = [entry for entry in os.listdir(directory) if entry.isdecimal()]
    except OSError:
        return {}
    for descriptor in descriptors:
        with contextlib.suppress(OSError):
            path = f"{directory}/{descriptor}"
            if os.readlink(path) in _GUEST_MEMFD:
                stat = os.stat(path)
                found[stat.st_ino] = stat.st_dev
    return found


def count_vms(pid: int, proc: str = "/proc") -> int | None:
    """VMs that a process has descriptors of, 0 for vCPUs alone; None without either.

    Several descriptors may be of one VM: crosvm duplicates it for each interrupt controller.
    """
    vms: list[int] = []
    vcpus: defaultdict[str, list[int]] = defaultdict(list)  # by number
    directory = f"{proc}/{pid}/fd"
    try:
        descriptors = os.listdir(directory)
    except OSError:
        return None  # gone, or not ours to see
    for descriptor in descriptors:
        what = _kvm_object(f"{directory}/{descriptor}")
        if what == "kvm-vm":
            vms.append(int(descriptor))
        elif what is not None and what.startswith("kvm-vcpu"):
            vcpus[what].append(int(descriptor))
    if not vms and not vcpus:
        return None
    # Two vCPUs of one number are of two VMs.
    alike = max((_files(pid, of, proc) or len(of) for of in vcpus.values()), default=0)
    if not vms:
        return alike if alike > 1 else 0
    # Descriptors that are not compared may all be of one VM; its vCPUs have a number each.
    known = _files(pid, vms, proc)
    return max(known or 1, alike) if known or vcpus else min(len(vms), _COMPARED)


# Where <asm/unistd.h> has kcmp; KCMP_FILE of include/uapi/linux/kcmp.h.
_KCMP = {"x86_64": 312, "aarch64": 272}.get(os.uname().machine)
_KCMP_FILE = 0
_COMPARED = 4096  # of one process, which may hold as many as it likes


def _files(pid: int, descriptors: list[int], proc: str) -> int | None:
    """How many open files these descriptors are of; None where the kernel does not tell.

    ``kcmp`` takes a pid of our own namespace: another ``proc`` may mean another process by it.
    """
    if len(descriptors) < 2:
        return len(descriptors)
    try:
        if _KCMP is None or os.readlink(f"{proc}/self") != str(os.getpid()):
            return None
        compare = functools.partial(_compare, pid)
        ordered = sorted(descriptors[:_COMPARED], key=functools.cmp_to_key(compare))
        return 1 + sum(compare(*pair) != 0 for pair in itertools.pairwise(ordered))
    except OSError:
        return None


def _compare(pid: int, one: int, other: int) -> int:
    """kcmp(2): 0 for one open file, else its order: -1 or 1. Raises OSError, EPERM for instance."""
    arguments = map(ctypes.c_ulong, (pid, pid, _KCMP_FILE, one, other))
    answer = _libc().syscall(ctypes.c_long(_KCMP or -1), *arguments)
    if answer < 0:
        number = ctypes.get_errno()
        raise OSError(number, os.strerror(number))
    return (0, -1, 1, 1)[answer]


@functools.cache
def _libc() -> ctypes.CDLL:
    return ctypes.CDLL(None, use_errno=True)


def _kvm_object(link: str) -> str | None:
    """What an anonymous inode is, "kvm-vm" for instance; None for any other file."""
    try:
        target = os.readlink(link)
    except OSError:
        return None
    # "anon_inode:kvm-vm", and with brackets from kernels that gave it an inode of its own
    return target[11:].strip("[]") if target.startswith("anon_inode:") else None


# -- files


def _absolute(paths: Iterable[str], process: str) -> Iterator[str]:
    """Paths as the host sees them: a jail's root and a working directory may have the name."""
    for path in paths:
        above = _link(f"{process}/root" if path.startswith("/") else f"{process}/cwd")
        yield os.path.normpath(f"{above.removesuffix(' (deleted)')}/{path}")


def _argv(cmdline: str) -> list[str]:
    argv = cmdline.rstrip("\0").split("\0") if cmdline else []
    if len(argv) == 1 and " " in argv[0]:
        # A process title: the whole command line written over itself, blanks between.
        return argv[0].split()
    return argv


def _exe(path: str) -> str:
    return os.path.basename(_link(path)).removesuffix(" (deleted)")


def _link(path: str) -> str:
    try:
        return os.readlink(path)
    except OSError:
        return ""  # gone, a kernel thread, or not ours to see
