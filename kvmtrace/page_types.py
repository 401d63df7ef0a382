"""What the words of memory_failure_event mean: what kind of page, and what became of it.

The words are those of ``action_page_types`` and ``action_name`` (mm/memory-failure.c; read in 6.1,
6.12 and 7.3), as memory_failure_event prints them. Recovered and Delayed: nobody gets at the page
any more. Ignored and Failed: its users go on using it.
"""

from __future__ import annotations

import functools
import re
from enum import StrEnum

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

_ALREADY = "already poisoned"
# The kernel does not count these (action_result): no page was lost by them.
_UNCOUNTED = (_ALREADY, "non struct page")


class PageOutcome(StrEnum):
    """What became of a poisoned page."""

    HANDLED = "handled"  # it is out of use
    PROCESS = "process"  # a process or a file still uses it
    KERNEL = "kernel"  # the kernel's own
    UNHELD = "unheld"  # memory_failure could not get hold of it


def is_verdict(page_type: str) -> bool:
    """Whether the kernel judged the page; False if it had already dealt with it before."""
    return not page_type.startswith(_ALREADY)


def is_newly_lost(page_type: str) -> bool:
    """Whether a page was lost that was not lost before."""
    return not page_type.startswith(_UNCOUNTED)


def is_huge(page_type: str) -> bool:
    """Whether the page is of hugetlb, and lost as a whole; the kernel splits other huge pages."""
    return "huge page" in page_type


def is_of_a_device(page_type: str) -> bool:
    """Whether the page is no RAM that another process would get in its place.

    The kernel's MF_MSG_DAX and MF_MSG_PFN_MAP.
    """
    return page_type.startswith(("dax", "non struct page"))


@functools.lru_cache(maxsize=256)
def outcome_of(page_type: str | None, result: str | None) -> PageOutcome | None:
    """What became of a page; None where the kernel's words do not show it."""
    kind, result = (page_type or "").lower(), (result or "").lower()
    if not kind or not is_verdict(kind):
        return None
    if result in _HANDLED:
        return PageOutcome.HANDLED
    if result not in _LEFT or kind.isdigit():
        return None
    if _KERNEL.search(kind):
        return PageOutcome.KERNEL
    return PageOutcome.PROCESS if _USER.search(kind) else PageOutcome.UNHELD
