"""Who may change a file: the programs and settings that root takes must be root's alone."""

from __future__ import annotations

import os
import stat


def others_may_write(path: str) -> str | None:
    """The part of a path by which others than root may change the file; None if there is none.

    Symbolic links are followed. Directories count: who may rename in one, may replace what is in
    it. A sticky directory lets others do that with their own files only. Nobody writes to a
    file system that is mounted read-only. Raises OSError.
    """
    path = os.path.realpath(path)
    parts = [path]
    while (parent := os.path.dirname(parts[-1])) != parts[-1]:
        parts.append(parent)
    for part in parts:
        found = os.stat(part)
        is_sticky = stat.S_ISDIR(found.st_mode) and found.st_mode & stat.S_ISVTX
        is_shared = found.st_mode & (stat.S_IWGRP | stat.S_IWOTH) and not is_sticky
        if (found.st_uid != 0 or is_shared) and not os.statvfs(part).f_flag & os.ST_RDONLY:
            return part
    return None
