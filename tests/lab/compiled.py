"""What Python and kvmtrace compile at the first start on a machine, kept for the next machines.

Under emulation that takes most of a minute. What is kept follows from the same files of the tree,
root and kernel, so it is what the next machine would compile. The first machine that is booted as
usual compiles it; others only get it. tests/lab/test_sources.py compiles anew.
"""

from __future__ import annotations

import hashlib
import io
import tarfile
from collections.abc import Sequence
from pathlib import Path

from tests.lab import cache
from tests.lab.config import PROJECT
from tests.lab.root import LIBRARY

_PROGRAMS = "/var/cache/kvmtrace"

# Of each module of kvmtrace, and of what it imports: roots of other architectures have none.
BYTECODE = (
    f"python3 -m compileall -q {LIBRARY}/kvmtrace && kvmtrace --version >/dev/null",
    f"find {LIBRARY} /usr/lib/python3* -name '*.pyc' -newer /opt/lab/agent.py -print0",
)
# What is of one boot stays there (symbols-*).
PROGRAMS = (
    "kvmtrace compile >/dev/null",
    f"find {_PROGRAMS} ! -name 'symbols-*' -type f -print0",
)

# By tests/unit/test_imports.py the sources import nothing else of kvmtrace.
_PROGRAMS_FOLLOW_FROM = (
    *("bpf/**/*.[ch]", "kvmtrace/*.py"),
    *(f"kvmtrace/{package}/**/*.py" for package in ("linux", "sources", "vmm")),
)


def program_sources() -> str:
    """Hash the files of the tree that eBPF programs, and how they are kept, follow from."""
    content = hashlib.sha256()
    for path in sorted({path for one in _PROGRAMS_FOLLOW_FROM for path in PROJECT.glob(one)}):
        content.update(str(path.relative_to(PROJECT)).encode() + b"\0" + path.read_bytes())
    return content.hexdigest()


class Compiled:
    """The cache entry ``kind`` of ``inputs``; ``files`` is None until it was kept."""

    def __init__(self, kind: str, commands: Sequence[str], *inputs: object) -> None:
        self._kind, self._key = kind, cache.digest(commands, *inputs)
        compile_, found = commands
        self.command = f"{compile_} && {found} | tar --null -cf - -P -T -"
        """Shell for the machine: compile, and write an archive of it."""

    @property
    def files(self) -> dict[str, bytes] | None:
        """What was compiled, by path without the first slash."""
        home = cache.directory() / f"{self._kind}@{self._key}"
        if not home.is_dir():
            return None
        with tarfile.open(home / "files.tar") as archive:
            return {
                member.name.removeprefix("/"): extracted.read()
                for member in archive
                if (extracted := archive.extractfile(member)) is not None
            }

    def keep(self, archive: bytes) -> None:
        """Keep what ``command`` wrote. Raises tarfile.TarError if that is no archive."""
        with tarfile.open(fileobj=io.BytesIO(archive)) as found:
            found.getmembers()

        def build(directory: Path) -> None:
            (directory / "files.tar").write_bytes(archive)

        cache.entry(self._kind, self._key, build, keep=10)
