"""Read-only ext4 images of directories: the disks of a machine."""

from __future__ import annotations

import os
from pathlib import Path

from tests.lab import programs

MKE2FS = ("mke2fs", "-q", "-F", "-t", "ext4", "-O", "^has_journal", "-m", "0", "-d")


def _size(content: int) -> str:
    """Size of an image for `content` bytes of files, in mke2fs's notation."""
    return f"{(content * 5 // 4 >> 10) + 16384}k"


def of_directory(tree: Path, into: Path) -> None:
    """Make an image of a directory."""
    content = sum(path.stat().st_size + 4096 for path in tree.rglob("*") if path.is_file())
    programs.output([*MKE2FS, tree, into, _size(content)])


def of_archive(archive: Path, tree: Path, into: Path) -> None:
    """Make an image of a root's tar archive; it is unpacked in `tree` for that.

    Owners and devices are those of the archive; without root, fakeroot keeps track of them.
    """
    tree.mkdir()
    script = 'tar --numeric-owner -xpf "$0" -C "$1" && shift && exec "$@"'
    size = _size(archive.stat().st_size)
    fake = [] if os.geteuid() == 0 else ["fakeroot"]
    programs.output([*fake, "sh", "-c", script, archive, tree, *MKE2FS, tree, into, size])


def unpack(disk: Path, into: Path) -> None:
    """Extract the files of an image. Owners are not kept."""
    into.mkdir()
    programs.output(["debugfs", "-R", f"rdump / {into}", disk])
