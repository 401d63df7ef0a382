"""Directories as read-only ext4 images: what a machine mounts from its disks."""

from __future__ import annotations

import os
from pathlib import Path

from tests.lab import programs

MKE2FS = ("mke2fs", "-q", "-F", "-t", "ext4", "-O", "^has_journal", "-m", "0", "-d")


def _size(content: int) -> str:
    """Room for `content` bytes of files, as mke2fs takes it."""
    return f"{(content * 5 // 4 >> 10) + 16384}k"


def of_directory(tree: Path, into: Path) -> None:
    """An image of a directory."""
    content = sum(path.stat().st_size + 4096 for path in tree.rglob("*") if path.is_file())
    programs.output([*MKE2FS, tree, into, _size(content)])


def of_archive(archive: Path, tree: Path, into: Path) -> None:
    """An image of a root's tar archive, by way of `tree`.

    Owners and devices are those of the archive: where we are not root, fakeroot remembers them.
    """
    tree.mkdir()
    script = 'tar --numeric-owner -xpf "$0" -C "$1" && shift && exec "$@"'
    size = _size(archive.stat().st_size)
    fake = [] if os.geteuid() == 0 else ["fakeroot"]
    programs.output([*fake, "sh", "-c", script, archive, tree, *MKE2FS, tree, into, size])


def unpack(disk: Path, into: Path) -> None:
    """What is in an image, as files. Owners are not kept."""
    into.mkdir()
    programs.output(["debugfs", "-R", f"rdump / {into}", disk])
