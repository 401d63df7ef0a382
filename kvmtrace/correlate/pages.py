"""What the kernel's verdict on a poisoned page means: is it out of use, and if not, whose is it?

The words are those of ``action_page_types`` and ``action_name`` (mm/memory-failure.c; read in 6.1,
6.12 and 7.3), as memory_failure_event prints them. Recovered and Delayed: nobody gets at the page
any more. Ignored and Failed: its users go on using it.
"""

from __future__ import annotations

import functools
import re
from typing import Literal

# The page is: out of use; memory of a process or a file; the kernel's own; or nobody's that
# memory_failure could get hold of.
Verdict = Literal["handled", "process", "kernel", "unheld"]

# By name or, where the names could not be read, by number (enum mf_result).
_HANDLED = ("recovered", "delayed", "3", "2")
_LEFT = ("ignored", "failed", "0", "1")

# "reserved kernel page", "high-order kernel page", "kernel slab page"; zero pages are the kernel's
# although VMs have them mapped.
_KERNEL = re.compile(r"\b(kernel|reserved|slab|kmalloc|zero|page ?tables?)\b")

# What hwpoison_user_mappings and the handlers below it work on. A free page is none of these: it
# could not be taken off the free list because somebody got it meanwhile. guest_memfd's pages are
# LRU pages; its handler returns MF_DELAYED where 0 is expected, which makes "Failed" of a page that
# it keeps on purpose.
_USER = re.compile(
    r"^(?!free ).*\b"
    r"(lru|swapcache|mlocked|unevictable|thp|huge page|unmapping failed|guest_memfd)\b"
)


def is_verdict(page_type: str) -> bool:
    """False where the kernel only says that it had dealt with the page before."""
    return not page_type.startswith("already poisoned")


@functools.lru_cache(maxsize=256)
def verdict_on(page_type: str | None, result: str | None) -> Verdict | None:
    """What became of a page; None where the kernel's words do not say."""
    kind, outcome = (page_type or "").lower(), (result or "").lower()
    if not kind or not is_verdict(kind):
        return None
    if outcome in _HANDLED:
        return "handled"
    if outcome not in _LEFT or kind.isdigit():
        return None
    if _KERNEL.search(kind):
        return "kernel"
    return "process" if _USER.search(kind) else "unheld"
