"""A Debian root directory in which the README's installation commands are run literally.

This is a chroot in a mount namespace, not a machine. It has no /sys, so nothing in it can attach
to the host's kernel. Writes go into directories that are mounted over the root, which is never
changed.
"""

from __future__ import annotations

import os
import shutil
import sys
from pathlib import Path

from tests.lab import cache, layer, programs
from tests.lab.config import PROJECT, host_arch
from tests.lab.mirror import Suite
from tests.lab.progress import step
from tests.lab.root import LEFT_OUT, extract

LAID_OVER = ("root", "opt", "tmp", "run", "usr/local/bin")
"""Directories that are empty at first and belong to one system."""

CLONE = "root/kvmtrace"
WHEELS = "opt/wheels"
TOOLS = ("hatchling", "pip", "setuptools", "wheel")
"""For pip's build environments, and for pipx's shared environment (the last three)."""

_ENTER = """
set -e
root=$1 work=$2
shift 2
for place in {places}; do mount --bind "$work/$place" "$root/$place"; done
mount --rbind /proc "$root/proc"
mount --rbind /dev "$root/dev"
exec chroot "$root" "$@"
"""


# SIOCSIFFLAGS (include/uapi/linux/sockios.h): IFF_UP and IFF_RUNNING for the loopback.
_ALONE = """
import fcntl, os, socket, struct, subprocess, sys
fcntl.ioctl(socket.socket(), 0x8914, struct.pack("16sH14x", b"lo", 0x41))
subprocess.run(["mount", "-t", "tmpfs", "none", "/run"], check=True)
os.execvp(sys.argv[1], sys.argv[1:])
"""


def alone(command: list[str]) -> list[str]:
    """Prefix a command so that it runs with a loopback and a /run of its own.

    Commands find a running `serve` by its socket, and these must not find each other's.
    """
    as_root = [] if os.geteuid() == 0 else ["--map-root-user"]
    return ["unshare", "--net", "--mount", *as_root, sys.executable, "-c", _ALONE, *command]


def root(suite: str, packages: tuple[str, ...]) -> Path:
    """Return a root directory with these packages of a Debian release; build it if missing."""
    key = cache.digest(suite, packages, host_arch())
    return (
        cache.entry(f"userland-{suite}", key, lambda path: _build(suite, packages, path)) / "root"
    )


def _build(suite: str, packages: tuple[str, ...], into: Path) -> None:
    archive, tree = into / "root.tar", into / "root"
    with step(f"Debian {suite} with {', '.join(packages)}"):
        extract(
            [Suite(suite, host_arch()).current_source],
            host_arch(),
            packages,
            archive,
            *(f"--dpkgopt=path-exclude={path}" for path in LEFT_OUT),
            variant="apt",
        )
        tree.mkdir()
        # Devices are the host's (see _ENTER); files belong to this user.
        programs.output(["tar", "--no-same-owner", "--exclude=./dev/*", "-xf", archive, "-C", tree])
        archive.unlink()


def pip_download(requirements: list[str], into: Path, python: str | None = None) -> None:
    """Download wheels of these and of their dependencies, from the configured index.

    ``python``: for another version than this one, as in "3.13".
    """
    pip = [sys.executable, "-m", "pip", "download", "-q", "--disable-pip-version-check"]
    version = [] if python is None else ["--python-version", python]
    programs.output([*pip, "--only-binary=:all:", *version, "-d", into, *requirements])


def python_of(root: Path) -> str:
    """The version of a root's Python, as in "3.13"."""
    (found,) = (root / "usr/lib").glob("python3.*")
    return found.name.removeprefix("python")


class Userland:
    """A system of one user: a root, with the directories of ``work`` mounted over it.

    It has a clone of the project in ``CLONE``; programs start in a directory with tests/unit.
    """

    def __init__(self, root: Path, work: Path, wheels: Path) -> None:
        self._root, self._work = root, work
        for place in LAID_OVER:
            (work / place).mkdir(parents=True)
        shutil.copytree(wheels, work / WHEELS)
        for path in layer.clone_files():
            copy = work / CLONE / path.relative_to(PROJECT)
            copy.parent.mkdir(parents=True, exist_ok=True)
            shutil.copy(path, copy)
        shutil.copytree(PROJECT / "tests/unit", work / "tmp/tests/unit")

    def command(self, line: str) -> list[str]:
        """Build the command that runs a line of shell in it, as root."""
        enter = ["sh", "-c", _ENTER.format(places=" ".join(LAID_OVER)), "sh"]
        environment = [
            "HOME=/root",
            "LANG=C.UTF-8",
            "PATH=/usr/local/bin:/usr/bin:/bin:/usr/sbin:/sbin:/root/.local/bin",
            "PIP_NO_INDEX=1",
            f"PIP_FIND_LINKS=/{WHEELS}",
            "TERM=xterm-256color",
        ]
        inside = ["env", "-i", *environment, "sh", "-ec", f"cd /tmp\n{line}"]
        return alone([*enter, str(self._root), str(self._work), *inside])
