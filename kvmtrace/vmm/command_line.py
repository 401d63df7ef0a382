"""Command lines of VMMs: which VMM a process is, and the name that they give its VM.

Pure functions. Results are not cleaned yet (``sanitize.clean``).
"""

from __future__ import annotations

import contextlib
import json
import os
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from itertools import zip_longest


@dataclass(frozen=True, slots=True)
class Options:
    """The options of a command line that identify its VM.

    ``paths``: files that only this VM can have (its sockets). ``disks``: disks that it writes to,
    and its configuration file, in their order. ``api_sockets``: at most one path.
    """

    name: str | None = None
    uuid: str | None = None
    vmid: str | None = None
    paths: tuple[str, ...] = ()
    disks: tuple[str, ...] = ()
    api_sockets: tuple[str, ...] = ()


# VMMs whose command lines are parsed here, by program. Builds append to the name
# ("firecracker-v1.7.0-x86_64", "qemu-virtiofs-system-x86_64").
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
        # Kata's runtime in Rust contains it.
        ("dragonball", "containerd-shim-kata|dragonball|dbs-cli"),
        ("krunvm", "krunvm"),
        ("virtualbox", "vboxheadless|virtualboxvm|vboxsdl"),
        ("vmware", "vmware-vmx"),
        ("acrn", "acrn-dm"),
    )
)


VMMS = frozenset(kind for kind, _ in _KINDS)
"""The names of VMMs in kvmtrace's output."""


def program(exe: str, argv: Sequence[str]) -> tuple[str, str | None, Sequence[str]]:
    """Return the program's name, its VMM (None: not one of ``VMMS``), and its arguments."""
    exe = _plain(exe)
    arguments = argv[1:]
    if re.match(r"ld[-.]", exe):  # run by the dynamic loader, which has its own options
        at = next((n for n, word in enumerate(arguments) if not word.startswith("-")), None)
        if at is not None:
            exe, arguments = _plain(os.path.basename(arguments[at])), arguments[at + 1 :]
    first = _plain(os.path.basename(argv[0][:4096])) if argv else ""
    return exe, _kind(exe) or _kind(first), arguments


def _plain(basename: str) -> str:
    """Strip what execution from memory and NixOS's wrappers add to a program's name."""
    name = basename.removeprefix("memfd:")
    wrapped = re.fullmatch(r"\.(.+)-wrapped", name)
    return wrapped[1] if wrapped else name


def _kind(program: str) -> str | None:
    """Return the VMM of a program's name, one of ``VMMS``."""
    return next((kind for kind, pattern in _KINDS if pattern.fullmatch(program)), None)


def is_uninformative(comm: str) -> bool:
    """Whether a process name only shows execution by a file descriptor, or by the loader."""
    return comm in ("", "exe") or comm.isdecimal() or bool(re.match(r"ld[-.]|memfd:", comm))


_DEFAULT_ID = "anonymous-instance"  # Firecracker's default

# The first that is given names the VM. In lower case, without leading dashes, "_" as "-".
_NAMES = tuple(
    "name vm-name vmname guest-name machine-name instance-name sandbox-name enclave-name avd "
    "id vm-id vmid instance-id sandbox-id container-id".split()
)
_UUIDS = ("uuid", "vm-uuid")
# Sockets and pid files, which no other VM can share.
_PATHS = tuple(
    "api-socket api-sock api-socket-path api-sock-path control-socket control-sock qmp "
    "qmp-pretty monitor restful-uri pidfile pid-file".split()
)


# Of VMMs for which judgement.commands has commands.
_APIS = {"cloud-hypervisor": "api-socket", "firecracker": "api-sock"}

_DISKS = tuple("drive hda blockdev disk block rwdisk rwroot root-disk".split())
_DISKS_OF: dict[str | None, tuple[str, ...]] = {
    "crosvm": ("b",),
    "firecracker": ("config-file",),
    "kvmtool": ("d",),
}
_YES = ("on", "true", "yes", "1")
_IF_NOT_WRITTEN = ("readonly", "read-only", "ro", "snapshot")


class _Arguments:
    """A parsed command line: its words, and option values by key."""

    def __init__(self, words: Sequence[str]) -> None:
        # Words after "--" are run in the guest.
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
        """Return all values of ``--key value`` or ``--key=value``, with one or two dashes."""
        return self._values.get(key, [])

    def last(self, *keys: str) -> str | None:
        """Return the last value of the first of these options that is given."""
        return next((self._values[key][-1] for key in keys if key in self._values), None)


def options(kind: str | None, words: Sequence[str]) -> Options:
    """Parse the arguments of a VMM, one of ``VMMS`` or None."""
    given = _Arguments(words)
    paths = (_path_in(given.last(key)) for key in _PATHS)
    keys = (*_DISKS, *_DISKS_OF.get(kind, ()))
    disks = (_disk_in(key, value) for key in keys for value in given.all(key))
    api = _path_in(given.last(_APIS[kind])) if kind in _APIS else None
    common = Options(
        _name_in(given.last(*_NAMES)),
        given.last(*_UUIDS),
        paths=tuple(filter(None, paths)),
        disks=tuple(filter(None, disks)),
        api_sockets=(api,) if api else (),
    )
    return _SPECIAL[kind](given, common) if kind in _SPECIAL else common


def _qemu(given: _Arguments, common: Options) -> Options:
    # QEMU merges its -name options. Without -uuid, SMBIOS may have the UUID (Proxmox VE).
    guest: dict[str, str] = {}
    for value in given.all("name"):
        guest |= _suboptions(value, implied="guest")
    tables = [_suboptions(value) for value in given.all("smbios")]
    uuids = [table.get("uuid") for table in tables if table.get("type", "").lstrip("0x") == "1"]
    number = given.last("id") or ""
    vmid = number if _VMID.fullmatch(number) else None
    name = guest.get("guest")
    if not given.all("name") and not vmid:
        name = common.name or _android_device(given.words)
    uuid = common.uuid or next(filter(None, reversed(uuids)), None)
    return replace(common, name=name, uuid=uuid, vmid=vmid)


def _android_device(words: Sequence[str]) -> str | None:
    """Return NAME of ``@NAME``, the Android emulator's form of ``-avd NAME``."""
    return next((word[1:] for word in words if re.fullmatch(r"@[\w.-]+", word)), None)


def _cloud_hypervisor(given: _Arguments, common: Options) -> Options:
    platform = _suboptions(given.last("platform"))
    return replace(common, uuid=platform.get("uuid") or common.uuid)


def _crosvm(given: _Arguments, common: Options) -> Options:
    socket = given.last("socket", "s")
    smbios = _suboptions(given.last("smbios"))
    uuid = common.uuid or smbios.get("uuid")
    return replace(common, uuid=uuid, paths=(socket,) if socket else common.paths)


def _last_word(given: _Arguments, common: Options) -> Options:
    """Take the last word: for runsc the container's id, for acrn-dm the VM's name."""
    last = given.words[-1] if given.words else "-"
    return common if last.startswith("-") else replace(common, name=last)


def _krunvm(given: _Arguments, common: Options) -> Options:
    words = [word for word in given.words if not word.startswith("-")]
    return replace(common, name=words[1]) if words[:1] == ["start"] and words[1:] else common


def _virtualbox(given: _Arguments, common: Options) -> Options:
    vm = (given.last("startvm") or "").strip("{}")
    uuid = vm if _UUID.fullmatch(vm) else None
    return replace(common, name=given.last("comment") or (None if uuid else vm), uuid=uuid)


def _vmware(given: _Arguments, common: Options) -> Options:
    base = os.path.basename(given.words[-1]) if given.words else ""
    return replace(common, name=base.removesuffix(".vmx")) if base.endswith(".vmx") else common


_VMID = re.compile("[0-9]{1,12}")
_UUID = re.compile("[0-9a-f]{8}(-[0-9a-f]{4}){3}-[0-9a-f]{12}", re.IGNORECASE)
_SPECIAL: dict[str | None, Callable[[_Arguments, Options], Options]] = {
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
    """Parse QEMU's ``a,k=v,x=1,,2`` to {implied: "a", "k": "v", "x": "1,2"}; or JSON."""
    options: dict[str, str] = {}
    if not value:
        return options
    if value.startswith("{"):
        with contextlib.suppress(ValueError, RecursionError):
            table = json.loads(value)
            inner = table.get("file")
            if isinstance(inner, dict):
                table |= {f"file.{key}": one for key, one in inner.items()}
            return {key: str(one) for key, one in table.items() if isinstance(one, str | int)}
    # An argument cannot contain \0, which stands for an escaped comma here.
    for position, part in enumerate(value.replace(",,", "\0").split(",")):
        key, equals, tail = part.replace("\0", ",").partition("=")
        if equals:
            options[key] = tail
        elif position == 0 and implied:
            options[implied] = key
    return options


def _disk_in(option: str, value: str) -> str | None:
    """Parse ``PATH,…``, ``path=PATH``, QEMU's ``file=PATH`` or JSON; None for a read-only disk."""
    words = value.split(",")
    given = _suboptions(value, implied="path")
    if any(given.get(key, "").lower() in _YES or key in words[1:] for key in _IF_NOT_WRITTEN):
        return None
    if given.get("media") == "cdrom":
        return None
    # In -blockdev, "file" refers to another block device.
    keys = ("filename", "file.filename") if option == "blockdev" else ("path", "file")
    path = next((given[key] for key in keys if key in given), None)
    # With another scheme ("rbd:…", "nbd://…") it is not a file.
    return None if path is None or re.match(r"(?!file:)[\w+.-]+:", path) else path


def _name_in(value: str | None) -> str | None:
    """Parse a name, alone or as a suboption."""
    if not value:
        return None
    named = _suboptions(value)
    name = named.get("guest") or named.get("name") or named.get("id") or value
    return None if name == _DEFAULT_ID else name


def _path_in(value: str | None) -> str | None:
    """Parse ``PATH``, ``path=PATH,…`` or QEMU's ``unix:PATH,server``; None for other sockets."""
    path = _suboptions(value, implied="path").get("path")
    if path is None or re.match(r"(?!unix:)[a-z]+:|none$|null$|vc\b|(mon:)?stdio$|pty$", path):
        return None
    return path.removeprefix("unix:").lstrip("@") or None
