"""Poisoned pages whose incidents had no room.

That a VM has a poisoned page is remembered longer than what happened to it: no VM may look healthy
because its incident was forgotten. A page is identified by its place in a VM, or by its pfn.
"""

from __future__ import annotations

from collections import Counter

from kvmtrace.bounded import BoundedDict
from kvmtrace.events import Owner

# A VM's key or None for the kernel; the gfn, or a number made of the pfn.
_Key = tuple[int | None, int]


class Forgotten:
    """At most ``limit`` pages; further ones are only counted, for each VM and the kernel."""

    def __init__(self, limit: int) -> None:
        self._keys: BoundedDict[_Key, int | None] = BoundedDict(limit, self._count_only)
        self._more: Counter[int | None] = Counter()

    def counts(self) -> Counter[int | None]:
        """{VM key, None for the kernel: pages}."""
        return Counter(of for of, _ in self._keys) + self._more

    def add(self, owner: Owner | None, pfn: int | None) -> None:
        """Keep a page of a VM (``owner``) or of the kernel whose incident was dropped."""
        self._keys[_key(owner, pfn)] = pfn

    def _count_only(self, key: _Key, _: int | None) -> None:
        self._more[key[0]] += 1

    def discard(self, owner: Owner | None, pfn: int | None) -> None:
        """Drop a page that an incident has again."""
        self._keys.pop(_key(owner, pfn), None)
        if pfn is not None and owner is not None:
            self._keys.pop(_key(Owner(owner.vm, None), pfn), None)

    def discard_pfn(self, pfn: int, vm: int | None = None) -> None:
        """Drop a page that is no longer poisoned, or that ``vm`` replaced by another one."""
        for key in [key for key, of in self._keys.items() if of == pfn]:
            if vm in (None, key[0]):
                del self._keys[key]

    def clear(self) -> None:
        """Drop all pages: the host was rebooted."""
        self._keys.clear()
        self._more.clear()

    def discard_vm(self, vm: int) -> None:
        """Drop all pages of a VM that is gone."""
        self._more.pop(vm, None)
        for key in [key for key in self._keys if key[0] == vm]:
            del self._keys[key]


def _key(owner: Owner | None, pfn: int | None) -> _Key:
    if owner is None:
        return None, pfn or 0
    return owner.vm, owner.gfn if owner.gfn is not None else -1 - (pfn or 0)
