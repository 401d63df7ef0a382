"""Choose a QEMU and build its command line.

An architecture with `qemu-suites` uses the newest QEMU of these. It is unpacked with all of its
libraries and started by their ld.so. It is therefore the same on every host, and can inject
hardware errors, which needs QEMU 10.2.

Other machines use the host's QEMU. Debian 12's QEMU 7.2 kills some boots of 7.3 kernels (an int3
oops where static keys are patched), so there the one of bookworm-backports is unpacked into the
cache and used; nothing is installed.
"""

from __future__ import annotations

import re
import shutil
from dataclasses import dataclass
from pathlib import Path

from tests.lab import cache, programs, root
from tests.lab.config import Arch, Row, host_arch
from tests.lab.errors import LabError, LabUnable
from tests.lab.mirror import Suite
from tests.lab.progress import print_status, step
from tests.lab.resolve import numbers

OLDEST_GOOD = 10
BACKPORTS = "bookworm-backports"


@dataclass(frozen=True)
class Choices:
    """Options of a machine beyond those of its row; see `Machine.boot`."""

    ras: bool = False
    nested: bool = False
    cpu: str = ""
    counting: bool = False


PLAIN = Choices()


@dataclass(frozen=True)
class Qemu:
    """A QEMU that runs on this host."""

    program: Path
    version: str
    firmware: tuple[Path, ...] = ()
    home: Path | None = None

    @property
    def command(self) -> list[str]:
        """The start of the command line: program and firmware directories."""
        options = [("-L", str(path)) for path in self.firmware]
        words = [str(self.program), *(word for option in options for word in option)]
        return words if self.home is None else [*_loader(self.home), *words]

    def options(self, row: Row, choices: Choices) -> list[str]:
        """Options for machine and CPU; LabUnable if the architecture cannot do what is chosen."""
        arch = row.arch
        if choices.nested and not arch.nested_options:
            raise LabUnable(f"no CPU for guests that are hypervisors on {arch.name}")
        if choices.ras and (self.home is None or not arch.ras_options):
            raise LabUnable(f"no firmware that reports hardware errors for {arch.name}")
        if choices.cpu and choices.cpu not in arch.cpus:
            raise LabUnable(f"no CPU of {choices.cpu} for {arch.name}")
        words = [*arch.options, *(arch.ras_options if choices.ras else ())]
        words += arch.nested_options if choices.nested else ()
        words += ("-cpu", arch.cpus[choices.cpu]) if choices.cpu else ()
        words += ("-icount", "shift=0,sleep=off") if choices.counting else ()
        return [word.replace("{qemu}", str(self.home)) for word in words]


def _loader(home: Path) -> list[str]:
    """Command prefix that starts a program of an unpacked root with its ld.so and libraries."""
    found = sorted((home / "usr/lib").glob("*/ld-linux-*.so.*"))
    if not found:
        raise LabError(f"{home} has no dynamic linker")
    libraries = [str(path) for path in (home / "usr/lib").glob("*-linux-gnu")]
    libraries += [f"{path}/pulseaudio" for path in libraries]
    return [str(found[0]), "--library-path", ":".join(libraries)]


def _version(*program: str | Path) -> str:
    """The version that a QEMU prints, "" if it does not run."""
    try:
        printed = programs.output([*program, "--version"])
    except LabError:
        return ""
    found = re.search(r"version (\d+[\d.]*)", printed)
    return found[1] if found else ""


def find(arch: Arch) -> Qemu:
    """Find the QEMU for machines of `arch`; LabError if there is none."""
    if arch.qemu_suites:
        return _unpacked(arch)
    own = shutil.which(arch.qemu)
    version = _version(own) if own else ""
    if own and int(version.partition(".")[0] or 0) >= OLDEST_GOOD:
        return Qemu(Path(own), version)
    if not own:
        raise LabError(f"{arch.qemu} is not installed: run `sh tests/lab/setup.sh`")
    os_release = Path("/etc/os-release")
    if not os_release.exists() or "VERSION_CODENAME=bookworm" not in os_release.read_text():
        print_status(
            f"this host's QEMU {version} is older than {OLDEST_GOOD}: new kernels may die in it"
        )
        return Qemu(Path(own), version)
    return _backported(arch)


def _backported(arch: Arch) -> Qemu:
    suite = Suite(BACKPORTS, host_arch())
    names = [arch.qemu_package, "qemu-system-data"]
    listed = {one.name: one for one in suite.packages(f"^({'|'.join(names)})$")}
    missing = [name for name in names if name not in listed]
    if missing:
        raise LabError(f"{BACKPORTS} has no {', '.join(missing)}")
    wanted = [f"{name}={listed[name].version}" for name in names]

    def build(directory: Path) -> None:
        size = sum(listed[name].size for name in names)
        suite.unpack(wanted, directory, "QEMU", size)

    home = cache.entry(f"qemu-{arch.name}", cache.digest(wanted), build)
    program = home / "usr/bin" / arch.qemu
    version = _version(program)
    if not version:
        raise LabError(f"QEMU of {BACKPORTS} does not run: try `{program} --version`")
    share = [home / "usr/share/qemu", Path("/usr/share/seabios"), Path("/usr/share/qemu")]
    return Qemu(program, version, tuple(path for path in share if path.exists()))


def _unpacked(arch: Arch) -> Qemu:
    suites = [Suite(name, host_arch()) for name in arch.qemu_suites]
    newest = suites[-1]
    listed = newest.packages(f"^{arch.qemu_package}$")
    if not listed:
        raise LabError(f"{newest.name} has no {arch.qemu_package}")
    version = max(listed, key=lambda one: numbers(one.version)).version
    packages = (arch.qemu_package, *arch.qemu_firmware)
    prefer = f'--aptopt=APT::Default-Release "{newest.name}"'

    def build(directory: Path) -> None:
        with step(f"QEMU {version} for {arch.name}, with its libraries"):
            sources = [suite.current_source for suite in suites]
            root.extract(sources, host_arch(), packages, directory / "root", prefer)

    home = cache.entry(f"qemu-{arch.name}", cache.digest(version, packages), build) / "root"
    program = home / "usr/bin" / arch.qemu
    runs_as = _version(*_loader(home), program)
    if not runs_as:
        raise LabError(f"QEMU of {newest.name} does not run: {program}")
    share = [home / "usr/share/qemu", home / "usr/share/seabios"]
    return Qemu(program, runs_as, tuple(path for path in share if path.exists()), home)


@dataclass(frozen=True)
class Parts:
    """The files that a machine is made of; `work` and `state` are not shared between machines.

    `disks` are only read, `state` is a disk that is written to: the last one.
    """

    image: Path
    initramfs: Path
    disks: tuple[Path, ...]
    share: Path
    work: Path
    state: Path | None = None


def arguments(  # noqa: PLR0917 (each is a part of the machine)
    qemu: Qemu,
    row: Row,
    parts: Parts,
    memory: str,
    cmdline: str,
    choices: Choices,
) -> list[str]:
    """Build the command line of a machine."""
    kernel_arguments = f"console={row.arch.console} panic=-1 oops=panic {cmdline}".strip()
    command = [
        *qemu.command,
        *("-nodefaults", "-no-user-config", "-no-reboot", "-display", "none"),
        *qemu.options(row, choices),
        *("-smp", "2", "-m", memory),
        *("-kernel", str(parts.image), "-initrd", str(parts.initramfs)),
        *("-append", kernel_arguments),
        *("-serial", f"file:{parts.work}/console.log"),
        *("-qmp", f"unix:{parts.work}/qmp.sock,server=on,wait=off"),
        *("-device", "virtio-serial-pci"),
        *("-chardev", f"socket,id=agent,path={parts.work}/agent.sock,server=on,wait=off"),
        *("-device", "virtserialport,chardev=agent,name=kvmtrace.lab"),
    ]
    for disk in parts.disks:  # /dev/vda, vdb, vdc
        identity = f"disk-{disk.stem}"
        image = f"file={disk},format=raw,if=none,id={identity},readonly=on,file.locking=off"
        command += ["-drive", image, "-device", f"virtio-blk-pci,drive={identity}"]
    if parts.state is not None:
        # What was written outlives QEMU, as the host keeps running.
        image = f"file={parts.state},format=raw,if=none,id=disk-state,cache=unsafe"
        command += ["-drive", image, "-device", "virtio-blk-pci,drive=disk-state"]
    command += ["-fsdev", f"local,id=share,path={parts.share},security_model=none"]
    command += ["-device", "virtio-9p-pci,fsdev=share,mount_tag=share"]
    return command
