"""Which VM is process N? Names, UUIDs and VMMs as /proc tells them.

Everything read here was chosen by someone else (a tenant may name their VM), and it ends up on
terminals: ``clean`` is applied here, once, and nowhere downstream.
"""

from __future__ import annotations

import contextlib
import json
import os
import re
import unicodedata
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import zip_longest

NAME_LIMIT = 128


@dataclass(frozen=True, slots=True)
class Identity:
    """What a VMM process is called; None where nothing tells.

    ``vmid``: the number by which Proxmox VE knows a VM; names need not differ there.
    """

    name: str | None = None
    uuid: str | None = None
    vmm: str | None = None
    vmid: str | None = None


def identify(pid: int, proc: str = "/proc") -> Identity:
    """Name, UUID and VMM of a process; all None once it is gone. Never raises.

    A name that was given to the VM goes first, then one that only this VM can have (the directory
    of its socket, its container), then the process's own, which others may have too.
    """
    argv = _argv(_read(f"{proc}/{pid}/cmdline"))
    comm = _read(f"{proc}/{pid}/comm").rstrip("\n")
    cgroup = _read(f"{proc}/{pid}/cgroup")
    exe = _exe(f"{proc}/{pid}/exe") or (os.path.basename(argv[0]) if argv else "")
    program, kind, arguments = _program(exe, argv)
    options = _options(kind, arguments)
    names = (
        options.name,
        _machine_of_cgroup(cgroup),
        *(_name_of_path(path) for path in _absolute(options.paths, f"{proc}/{pid}")),
        _instance_of_cgroup(cgroup),
        program if _says_nothing(comm) else comm,
    )
    return Identity(
        next(filter(None, (clean(name) for name in names if name)), None),
        clean(options.uuid.lower()) or None if options.uuid else None,
        clean(kind or program or comm) or None,
        options.vmid or _vmid_of_cgroup(cgroup),
    )


def process_name(pid: int, proc: str = "/proc") -> str | None:
    """What a process calls itself (comm); None once it is gone. Waits for no lock of its memory."""
    return clean(_read(f"{proc}/{pid}/comm").rstrip("\n")) or None


def vm_processes(proc: str = "/proc") -> dict[int, int]:
    """{pid: VMs} of processes that hold a VM or a vCPU, as far as descriptors tell.

    A process that holds vCPUs only (the VM's descriptor is closed) counts 0, though it holds a VM
    at least; several if it holds vCPUs of one number. Processes whose descriptors may not be read
    are absent.
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
    """VMs by their descriptors, 0 for vCPUs alone; None without either."""
    vms, vcpus = 0, Counter[str]()
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
                vms += 1
            elif what.startswith("kvm-vcpu"):
                vcpus[what] += 1
    if not vms and not vcpus:
        return None
    # Two vCPUs of one number are of two VMs.
    alike = max(vcpus.values(), default=0)
    return max(vms, alike) if vms or alike > 1 else 0


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


@dataclass(frozen=True, slots=True)
class _Options:
    """What a command line says. ``paths``: files that only this VM can have (its sockets)."""

    name: str | None = None
    uuid: str | None = None
    vmid: str | None = None
    paths: tuple[str, ...] = ()


# VMMs whose command lines are understood here, by program. Builds are told apart by what follows
# the name ("firecracker-v1.7.0-x86_64", "qemu-virtiofs-system-x86_64").
_KINDS = tuple(
    (kind, re.compile(rf"(?:{pattern})(?:[-_.].*)?", re.IGNORECASE | re.DOTALL))
    for kind, pattern in (
        ("qemu", r"(?:.*[-_])?qemu[0-9]*|kvm(?:-spice)?(?![-_])"),
        ("cloud-hypervisor", "cloud-hypervisor"),
        ("firecracker", "firecracker"),
        ("crosvm", "crosvm"),
        ("kvmtool", "lkvm|kvmtool"),
        ("stratovirt", "stratovirt"),
        ("runsc", "runsc"),
        # Kata's runtime in Rust has it inside.
        ("dragonball", "containerd-shim-kata|dragonball|dbs-cli"),
        ("krunvm", "krunvm"),
        ("virtualbox", "vboxheadless|virtualboxvm|vboxsdl"),
        ("vmware", "vmware-vmx"),
        ("acrn", "acrn-dm"),
    )
)


def _program(exe: str, argv: Sequence[str]) -> tuple[str, str | None, Sequence[str]]:
    """The program's name, the VMM that it is (None: another), and its arguments."""
    exe = _plain(exe)
    arguments = argv[1:]
    if re.match(r"ld[-.]", exe):  # run by the dynamic loader, which has options of its own
        at = next((n for n, word in enumerate(arguments) if not word.startswith("-")), None)
        if at is not None:
            exe, arguments = _plain(os.path.basename(arguments[at])), arguments[at + 1 :]
    first = _plain(os.path.basename(argv[0][:4096])) if argv else ""
    return exe, _kind(exe) or _kind(first), arguments


def _plain(basename: str) -> str:
    """Without what executing from memory and NixOS's wrappers add to a program's name."""
    name = basename.removeprefix("memfd:")
    wrapped = re.fullmatch(r"\.(.+)-wrapped", name)
    return wrapped[1] if wrapped else name


def _kind(program: str) -> str | None:
    """The VMM behind a program's name, as far as its command line is understood here."""
    return next((kind for kind, pattern in _KINDS if pattern.fullmatch(program)), None)


def _says_nothing(comm: str) -> bool:
    """A name that whatever is executed by a file descriptor has, or by the loader."""
    return comm in ("", "exe") or comm.isdecimal() or bool(re.match(r"ld[-.]|memfd:", comm))


# The first that is there names the VM. As lower case without dashes in front, "_" as "-".
_NAMES = tuple(
    "name vm-name vmname guest-name machine-name instance-name sandbox-name enclave-name avd "
    "id vm-id vmid instance-id sandbox-id container-id".split()
)
_UUIDS = ("uuid", "vm-uuid")
# Sockets that it listens at and pid files: no other VM can have the same.
_PATHS = tuple(
    "api-socket api-sock api-socket-path api-sock-path control-socket control-sock qmp "
    "qmp-pretty monitor restful-uri pidfile pid-file".split()
)


class _Arguments:
    """A command line as its VMM reads it: words, and options by key."""

    def __init__(self, words: Sequence[str]) -> None:
        # What follows "--" is run in the guest.
        self.words = words[: words.index("--")] if "--" in words else words
        self._values: dict[str, list[str]] = {}
        for word, following in zip_longest(self.words, self.words[1:], fillvalue=""):
            if word.startswith("-"):
                head, equals, tail = word.partition("=")
                value = tail if equals else "" if following.startswith("-") else following
                if value:
                    key = head.lstrip("-").lower().replace("_", "-")
                    self._values.setdefault(key, []).append(value)

    def all(self, key: str) -> list[str]:
        """Values given as ``--key value`` or ``--key=value``, with one dash or two, in order."""
        return self._values.get(key, [])

    def last(self, *keys: str) -> str | None:
        """The last value of the first of these options that is given."""
        return next((self._values[key][-1] for key in keys if key in self._values), None)


def _options(kind: str | None, words: Sequence[str]) -> _Options:
    given = _Arguments(words)
    paths = (_path_in(given.last(key)) for key in _PATHS)
    common = _Options(
        _name_in(given.last(*_NAMES)), given.last(*_UUIDS), paths=tuple(filter(None, paths))
    )
    return _SPECIAL[kind](given, common) if kind in _SPECIAL else common


def _qemu(given: _Arguments, common: _Options) -> _Options:
    # QEMU merges its -name options; SMBIOS has the UUID where there is no -uuid (Proxmox VE).
    guest: dict[str, str] = {}
    for value in given.all("name"):
        guest |= _suboptions(value, implied="guest")
    tables = [_suboptions(value) for value in given.all("smbios")]
    uuids = [table.get("uuid") for table in tables if table.get("type", "").lstrip("0x") == "1"]
    number = given.last("id") or ""
    vmid = number if _VMID.fullmatch(number) else None
    name = guest.get("guest")
    if not given.all("name") and not vmid:
        name = common.name
    uuid = common.uuid or next(filter(None, reversed(uuids)), None)
    return replace(common, name=name, uuid=uuid, vmid=vmid)


def _cloud_hypervisor(given: _Arguments, common: _Options) -> _Options:
    platform = _suboptions(given.last("platform"))
    return replace(common, uuid=platform.get("uuid") or common.uuid)


def _crosvm(given: _Arguments, common: _Options) -> _Options:
    socket = given.last("socket", "s")
    return replace(common, paths=(socket,)) if socket else common


def _last_word(given: _Arguments, common: _Options) -> _Options:
    """runsc: the container's id; acrn-dm: the VM's name."""
    last = given.words[-1] if given.words else "-"
    return common if last.startswith("-") else replace(common, name=last)


def _krunvm(given: _Arguments, common: _Options) -> _Options:
    words = [word for word in given.words if not word.startswith("-")]
    return replace(common, name=words[1]) if words[:1] == ["start"] and words[1:] else common


def _virtualbox(given: _Arguments, common: _Options) -> _Options:
    vm = (given.last("startvm") or "").strip("{}")
    uuid = vm if _UUID.fullmatch(vm) else None
    return replace(common, name=given.last("comment") or (None if uuid else vm), uuid=uuid)


def _vmware(given: _Arguments, common: _Options) -> _Options:
    base = os.path.basename(given.words[-1]) if given.words else ""
    return replace(common, name=base.removesuffix(".vmx")) if base.endswith(".vmx") else common


_VMID = re.compile("[0-9]{1,12}")
_UUID = re.compile("[0-9a-f]{8}(-[0-9a-f]{4}){3}-[0-9a-f]{12}", re.IGNORECASE)
_SPECIAL: dict[str | None, Callable[[_Arguments, _Options], _Options]] = {
    "qemu": _qemu,
    "stratovirt": _qemu,
    "cloud-hypervisor": _cloud_hypervisor,
    "crosvm": _crosvm,
    "runsc": _last_word,
    "acrn": _last_word,
    "krunvm": _krunvm,
    "virtualbox": _virtualbox,
    "vmware": _vmware,
}


def _suboptions(value: str | None, implied: str | None = None) -> dict[str, str]:
    """``a,k=v,x=1,,2`` → {implied: "a", "k": "v", "x": "1,2"}: QEMU's syntax, a comma doubled.

    QEMU takes JSON for some of them too.
    """
    options: dict[str, str] = {}
    if not value:
        return options
    if value.startswith("{"):
        with contextlib.suppress(ValueError, RecursionError):
            table = json.loads(value)
            return {key: str(one) for key, one in table.items() if isinstance(one, str | int)}
    # \0 cannot be in an argument, so it can stand for an escaped comma meanwhile
    for position, part in enumerate(value.replace(",,", "\0").split(",")):
        key, equals, tail = part.replace("\0", ",").partition("=")
        if equals:
            options[key] = tail
        elif position == 0 and implied:
            options[implied] = key
    return options


def _name_in(value: str | None) -> str | None:
    """A name that stands alone, or as a suboption."""
    if not value:
        return None
    named = _suboptions(value)
    return named.get("guest") or named.get("name") or named.get("id") or value


def _path_in(value: str | None) -> str | None:
    """``PATH``, ``path=PATH,…`` or QEMU's ``unix:PATH,server``; None for another kind of socket."""
    path = _suboptions(value, implied="path").get("path")
    if path is None or re.match(r"(?!unix:)[a-z]+:|none$|null$|vc\b|(mon:)?stdio$|pty$", path):
        return None
    return path.removeprefix("unix:").lstrip("@") or None


# -- paths

# What sockets are called whatever VM they are of, and what VMMs are called.
_SOCKET_WORDS = frozenset(
    "api sock socket control ctl ctrl qmp hmp monitor mon vm vmm server main http rest rpc grpc "
    "ipc cmd command console serial vsock uds pid pidfile process "
    "cloud hypervisor cloudhypervisor ch clh chv firecracker fc crosvm qemu kvm kvmtool lkvm "
    "stratovirt dragonball dbs alioth krun libkrun krunvm microvm runsc gvisor virtualbox acrn dm "
    "libvirt kata".split()
)
# What directories are called that hold files of any VM, or the directories of VMs.
_LAYOUT = _SOCKET_WORDS | frozenset(
    "run var tmp temp root lib lib64 libexec bin usr opt srv mnt media home data state cache share "
    "shared local etc dev shm proc internal private public common current default base global "
    "vms vmms microvms virtualmachines machine machines instance instances guest guests domain "
    "domains sandbox sandboxes container containers pod pods task tasks shim shims session "
    "sessions virtual hypervisors jail jails jailer jailed chroot chroots rootfs fs bundle "
    "bundles work workdir workspace sockets socks pids runtime runtimes io containerd crio "
    "docker moby podman oci k8s kubernetes kubelet vc sbs storage disk disks drives volumes image "
    "images log logs conf config configs service services system user users node host hosts "
    "virt virtualization running active live app apps files store pool overlay meta metadata "
    "snap incus lxd lxc openstack nova proxmox cuttlefish assembly runner runners daemon agent "
    "backend channel channels out output exec dir tree ns namespace namespaces".split()
)
_VERSION = re.compile(r"v?[0-9]+")


def _absolute(paths: Iterable[str], process: str) -> Iterator[str]:
    """Paths as the host sees them: a jail's root and a working directory may have the name."""
    for path in paths:
        above = _link(f"{process}/root" if path.startswith("/") else f"{process}/cwd")
        yield os.path.normpath(f"{above.removesuffix(' (deleted)')}/{path}")


def _name_of_path(path: str) -> str | None:
    """What tells a VM's own file from those of other VMs: its name or the nearest directory's.

    None where it is found at a place that is the same for any VM.
    """
    *directories, base = [part for part in path.split("/") if part not in ("", ".", "..")] or [""]
    stem = re.sub(r"\.(sock|socket|pid|qmp|mon)$|-socket$", "", base)
    if stem and not _is_of(stem, _SOCKET_WORDS):
        return stem
    while directories:
        part = directories.pop()
        above = directories[-1] if directories else ""
        if above == "home" or (above == "user" and part.isdecimal()):
            return None  # whose it is, which other VMs may be too
        if not _is_of(part, _LAYOUT):
            return part
    return None


def _is_of(name: str, words: frozenset[str]) -> bool:
    """Made of these words only: "io.containerd.runtime.v2.task", "firecracker-v1.7.0-x86_64"."""
    first, *rest = [word for word in re.split(r"[-_.]", name.lower()) if word] or [""]
    if first not in words and name.lower() not in words:
        return False
    if re.match(r"[-_a-z]+[-_]v?[0-9]+\.[0-9]", name.lower()):
        return True
    return all(word in words or (word[0] == "v" and _VERSION.fullmatch(word)) for word in rest)


# -- cgroups

_SCOPE = re.compile(r"machine-([^/\n]+)\.scope")
_LIBVIRT = re.compile(r"(?:qemu|ch|xen|vz|bhyve)-\d+-(.+)", re.DOTALL)
_POD = re.compile(r"pod([0-9a-f]{8}[-_][0-9a-f]{4}[-_][0-9a-f]{4}[-_][0-9a-f]{4}[-_][0-9a-f]{12})")
_CONTAINER = re.compile(
    r"(docker|libpod|crio|cri-containerd)[-/](?:payload-)?([0-9a-f]{12})[0-9a-f]{52}\b"
)
_UNIT = re.compile(r"/([^/@\n]+)@([^/\n]+)\.service")
_PROXMOX = re.compile(r"/qemu\.slice/([0-9]{1,12})\.scope")


def _machine_of_cgroup(text: str) -> str | None:
    """A machine's name (systemd-machined, libvirt)."""
    scope = _SCOPE.search(text)
    if scope is None:
        return None
    machine = _systemd_unescape(scope[1])
    libvirt = _LIBVIRT.fullmatch(machine)
    return libvirt[1] if libvirt else machine


def _instance_of_cgroup(text: str) -> str | None:
    """The UID of its pod (Kubernetes), its container, or the instance of its systemd unit."""
    if pod := _POD.search(text):
        return f"pod-{pod[1].replace('_', '-')}"
    if container := _CONTAINER.search(text):
        return container[2]
    units = [unit for unit in _UNIT.findall(text) if unit[0] != "user"]
    return _systemd_unescape(units[-1][1]) if units else None


def _vmid_of_cgroup(text: str) -> str | None:
    vmid = _PROXMOX.search(text)
    return vmid[1] if vmid else None


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
    return os.path.basename(_link(path)).removesuffix(" (deleted)")


def _link(path: str) -> str:
    try:
        return os.readlink(path)
    except OSError:
        return ""  # gone, a kernel thread, or not ours to see


def _read(path: str) -> str:
    try:
        with open(path, "rb") as file:
            return file.read(1 << 20).decode("utf-8", "replace")
    except OSError:
        return ""
