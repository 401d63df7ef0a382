"""A cache of things that are slow to make: built once and shared by processes.

An entry is a directory named after its kind and a digest of its inputs. It is built under a
temporary name and then renamed, so an entry is complete or absent even if a build is interrupted. A
lock keeps two processes from building the same entry.
"""

from __future__ import annotations

import fcntl
import hashlib
import json
import os
import shutil
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

from tests.lab.progress import print_status


def directory() -> Path:
    """The cache's directory: KVMTRACE_LAB_CACHE, else kvmtrace-lab in the user's cache."""
    chosen = os.environ.get("KVMTRACE_LAB_CACHE")
    if chosen:
        path = Path(chosen)
    else:
        home = os.environ.get("XDG_CACHE_HOME") or str(Path.home() / ".cache")
        path = Path(home) / "kvmtrace-lab"
    path.mkdir(parents=True, exist_ok=True)
    return path.resolve()


def digest(*inputs: object) -> str:
    """Hash `inputs` to a short name that is the same in every process."""
    text = json.dumps(inputs, sort_keys=True, default=str)
    return hashlib.sha256(text.encode()).hexdigest()[:12]


@contextmanager
def lock(name: str) -> Iterator[None]:
    """Hold the lock called `name`; wait while another process holds it."""
    locks = directory() / "locks"
    locks.mkdir(exist_ok=True)
    with (locks / name).open("w") as handle:
        try:
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            print_status(f"waiting for another process to finish {name}")
            fcntl.flock(handle, fcntl.LOCK_EX)
        yield


def entry(kind: str, key: str, build: Callable[[Path], None], *, keep: int = 2) -> Path:
    """Return the directory of `kind` for `key`; `build(directory)` fills it if it is missing.

    The newest `keep` generations are kept: a machine may be running on an older one.
    """
    final = directory() / f"{kind}@{key}"
    if not final.is_dir():
        with lock(kind):
            if not final.is_dir():
                _build(kind, final, build, keep)
    os.utime(final)
    return final


def _build(kind: str, final: Path, build: Callable[[Path], None], keep: int) -> None:
    for left_over in final.parent.glob(f"{kind}@*.tmp-*"):
        shutil.rmtree(left_over, ignore_errors=True)
    made = Path(tempfile.mkdtemp(prefix=f"{final.name}.tmp-", dir=final.parent))
    made.chmod(0o755)
    try:
        build(made)
        made.rename(final)
    except BaseException:
        shutil.rmtree(made, ignore_errors=True)
        raise
    older = sorted(
        (path for path in final.parent.glob(f"{kind}@*") if path != final),
        key=lambda path: path.stat().st_mtime,
    )
    for path in older[: 1 - keep]:
        shutil.rmtree(path, ignore_errors=True)
