"""Root file systems: Debian packages and kvmtrace's dependencies, as read-only ext4 images.

Images are faster than a directory over 9p: Python and LLVM open hundreds of files, and each would
be a round trip out of the emulated machine. Any number of machines share an image.
"""

from __future__ import annotations

import sys
import tempfile
import tomllib
from collections.abc import Sequence
from pathlib import Path

from tests.lab import cache, debian_control, image, programs
from tests.lab.config import PROJECT, Root, Row
from tests.lab.mirror import Suite
from tests.lab.progress import step

LIBRARY = "/opt/kvmtrace/lib"
"""Directory of kvmtrace and its dependencies in a machine; a .pth file adds it to sys.path."""

PTH = "usr/lib/python3/dist-packages/kvmtrace-lab.pth"
LEFT_OUT = ("/usr/share/doc/*", "/usr/share/man/*", "/usr/share/locale/*", "/usr/share/info/*")
FORMAT = 1
"""Raise this when the output of `_build` changes."""


COMPILE = "python3 -m compileall -q"
FINISH = (
    # Packages that are only unpacked do not run the scripts that would do this.
    'cp "$1"/usr/share/base-passwd/passwd.master "$1"/etc/passwd',
    'cp "$1"/usr/share/base-passwd/group.master "$1"/etc/group',
)


def dependencies() -> list[str]:
    """Requirements of kvmtrace's wheel from PyPI, by pyproject.toml."""
    path = PROJECT / "pyproject.toml"
    if not path.exists():
        return []
    project = tomllib.loads(path.read_text()).get("project", {})
    extras = project.get("optional-dependencies", {})
    development = {"dev", "test", "tests", "lint", "docs", "bench", "dashboards"}
    wanted = list(project.get("dependencies", []))
    for name, requirements in extras.items():
        if name not in development:
            wanted += requirements
    return sorted(one for one in wanted if not one.startswith("kvmtrace"))


def packages(root: Root) -> tuple[str, ...]:
    """Names of the packages in a root."""
    depends = debian_control.names("Depends", "Recommends", "Suggests") if root.service else ()
    return tuple(dict.fromkeys((*root.packages, *depends)))


def fetch(row: Row) -> Path:
    """Return the root image of `row`; build it if it is missing."""
    suite = Suite(row.root.suite, row.arch.name)
    of_pypi = [] if row.root.service else dependencies()
    key = cache.digest(FORMAT, packages(row.root), row.root.suite, row.arch.name, of_pypi)
    home = cache.entry(
        f"root-{row.root.name}-{row.arch.name}", key, lambda path: _build(row, suite, path)
    )
    return home / "root.img"


def pip_install(arguments: list[str], target: Path) -> None:
    """Install from PyPI into a directory, wheels only.

    Hashes would pin versions, but the newest are wanted. Code of these wheels runs only in
    machines, not on the host.
    """
    pip = [sys.executable, "-m", "pip", "install", "-q", "--disable-pip-version-check"]
    programs.output([*pip, "--no-compile", "--only-binary=:all:", f"--target={target}", *arguments])


def _build(row: Row, suite: Suite, directory: Path) -> None:
    source = suite.current_source
    with tempfile.TemporaryDirectory(dir=directory, prefix="work-") as name:
        work = Path(name)
        extra = work / "extra"
        extra.mkdir()
        if not row.root.service:
            (extra / LIBRARY[1:]).mkdir(parents=True)
            (extra / PTH).parent.mkdir(parents=True)
            (extra / PTH).write_text(LIBRARY + "\n")
        if dependencies() and not row.root.service:
            with step(f"kvmtrace's dependencies ({', '.join(dependencies())})"):
                pip_install(dependencies(), extra / LIBRARY[1:])
        hook = "extract" if row.arch.foreign else "customize"
        finish: tuple[str, ...] = ()
        if row.arch.foreign:
            finish = FINISH
        elif not row.root.service:
            finish = (f'chroot "$1" {COMPILE} {LIBRARY}',)
        named = packages(row.root)
        with step(f"root {row.root.name} ({row.arch.name}): {len(named)} packages"):
            extract(
                [source],
                row.arch.name,
                named,
                work / "root.tar",
                *(f"--dpkgopt=path-exclude={path}" for path in LEFT_OUT),
                *(f"--{hook}-hook={one}" for one in (f"sync-in {extra} /", *finish)),
                variant="extract" if row.arch.foreign else "apt",
            )
        with step(f"root {row.root.name}: image"):
            image.of_archive(work / "root.tar", work / "tree", directory / "root.img")


def extract(
    sources: Sequence[str],
    arch: str,
    packages: Sequence[str],
    into: Path,
    *options: str,
    variant: str = "extract",
) -> None:
    """Make a file system of packages and their dependencies, by mmdebstrap.

    ``variant="extract"`` only unpacks them: none of their code runs, so any architecture works.
    """
    programs.output(
        [
            "mmdebstrap",
            f"--variant={variant}",
            f"--architectures={arch}",
            f"--include={','.join(packages)}",
            *options,
            "",
            str(into),
            *sources,
        ]
    )
