"""Which VM is process N? Names, UUIDs and VMMs as /proc tells them.

Everything read here was chosen by someone else (a tenant may name their VM), and it ends up on
terminals: ``clean`` is applied here, once, and nowhere downstream.
"""

from __future__ import annotations

import contextlib
import os
import re
import unicodedata
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

NAME_LIMIT = 128


@dataclass(frozen=True, slots=True)
class Identity:
    """What a VMM process is called; None where nothing tells."""

    name: str | None = None
    uuid: str | None = None
    vmm: str | None = None


def identify(pid: int, proc: str = "/proc") -> Identity:
    """Name, UUID and VMM of a process; all None once it is gone. Never raises."""
    argv = _argv(_read(f"{proc}/{pid}/cmdline"))
    comm = _read(f"{proc}/{pid}/comm").rstrip("\n")
    exe = _exe(f"{proc}/{pid}/exe") or (os.path.basename(argv[0]) if argv else "")
    kind = _kind(exe) or (_kind(os.path.basename(argv[0])) if argv else None)
    name, uuid = _PARSERS[kind](argv[1:]) if kind in _PARSERS else (None, None)
    if not name:
        name = _name_of_cgroup(_read(f"{proc}/{pid}/cgroup"))
    return Identity(
        clean(name or "") or clean(comm) or None,
        clean(uuid.lower()) or None if uuid else None,
        clean(kind or exe or comm) or None,
    )


def vm_processes(proc: str = "/proc") -> dict[int, int]:
    """{pid: VM file descriptors} of processes that hold a VM or a vCPU.

    A process that holds vCPUs only (the VM's descriptor is closed) counts 0. Processes whose
    descriptors may not be read are absent.
    """
    try:
        pids = [int(entry) for entry in os.listdir(proc) if entry.isdecimal()]
    except OSError:
        return {}
    counts = {pid: _vm_descriptors(f"{proc}/{pid}/fd/") for pid in pids}
    return {pid: count for pid, count in counts.items() if count is not None}


def holds_vm(pid: int, proc: str = "/proc") -> bool:
    """Whether a process holds a VM or a vCPU now; False once it is gone."""
    return _vm_descriptors(f"{proc}/{pid}/fd/") is not None


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


def _vm_descriptors(directory: str) -> int | None:
    count = None
    try:
        descriptors = os.listdir(directory)
    except OSError:
        return None  # gone, or not ours to see
    for descriptor in descriptors:
        try:
            target = os.readlink(directory + descriptor)
        except OSError:
            continue
        # "anon_inode:kvm-vm", and with brackets from kernels that gave it an inode of its own
        if target.startswith("anon_inode:"):
            what = target[11:].strip("[]")
            if what == "kvm-vm":
                count = (count or 0) + 1
            elif what.startswith("kvm-vcpu"):
                count = count or 0
    return count


# -- cleaning

# Invisible or blank although Unicode files them under letters and marks (Default_Ignorable).
_INVISIBLE = frozenset(
    chr(c)
    for first, last in (
        (0x034F, 0x034F),
        (0x115F, 0x1160),
        (0x17B4, 0x17B5),
        (0x180B, 0x180F),
        (0x3164, 0x3164),
        (0xFE00, 0xFE0F),
        (0xFFA0, 0xFFA0),
        (0xE0100, 0xE01EF),
    )
    for c in range(first, last + 1)
)
# Marks stacked on one letter: no language needs more, and a pile of them covers other lines.
MAX_MARKS = 4
# Controls, line breaks, surrogates, private use and unassigned: a terminal may do anything.
_VISIBLY_REPLACED = {"Cc", "Zl", "Zp", "Cs", "Co", "Cn"}


def clean(text: str, limit: int = NAME_LIMIT) -> str:
    """``text`` fit for a terminal: at most ``limit`` characters, none that moves or hides others.

    Control characters become ``?``, format characters (bidi, zero-width) vanish, blanks of all
    kinds become single spaces.
    """
    # A hostile command line has megabytes: bound the work too.
    kept = "".join(_clean_characters(text[: 8 * limit]))
    kept = " ".join(kept.split())
    return kept if len(kept) <= limit else kept[: limit - 1].rstrip() + "…"


def _clean_characters(text: str) -> Iterator[str]:
    marks = MAX_MARKS  # none to begin with: it would sit on whatever stands before the name
    for character in text:
        if " " <= character <= "~":
            marks = MAX_MARKS if character == " " else 0
            yield character
            continue
        category = unicodedata.category(character)
        if category in ("Mn", "Me"):
            marks += 1
            if marks > MAX_MARKS:
                continue
        elif category != "Cf":
            marks = 0
        if category == "Cf" or character in _INVISIBLE:
            continue
        if category in _VISIBLY_REPLACED:
            yield "?"
        elif category == "Zs":
            marks = MAX_MARKS
            yield " "
        else:
            yield character


# -- command lines


def _kind(basename: str) -> str | None:
    """The VMM behind a program's name, as far as its command line is understood here."""
    if basename.startswith(("qemu-system-", "qemu-kvm")) or basename == "kvm":
        return "qemu"
    for vmm in ("cloud-hypervisor", "firecracker", "crosvm"):
        # "firecracker-v1.7.0-x86_64" is how its releases name the binary
        if basename == vmm or basename.startswith((f"{vmm}-", f"{vmm}_")):
            return vmm
    return None


def _qemu(arguments: Sequence[str]) -> tuple[str | None, str | None]:
    name = _suboptions(_option(arguments, "-name", "--name"), implied="guest").get("guest")
    return name, _option(arguments, "-uuid", "--uuid")


def _cloud_hypervisor(arguments: Sequence[str]) -> tuple[str | None, str | None]:
    platform = _suboptions(_option(arguments, "--platform"))
    socket = _suboptions(_option(arguments, "--api-socket"), implied="path")
    return _name_of_socket(socket.get("path")), platform.get("uuid")


def _firecracker(arguments: Sequence[str]) -> tuple[str | None, str | None]:
    return _option(arguments, "--id") or _name_of_socket(_option(arguments, "--api-sock")), None


def _crosvm(arguments: Sequence[str]) -> tuple[str | None, str | None]:
    name = _option(arguments, "--name")
    return name or _name_of_socket(_option(arguments, "--socket", "-s")), None


_PARSERS = {
    "qemu": _qemu,
    "cloud-hypervisor": _cloud_hypervisor,
    "firecracker": _firecracker,
    "crosvm": _crosvm,
}


def _option(arguments: Sequence[str], *names: str) -> str | None:
    """The last value of an option given as ``--name value`` or ``--name=value``."""
    value = None
    for position, argument in enumerate(arguments):
        if argument in names:
            value = arguments[position + 1] if position + 1 < len(arguments) else value
        else:
            head, equals, tail = argument.partition("=")
            if equals and head in names:
                value = tail
    return value


def _suboptions(value: str | None, implied: str | None = None) -> dict[str, str]:
    """``a,k=v,x=1,,2`` → {implied: "a", "k": "v", "x": "1,2"}: QEMU's syntax, a comma doubled."""
    options: dict[str, str] = {}
    if not value:
        return options
    # \0 cannot be in an argument, so it can stand for an escaped comma meanwhile
    for position, part in enumerate(value.replace(",,", "\0").split(",")):
        key, equals, tail = part.replace("\0", ",").partition("=")
        if equals:
            options[key] = tail
        elif position == 0 and implied:
            options[implied] = key
    return options


# Sockets are named after the VM, or stand in a directory that is.
_GENERIC_SOCKETS = re.compile(
    r"^(api|ch|clh|cloud-hypervisor|firecracker|crosvm|vm|sock|socket|control)?[-_.]?"
    r"(api|sock|socket|control)?$"
)


def _name_of_socket(path: str | None) -> str | None:
    if not path:
        return None
    directory, base = os.path.split(path)
    stem = re.sub(r"\.(sock|socket)$", "", base)
    if not _GENERIC_SOCKETS.match(stem):
        return stem
    parent = os.path.basename(directory)
    return None if parent in ("", "run", "tmp", "var", "root") else parent


# -- cgroups

_SCOPE = re.compile(r"machine-([^/]+)\.scope")
_LIBVIRT = re.compile(r"(?:qemu|ch|xen|vz|bhyve)-\d+-(.+)", re.DOTALL)
_POD = re.compile(r"pod([0-9a-f]{8}[-_][0-9a-f]{4}[-_][0-9a-f]{4}[-_][0-9a-f]{4}[-_][0-9a-f]{12})")


def _name_of_cgroup(text: str) -> str | None:
    """A machine's name (systemd-machined, libvirt), or its pod's UID (Kubernetes)."""
    scope = _SCOPE.search(text)
    if scope:
        machine = _systemd_unescape(scope[1])
        libvirt = _LIBVIRT.fullmatch(machine)
        return libvirt[1] if libvirt else machine
    pod = _POD.search(text)
    return f"pod-{pod[1].replace('_', '-')}" if pod else None


def _systemd_unescape(name: str) -> str:
    raw = re.sub(
        rb"\\x([0-9a-fA-F]{2})", lambda match: bytes([int(match[1], 16)]), name.encode("utf-8")
    )
    return raw.decode("utf-8", "replace")


# -- files


def _argv(cmdline: str) -> list[str]:
    argv = cmdline.rstrip("\0").split("\0") if cmdline else []
    if len(argv) == 1 and " " in argv[0]:
        # A process title: the whole command line written over itself, blanks between.
        return argv[0].split()
    return argv


def _exe(path: str) -> str:
    try:
        return os.path.basename(os.readlink(path)).removesuffix(" (deleted)")
    except OSError:
        return ""  # a kernel thread, or not ours to see


def _read(path: str) -> str:
    try:
        with open(path, "rb") as file:
            return file.read(1 << 20).decode("utf-8", "replace")
    except OSError:
        return ""
