"""kvmtrace's Debian package, built in a Debian root of its own."""

from __future__ import annotations

import hashlib
import shutil
import subprocess
from pathlib import Path

from tests.lab import cache, debian_control, layer, userland
from tests.lab.config import PROJECT
from tests.lab.progress import step
from tests.lab.userland import alone

_ENTER = """
set -e
root=$1
shift
mount --rbind /proc "$root/proc"
mount --rbind /dev "$root/dev"
exec chroot "$root" env -i HOME=/root LANG=C.UTF-8 PATH=/usr/sbin:/usr/bin:/sbin:/bin sh -ec "$1"
"""
# Beside what the package needs to be built: to look at the unit and the manual pages.
_BESIDE = ("build-essential", "man-db", "systemd")


class System:
    """A Debian root of its own, which may be changed."""

    def __init__(self, suite: str, home: Path) -> None:
        made = userland.root(suite, (*_build_dependencies(), *_BESIDE))
        self.root = home / "root"
        subprocess.run(["cp", "-a", "--reflink=auto", made, self.root], check=True)
        for left_out in (self.root / "etc/dpkg/dpkg.cfg.d").glob("*mmdebstrap"):
            left_out.unlink()  # manual pages are looked at here

    def run(self, line: str, status: int = 0) -> str:
        """Run a line of shell in it; return its stdout. AssertionError at another exit status."""
        command = alone(["sh", "-c", _ENTER, "sh", str(self.root), line])
        done = subprocess.run(
            command, stdin=subprocess.DEVNULL, capture_output=True, text=True, check=False
        )
        assert done.returncode == status, (line, done.stdout[-5000:] + done.stderr[-5000:])
        return done.stdout


def _build_dependencies() -> tuple[str, ...]:
    names = debian_control.names("Build-Depends")
    return tuple("debhelper" if name == "debhelper-compat" else name for name in names)


def _files() -> list[Path]:
    beside = [one for name in ("debian", "docs") for one in (PROJECT / name).rglob("*")]
    return sorted({*layer.clone_files(), *filter(Path.is_file, beside)})


def built(suite: str) -> Path:
    """The package of the current tree (a .deb, with its .changes beside), built on `suite`."""
    content = hashlib.sha256()
    for path in (*_files(), Path(__file__)):
        content.update(str(path).encode() + b"\0" + path.read_bytes())
    key = content.hexdigest()[:12]
    home = cache.entry(f"deb-{suite}", key, lambda path: _build(suite, path), keep=10)
    return next(home.glob("kvmtrace_*_all.deb"))


def _build(suite: str, into: Path) -> None:
    work = into / "work"
    work.mkdir()
    system = System(suite, work)
    for path in _files():
        copy = system.root / "build/kvmtrace" / path.relative_to(PROJECT)
        copy.parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(path, copy, follow_symlinks=False)
    with step(f"kvmtrace's Debian package on {suite}"):
        system.run("cd /build/kvmtrace && dpkg-buildpackage -us -uc -b")
    for made in (system.root / "build").glob("kvmtrace_*.*"):
        shutil.copy(made, into)
    shutil.rmtree(work)
