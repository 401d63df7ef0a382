"""A Debian host that systemd boots, with a disk that keeps what is written.

kvmtrace is not there: its Debian package is installed in it, as an admin does. The agent is a unit.
"""

from __future__ import annotations

import time
from dataclasses import dataclass
from pathlib import Path
from typing import Self

from tests.lab import image, initramfs, layer, programs, qemu
from tests.lab.machine import BOOT_SECONDS, DEFAULT, LIFE_SECONDS, Machine, Prepared, prepare

PACKAGE = "kvmtrace.deb"
DISK_MIB = 1024

_AGENT = """[Unit]
Description=The lab's agent
DefaultDependencies=no
[Service]
ExecStart=/usr/bin/python3 -S /opt/lab/agent.py
"""
# They are of no use here, and emulation is slow.
_MASKED = tuple(
    "apt-daily.timer apt-daily-upgrade.timer dpkg-db-backup.timer e2scrub_all.timer fstrim.timer "
    "e2scrub_reap.service getty.target prometheus.service systemd-update-utmp.service".split()
)


@dataclass(frozen=True)
class Release:
    """A Debian release as a host: its kernel, and the guest memory that its VMs have.

    ``has_live_table``: its own Textual is new enough for ``kvmtrace top`` on a terminal.
    ``missing_probes``: those that its kernel has nothing for.
    """

    suite: str
    kernel: str
    backing: str
    has_live_table: bool = True
    missing_probes: tuple[str, ...] = ()

    @property
    def root(self) -> str:
        """The root of kernels.toml that systemd boots."""
        return f"{self.suite}-service"


RELEASES = {
    one.suite: one
    for one in (
        Release("trixie", DEFAULT, "gmem"),
        Release("bookworm", "bookworm", "anon", False, ("gmem", "gmem_error")),
    )
}


@dataclass(frozen=True)
class Disk:
    """What a host has written; boot it again and again."""

    path: Path

    @classmethod
    def new(cls, path: Path, *features: str) -> Self:
        """An empty one. ``features``: of ext4, as ``mke2fs -O`` takes them."""
        programs.output(["truncate", "-s", f"{DISK_MIB}M", path])
        more = [word for one in features for word in ("-O", one)]
        programs.output([*image.MKE2FS[:-1], *more, "-E", "lazy_itable_init=1", path])
        return cls(path)


class ServiceHost(Machine):
    """A running host; `run` and `start` start programs beside its services, as root."""

    def __init__(self, prepared: Prepared, disk: Disk, package: Path) -> None:
        self._disk, self._package = disk, package
        quiet = "systemd.show_status=0 systemd.firstboot=0"
        super().__init__(prepared, "3G", f"{quiet} tsc=reliable", LIFE_SECONDS)

    @classmethod
    def boot_disk(cls, disk: Disk, package: Path, release: Release) -> Self:
        """Boot it and wait for its agent. ``package``: a file for /mnt/share."""
        host = cls(prepare(release.kernel, release.root), disk, package)
        try:
            start = time.monotonic()
            host.channel.wait(lambda: bool(host.channel.ready), BOOT_SECONDS, "agent in the host")
            host.boot_seconds = time.monotonic() - start
        except BaseException:
            host.close()
            raise
        return host

    def _parts(self, prepared: Prepared) -> qemu.Parts:
        modules = prepared.kernel.modules_image
        assert modules is not None
        (self.work / "share" / PACKAGE).write_bytes(self._package.read_bytes())
        initrd = self.work / "initramfs.cpio"
        units = "etc/systemd/system"
        layer.make_vmm(prepared.row.arch)
        over = {
            "usr/local/bin/vmm": layer.vmm(prepared.row.arch).read_bytes(),
            "etc/machine-id": b"6b766d74726163650000000000000001\n",
            "etc/hostname": b"lab\n",
            # ldconfig, sysusers and others need not run: the root was installed, not updated.
            "etc/.updated": b"",
            "var/.updated": b"",
            f"{units}/lab-agent.service": _AGENT.encode(),
            # not by a link in sysinit.target.wants: an initramfs of ours has none
            f"{units}/sysinit.target.d/lab.conf": b"[Unit]\nWants=lab-agent.service\n",
        }
        over |= {f"{units}/{name}": b"" for name in _MASKED}  # an empty unit is a masked one
        initramfs.write(prepared.row, prepared.kernel, initrd, over)
        disks = (prepared.root, modules)
        return qemu.Parts(
            prepared.kernel.image, initrd, disks, self._share, self.work, self._disk.path
        )

    def reboot(self) -> None:
        """Reboot in an orderly way: this machine ends, and its disk can be booted."""
        self.start("systemctl reboot")
        self.emulator.process.wait(BOOT_SECONDS)
        self.close()
