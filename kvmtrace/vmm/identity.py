"""Identify the VM of a process: name, UUID and VMM, from /proc.

A VMM (virtual machine monitor) is the process that runs a VM: QEMU, for instance. Tenants may
choose the names that are read here, and terminals show them: ``clean`` is applied here, once, and
nowhere downstream.
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

from kvmtrace.linux import task_stat
from kvmtrace.linux.read import read_text
from kvmtrace.sanitize import clean
from kvmtrace.vmm.command_line import is_uninformative, options, program
from kvmtrace.vmm.paths import (
    instance_of_cgroup,
    machine_of_cgroup,
    name_of_disk,
    name_of_path,
    unit_of_cgroup,
    vmid_of_cgroup,
)

MAX_COMMAND_LINE = 1 << 20


@dataclass(frozen=True, slots=True)
class Identity:
    """Names of a VMM process; None for those that it does not have.

    ``vmid``: Proxmox VE's number of the VM, where names need not differ. ``unit``: the systemd
    unit that is this VM alone. ``api_socket``: the path of the VMM's API on the host.
    """

    name: str | None = None
    uuid: str | None = None
    vmm: str | None = None
    vmid: str | None = None
    unit: str | None = None
    api_socket: str | None = None


def identify(pid: int, proc: str = "/proc", *, command_line: bool = True) -> Identity:
    """Return name, UUID and VMM of a process; all None once it is gone. Never raises.

    The name is the first that exists: the one given to the VM; one that only this VM can have (of
    its socket's directory, its container); its disk's; the process's, which others may have too.

    ``command_line``: read it. Only this read may hang (``proc_reader``).
    """
    argv = _argv(read_text(f"{proc}/{pid}/cmdline", MAX_COMMAND_LINE)) if command_line else []
    comm = read_text(f"{proc}/{pid}/comm").rstrip("\n")
    cgroup = read_text(f"{proc}/{pid}/cgroup")
    exe = _exe(f"{proc}/{pid}/exe") or (os.path.basename(argv[0]) if argv else "")
    name, kind, arguments = program(exe, argv)
    given = options(kind, arguments)
    names = (
        given.name,
        machine_of_cgroup(cgroup),
        *(name_of_path(path) for path in _absolute(given.paths, f"{proc}/{pid}")),
        instance_of_cgroup(cgroup),
        *(name_of_disk(path) for path in _absolute(given.disks, f"{proc}/{pid}")),
        name if is_uninformative(comm) else None,
        comm,
    )
    return Identity(
        next(filter(None, (clean(one) for one in names if one)), None),
        clean(given.uuid.lower()) or None if given.uuid else None,
        clean(kind or name or comm) or None,
        given.vmid or vmid_of_cgroup(cgroup),
        _unchanged(unit_of_cgroup(cgroup)),
        next(map(_unchanged, _absolute(given.api_sockets, f"{proc}/{pid}")), None),
    )


def _unchanged(name: str | None) -> str | None:
    """Return a name for commands: None for one that cannot be shown as it is."""
    return name if name and clean(name) == name else None


def process_name(pid: int, proc: str = "/proc") -> str | None:
    """Return a process's name (comm); None once it is gone. Takes no lock of its memory."""
    return clean(read_text(f"{proc}/{pid}/comm").rstrip("\n")) or None


def begun(pid: int, proc: str = "/proc") -> str | None:
    """Return when a process began (clock ticks since boot); a later one of the same pid differs."""
    # The first thread's: for the whole process the kernel would add up the times of all threads.
    return task_stat.start_of(read_text(f"{proc}/{pid}/task/{pid}/stat", 4096))


def vm_processes(proc: str = "/proc") -> dict[int, int]:
    """Return {pid: VMs} of processes that hold a VM or a vCPU, by ``count_vms``.

    Processes whose descriptors cannot be read are absent.
    """
    counts = {pid: count_vms(pid, proc) for pid in pids(proc)}
    return {pid: count for pid, count in counts.items() if count is not None}


def pids(proc: str = "/proc") -> list[int]:
    try:
        return sorted(int(entry) for entry in os.listdir(proc) if entry.isdecimal())
    except OSError:
        return []


def vm_descriptor(pid: int, proc: str = "/proc", limit: int | None = None) -> str | None:
    """Return the first descriptor by which a process holds a VM or a vCPU; None without any.

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
        pass  # gone, or not permitted
    return None


def is_vm_descriptor(pid: int, descriptor: str, proc: str = "/proc") -> bool:
    """Whether a descriptor is a VM's or a vCPU's.

    Takes no lock that the process can hold for long.
    """
    kind = _kvm_object(f"{proc}/{pid}/fd/{descriptor}") or ""
    return kind.startswith(("kvm-vm", "kvm-vcpu"))


# Each file has its own inode (6.18), later in a file system of its own (7.2).
_GUEST_MEMFD = ("anon_inode:[kvm-gmem]", "/[kvm-gmem] (deleted)")


def guest_memfds(pid: int, proc: str = "/proc") -> dict[int, int]:
    """Return {inode: device} of a process's guest_memfds; {} once it is gone."""
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
    """Return how many VMs a process has descriptors of; None if it has none of VMs or vCPUs.

    Several descriptors may be of one VM: crosvm duplicates it for each interrupt controller. A
    process with descriptors of vCPUs alone (the VM's is closed) counts 0, though it has a VM; or
    several, if it has several vCPUs of the same number.
    """
    vms: list[int] = []
    vcpus: defaultdict[str, list[int]] = defaultdict(list)  # by number
    directory = f"{proc}/{pid}/fd"
    try:
        descriptors = os.listdir(directory)
    except OSError:
        return None  # gone, or not permitted
    for descriptor in descriptors:
        kind = _kvm_object(f"{directory}/{descriptor}")
        if kind == "kvm-vm":
            vms.append(int(descriptor))
        elif kind is not None and kind.startswith("kvm-vcpu"):
            vcpus[kind].append(int(descriptor))
    if not vms and not vcpus:
        return None
    # Two vCPUs of the same number belong to two VMs.
    alike = max((_files(pid, of, proc) or len(of) for of in vcpus.values()), default=0)
    if not vms:
        return alike if alike > 1 else 0
    # Descriptors that cannot be compared may all be of one VM, whose vCPUs differ in number.
    known = _files(pid, vms, proc)
    return max(known or 1, alike) if known or vcpus else min(len(vms), _COMPARED)


# The number of kcmp in <asm/unistd.h>; KCMP_FILE of include/uapi/linux/kcmp.h.
_KCMP = {"x86_64": 312, "aarch64": 272}.get(os.uname().machine)
_KCMP_FILE = 0
_COMPARED = 4096  # of one process, which may hold any number


def _files(pid: int, descriptors: list[int], proc: str) -> int | None:
    """Return how many open files these descriptors are of; None if they cannot be compared.

    ``kcmp`` takes a pid of our namespace, so nothing is compared for another ``proc``.
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
    order = _libc().syscall(ctypes.c_long(_KCMP or -1), *arguments)
    if order < 0:
        number = ctypes.get_errno()
        raise OSError(number, os.strerror(number))
    return (0, -1, 1, 1)[order]


@functools.cache
def _libc() -> ctypes.CDLL:
    return ctypes.CDLL(None, use_errno=True)


def _kvm_object(link: str) -> str | None:
    """Return the kind of an anonymous inode, "kvm-vm" for instance; None for any other file."""
    try:
        target = os.readlink(link)
    except OSError:
        return None
    # "anon_inode:kvm-vm", with brackets in kernels in which it has its own inode
    return target[11:].strip("[]") if target.startswith("anon_inode:") else None


# -- files


def _absolute(paths: Iterable[str], process: str) -> Iterator[str]:
    """Yield paths as on the host: a jail's root or the working directory may have the VM's name."""
    for path in paths:
        above = _link(f"{process}/root" if path.startswith("/") else f"{process}/cwd")
        yield os.path.normpath(f"{above.removesuffix(' (deleted)')}/{path}")


def _argv(cmdline: str) -> list[str]:
    argv = cmdline.rstrip("\0").split("\0") if cmdline else []
    if len(argv) == 1 and " " in argv[0]:
        # A process title, which overwrites the command line, separated by blanks.
        return argv[0].split()
    return argv


def _exe(path: str) -> str:
    return os.path.basename(_link(path)).removesuffix(" (deleted)")


def _link(path: str) -> str:
    try:
        return os.readlink(path)
    except OSError:
        return ""  # gone, a kernel thread, or not permitted
