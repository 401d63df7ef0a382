"""A kernel of kernels.toml as files: image, modules, and the initramfs that starts a machine."""

from __future__ import annotations

import lzma
import re
import shutil
import subprocess
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from tests.lab import cache, image, programs
from tests.lab.config import Row
from tests.lab.errors import LabError
from tests.lab.mirror import Suite
from tests.lab.progress import print_status
from tests.lab.resolve import Resolved, resolve

BOOT_MODULES = (
    "virtio_pci",
    "virtio_blk",
    "virtio_console",
    "9pnet_virtio",
    "9p",
    "crc32c_generic",
    "ext4",
    "overlay",
)
"""Modules needed before the root is mounted; those that are built in are skipped."""

FORMAT = 1
"""Raise this when the output of `_arrange` changes."""


@dataclass(frozen=True)
class Kernel:
    """An unpacked kernel: its release (`uname -r`) and the paths of its parts."""

    release: str
    image: Path
    modules: Path
    modules_image: Path | None

    def has(self, module: str) -> bool:
        """Whether the kernel has a module, loadable or built in."""
        lists = [self.modules / "modules.dep", self.modules / "modules.builtin"]
        pattern = re.compile(rf"/{module}\.ko\b", re.MULTILINE)
        return any(path.exists() and pattern.search(path.read_text()) for path in lists)


def resolved(row: Row) -> Resolved:
    """Find the packages that `row` stands for today."""
    packages = Suite(row.suite, row.arch.name).packages("^linux-(image|binary|modules|base)-[0-9]")
    where = f"{row.suite} ({row.arch.name})"
    found = resolve(packages, row.flavour, row.version, where, modules=row.modules)
    if found.note:
        print_status(found.note)
    return found


def fetch(row: Row) -> Kernel:
    """Return the kernel of `row`; download it if it is missing."""
    found = resolved(row)
    names = [f"{package.name}={package.version}" for package in found.packages]

    def build(directory: Path) -> None:
        suite = Suite(row.suite, row.arch.name)
        suite.unpack(names, directory / "deb", f"Linux {found.release}", found.size)
        _arrange(directory, found.release, modules=row.modules)

    home = cache.entry(f"kernel-{row.name}", cache.digest(FORMAT, names), build)
    modules = home / "lib/modules" / found.release
    modules_image = home / "modules.img" if row.modules else None
    return Kernel(found.release, home / "vmlinuz", modules, modules_image)


def _arrange(directory: Path, release: str, *, modules: bool) -> None:
    """Move image and modules to where `Kernel` expects them; packages differ in their layout."""
    deb = directory / "deb"
    trees = [path for path in deb.glob(f"**/lib/modules/{release}") if path.is_dir()]
    images = [*deb.glob(f"boot/vmlinu[xz]-{release}"), *(tree / "vmlinuz" for tree in trees)]
    images = [path for path in images if path.exists()]
    if not images or (modules and not trees):
        raise LabError(f"the packages of Linux {release} hold no image or no modules")
    images[0].rename(directory / "vmlinuz")
    if not modules:
        shutil.rmtree(deb)
        return
    tree = directory / "lib/modules" / release  # the layout that depmod wants
    tree.parent.mkdir(parents=True)
    trees[0].rename(tree)
    shutil.rmtree(deb)
    programs.output(["depmod", "-b", directory, release])
    image.of_directory(tree, directory / "modules.img")


def boot_modules(modules: Path) -> Iterator[Path]:
    """Yield the modules of `BOOT_MODULES` and their dependencies, in the order to load them."""
    depends: dict[str, tuple[Path, list[str]]] = {}
    listed = modules / "modules.dep"
    for line in listed.read_text().splitlines() if listed.exists() else ():
        path, _, needed = line.partition(":")
        depends[_name(path)] = (modules / path, [_name(one) for one in needed.split()])
    seen: set[str] = set()
    for wanted in BOOT_MODULES:
        if wanted not in depends:
            continue
        # modules.dep lists all dependencies, each before its own.
        for name in (*reversed(depends[wanted][1]), wanted):
            if name not in seen:
                seen.add(name)
                yield depends[name][0]


def _name(path: str) -> str:
    return re.sub(r"\.ko(\.\w+)?$", "", Path(path).name).replace("-", "_")


def module_bytes(path: Path) -> bytes:
    """Return the decompressed module."""
    if path.suffix == ".xz":
        return lzma.decompress(path.read_bytes())
    if path.suffix == ".zst":
        return subprocess.run(["zstd", "-dcq", str(path)], check=True, capture_output=True).stdout
    return path.read_bytes()
