"""The initramfs of a machine: busybox, a few modules, and a script that mounts the root."""

from __future__ import annotations

import shutil
import stat
from collections.abc import Mapping, Sequence
from pathlib import Path

from tests.lab import cache, image
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
LAYERS
mkdir -p /rw/work /rw/upper/opt/lab /rw/upper/mnt/share /rw/upper/usr/lib/modules/RELEASE
cp /agent.py /rw/upper/opt/lab/
[ ! -d /over ] || cp -r /over/* /rw/upper/
mount -t overlay -o $options root /root || fail "put the root together"
mount -t ext4 -o ro MODULES /root/usr/lib/modules/RELEASE || fail "mount the modules"
if grep -qw 9p /proc/filesystems; then
    nine=trans=virtio,version=9p2000.L,msize=512000,cache=none
    mount -t 9p -o $nine share /root/mnt/share || fail "mount the share"
fi
mount --move /dev /root/dev
mount --move /proc /root/proc
mount -t sysfs sys /root/sys
exec switch_root /root START
"""

_LAYERS = """mount -t ext4 -o ro /dev/vdb /layer || fail "mount kvmtrace's layer"
mount -t tmpfs -o mode=755,size=75% rw /rw
options=lowerdir=/layer:/lower,upperdir=/rw/upper,workdir=/rw/work"""

# For a host of services: what is written stays on its disk, and systemd is process 1.
_STATE = """mount -t ext4 /dev/vdc /rw || fail "mount the state"
options=lowerdir=/lower,upperdir=/rw/upper,workdir=/rw/work"""

# For an initramfs that holds the whole root: kernels whose disk driver is not built in.
WHOLE_INIT = """#!/bin/sh
PATH=/usr/sbin:/usr/bin
mount -t devtmpfs dev /dev
mount -t proc proc /proc
mount -t sysfs sys /sys
exec python3 -S /opt/lab/agent.py
"""


def busybox(row: Row) -> Path:
    """Return a static busybox for the architecture of `row`, from its root's suite."""

    def build(directory: Path) -> None:
        suite = Suite(row.root.suite, row.arch.name)
        suite.unpack(["busybox-static"], directory, f"busybox ({row.arch.name})")

    home = cache.entry(f"busybox-{row.arch.name}", cache.digest(row.root.suite), build)
    found = [home / "bin/busybox", home / "usr/bin/busybox"]
    return next(path for path in found if path.exists())


def write(row: Row, kernel: Kernel, path: Path, over: Mapping[str, bytes] | None = None) -> None:
    """Write the initramfs that boots `kernel` for `row`.

    ``over``: files that are put over the root, by path.
    """
    archive = Archive()
    made = set()
    for name, content in (over or {}).items():
        for parent in reversed(Path("over", name).parents[:-1]):
            if parent not in made:
                archive.directory(str(parent))
                made.add(parent)
        archive.file(f"over/{name}", content, 0o755 if "/bin/" in name else 0o644)
    for name in ("bin", "dev", "proc", "modules", "lower", "layer", "rw", "root"):
        archive.directory(name)
    service = row.root.service
    words = {
        "RELEASE": kernel.release,
        "LAYERS": _STATE if service else _LAYERS,
        "MODULES": "/dev/vdb" if service else "/dev/vdc",
        "START": "/sbin/init" if service else "/usr/bin/python3 -S /opt/lab/agent.py",
    }
    script = INIT
    for word, value in words.items():
        script = script.replace(word, value)
    archive.file("init", script.encode(), 0o755)
    archive.file("agent.py", AGENT.read_bytes(), 0o644)
    archive.file("bin/busybox", busybox(row).read_bytes(), 0o755)
    order = []
    for module in boot_modules(kernel.modules):
        name = module.name.split(".")[0]
        order.append(name)
        archive.file(f"modules/{name}", module_bytes(module), 0o644)
    archive.file("modules/order", "\n".join(order).encode(), 0o644)
    path.write_bytes(archive.finish())


def write_whole(row: Row, images: Sequence[Path], path: Path) -> None:
    """Write an initramfs that is the root: the contents of `images`, later ones on top."""
    archive = Archive()
    archive.file("init", WHOLE_INIT.encode(), 0o755)
    archive.directory("opt/lab")
    archive.file("opt/lab/agent.py", AGENT.read_bytes(), 0o644)
    with path.open("wb") as whole:
        for one in images:
            with _unpacked(row, one).open("rb") as part:
                shutil.copyfileobj(part, whole)
        whole.write(archive.finish())


def _unpacked(row: Row, disk: Path) -> Path:
    """Return the contents of an image as a cpio archive."""

    def build(directory: Path) -> None:
        tree = directory / "tree"
        image.unpack(disk, tree)
        archive = Archive()
        for found in sorted(tree.rglob("*")):
            archive.add(str(found.relative_to(tree)), found)
        (directory / "all.cpio").write_bytes(archive.finish())
        shutil.rmtree(tree)

    key = cache.digest(disk.parent.name)
    return cache.entry(f"cpio-{disk.stem}-{row.arch.name}", key, build) / "all.cpio"


class Archive:
    """A cpio archive in the "newc" format, which the kernel unpacks."""

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

    def add(self, name: str, path: Path) -> None:
        """Add the file, directory or link at `path`; other kinds are skipped."""
        mode = path.lstat().st_mode
        if stat.S_ISLNK(mode):
            self._add(name, mode, bytes(path.readlink()))
        elif stat.S_ISDIR(mode):
            self._add(name, mode, b"")
        elif stat.S_ISREG(mode):
            self._add(name, mode, path.read_bytes())

    def finish(self) -> bytes:
        """Return the finished archive."""
        self._add("TRAILER!!!", 0, b"")
        return bytes(self.data)
