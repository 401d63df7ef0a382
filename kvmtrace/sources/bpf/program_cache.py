"""What a start would compute anew, kept in a directory: compiled programs, layouts, addresses.

Programs from here run in the kernel. So nothing is believed that anybody but root could have
written: the directory, those above it and the file must be root's, and nobody else may write there.
What is not believed, damaged or of another kind is made anew.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import stat
from collections.abc import Iterator
from typing import Any

PATH = "/var/cache/kvmtrace"
VARIABLE = "KVMTRACE_CACHE_DIR"
"""Names another directory; empty: none."""

MAX_FILES = 16
MAX_BYTES = 4 << 20

_DAMAGED = "it is damaged"
_WRITABLE_BY_OTHERS = stat.S_IWGRP | stat.S_IWOTH


class ProgramCache:
    """JSON objects by name, in ``path``. Nothing here raises: what is not kept is made anew.

    ``owner``: who has to own it. ``trouble``: why something was not kept, or not believed, in words
    for people.
    """

    def __init__(self, path: str | None = None, owner: int = 0) -> None:
        if path is None:
            path = os.environ.get(VARIABLE, PATH)
        # Links are followed once, and what they lead to is judged.
        self.path = os.path.realpath(path) if path else ""
        self.trouble: str | None = None if path else f"{VARIABLE} is empty"
        self._owner = owner

    def read(self, name: str) -> Any | None:
        """The object ``name``; None if there is none that can be believed."""
        with self._directory() as directory:
            if directory is None:
                return None
            try:
                return self._read(directory, name)
            except FileNotFoundError:
                return None
            except OSError as error:
                self._distrust(name, error.strerror or str(error))
            except ValueError as error:
                self._distrust(name, str(error))
        return None

    def _read(self, directory: int, name: str) -> Any:
        """Raises OSError, and ValueError with the reason why it cannot be believed."""
        flags = os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC
        file = os.open(name, flags, dir_fd=directory)
        with open(file, "rb") as opened:
            found = os.fstat(file)
            if not stat.S_ISREG(found.st_mode) or not self._is_ours(found):
                raise ValueError("somebody else could have written it")
            checksum, _, text = opened.read(MAX_BYTES).partition(b"\n")
        if checksum != hashlib.sha256(text).hexdigest().encode():
            raise ValueError(_DAMAGED)
        try:
            return json.loads(text)
        except ValueError as error:
            raise ValueError(_DAMAGED) from error

    def distrust(self, name: str) -> None:
        """Say that the object ``name`` is not what it should be."""
        self._distrust(name, _DAMAGED)

    def write(self, name: str, found: Any) -> bool:
        """Keep an object, readable by its owner only; ``trouble`` says why that failed."""
        text = json.dumps(found).encode()
        with self._directory(make=True) as directory:
            if directory is None:
                return False
            temporary = f".{name}.{os.urandom(4).hex()}"
            try:
                file = os.open(
                    temporary,
                    os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW | os.O_CLOEXEC,
                    0o600,
                    dir_fd=directory,
                )
                with open(file, "wb") as opened:
                    opened.write(hashlib.sha256(text).hexdigest().encode() + b"\n" + text)
                os.rename(temporary, name, src_dir_fd=directory, dst_dir_fd=directory)
            except OSError as error:
                self.trouble = f"{self.path}: {error.strerror}"
                with contextlib.suppress(OSError):
                    os.unlink(temporary, dir_fd=directory)
                return False
            with contextlib.suppress(OSError):
                _remove_old(directory)
        return True

    def check_writable(self) -> None:
        """Say why nothing can be kept, if so."""
        with self._directory(make=True) as directory:
            if directory is not None and not os.access(".", os.W_OK, dir_fd=directory):
                self.trouble = f"nobody can write to {self.path}"

    def _distrust(self, name: str, why: str) -> None:
        self.trouble = f"{self.path}/{name} is not used: {why}"

    @contextlib.contextmanager
    def _directory(self, *, make: bool = False) -> Iterator[int | None]:
        """A descriptor of the directory; None if there is none that can be believed."""
        directory = self._open(make) if self.path else None
        try:
            yield directory
        finally:
            if directory is not None:
                os.close(directory)

    def _open(self, make: bool) -> int | None:
        failed = None
        if make:
            try:
                os.mkdir(self.path, 0o755)
            except FileExistsError:
                pass
            except OSError as error:
                failed = error.strerror
        above = os.path.dirname(self.path)
        while True:
            with contextlib.suppress(OSError):
                found = os.lstat(above)
                # In a sticky directory (/tmp) nobody moves what is another's.
                if not (self._is_ours(found, sticky=True) or _is_ours(found, 0, sticky=True)):
                    self.trouble = f"{self.path} is not used: {above} belongs to somebody else"
                    return None
            if above == os.path.dirname(above):
                break
            above = os.path.dirname(above)
        try:
            flags = os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC
            directory = os.open(self.path, flags)
        except FileNotFoundError:
            if make:
                self.trouble = f"{self.path} cannot be made: {failed}"
            return None
        except OSError as error:
            self.trouble = f"{self.path}: {error.strerror}"
            return None
        if self._is_ours(os.fstat(directory)):
            return directory
        os.close(directory)
        self.trouble = f"{self.path} is not used: somebody else could write there"
        return None

    def _is_ours(self, found: os.stat_result, *, sticky: bool = False) -> bool:
        return _is_ours(found, self._owner, sticky=sticky)


def _is_ours(found: os.stat_result, owner: int, *, sticky: bool) -> bool:
    """Whether nobody but ``owner`` can write. An ACL's mask shows as the group's bits."""
    writable = found.st_mode & _WRITABLE_BY_OTHERS
    return found.st_uid == owner and (
        not writable or (sticky and bool(found.st_mode & stat.S_ISVTX))
    )


def _remove_old(directory: int) -> None:
    """Keep the files that were written last."""
    files = [
        (os.stat(name, dir_fd=directory, follow_symlinks=False).st_mtime_ns, name)
        for name in os.listdir(directory)
    ]
    for _, name in sorted(files, reverse=True)[MAX_FILES:]:
        os.unlink(name, dir_fd=directory)
