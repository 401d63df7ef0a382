"""The initramfs of a machine: busybox, a few modules, and a script that puts the root together."""

from __future__ import annotations

import stat
from pathlib import Path

from tests.lab import cache
from tests.lab.config import Row
from tests.lab.kernel import Kernel, boot_modules, module_bytes
from tests.lab.mirror import Suite

AGENT = Path(__file__).with_name("agent.py")

INIT = """#!/bin/busybox sh
PATH=/bin
fail() { echo "lab: cannot $1"; poweroff -f; }
/bin/busybox --install -s /bin
mount -t devtmpfs dev /dev
mount -t proc proc /proc
for module in $(cat /modules/order); do
    insmod /modules/$module || fail "load $module"
done
mount -t ext4 -o ro /dev/vda /lower || fail "mount the root"
mount -t ext4 -o ro /dev/vdb /layer || fail "mount kvmtrace's layer"
mount -t tmpfs -o mode=755,size=75% rw /rw
mkdir -p /rw/work /rw/upper/opt/lab /rw/upper/mnt/share /rw/upper/usr/lib/modules/RELEASE
cp /agent.py /rw/upper/opt/lab/
options=lowerdir=/layer:/lower,upperdir=/rw/upper,workdir=/rw/work
mount -t overlay -o $options root /root || fail "put the root together"
mount -t ext4 -o ro /dev/vdc /root/usr/lib/modules/RELEASE || fail "mount the modules"
if grep -qw 9p /proc/filesystems; then
    nine=trans=virtio,version=9p2000.L,msize=512000,cache=none
    mount -t 9p -o $nine share /root/mnt/share || fail "mount the share"
fi
mount --move /dev /root/dev
mount --move /proc /root/proc
mount -t sysfs sys /root/sys
exec switch_root /root /usr/bin/python3 -S /opt/lab/agent.py
"""


def busybox(row: Row) -> Path:
    """A static busybox for the architecture of `row`, from its root's suite."""

    def build(directory: Path) -> None:
        suite = Suite(row.root.suite, row.arch.name)
        suite.unpack(["busybox-static"], directory, f"busybox ({row.arch.name})")

    home = cache.entry(f"busybox-{row.arch.name}", cache.digest(row.root.suite), build)
    found = [home / "bin/busybox", home / "usr/bin/busybox"]
    return next(path for path in found if path.exists())


def write(row: Row, kernel: Kernel, path: Path) -> None:
    """Make the initramfs that boots `kernel` for `row`."""
    archive = Archive()
    for name in ("bin", "dev", "proc", "modules", "lower", "layer", "rw", "root"):
        archive.directory(name)
    archive.file("init", INIT.replace("RELEASE", kernel.release).encode(), 0o755)
    archive.file("agent.py", AGENT.read_bytes(), 0o644)
    archive.file("bin/busybox", busybox(row).read_bytes(), 0o755)
    order = []
    for module in boot_modules(kernel.modules):
        name = module.name.split(".")[0]
        order.append(name)
        archive.file(f"modules/{name}", module_bytes(module), 0o644)
    archive.file("modules/order", "\n".join(order).encode(), 0o644)
    path.write_bytes(archive.finish())


class Archive:
    """A cpio archive of the "newc" kind, as the kernel unpacks it."""

    def __init__(self) -> None:
        self.data = bytearray()
        self.count = 0

    def _add(self, name: str, mode: int, content: bytes) -> None:
        self.count += 1
        raw = name.encode() + b"\0"
        fields = (self.count, mode, 0, 0, 1, 0, len(content), 0, 0, 0, 0, len(raw), 0)
        self.data += b"070701" + b"".join(b"%08X" % field for field in fields) + raw
        self._pad()
        self.data += content
        self._pad()

    def _pad(self) -> None:
        self.data += b"\0" * (-len(self.data) % 4)

    def directory(self, name: str) -> None:
        """Add a directory."""
        self._add(name, stat.S_IFDIR | 0o755, b"")

    def file(self, name: str, content: bytes, mode: int) -> None:
        """Add a file."""
        self._add(name, stat.S_IFREG | mode, content)

    def finish(self) -> bytes:
        """The whole archive."""
        self._add("TRAILER!!!", 0, b"")
        return bytes(self.data)
