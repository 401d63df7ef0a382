"""Poisoned pages whose incidents had no room: that they are, and whose, outlives what happened.

An all-clear is never made by forgetting. A page is known by its place in a VM, or by its number.
"""

from __future__ import annotations

from collections import Counter

from kvmtrace.bounded import BoundedDict
from kvmtrace.events import Owner

# Whose: a VM's key, None for the kernel.
_Key = tuple[int | None, int]


class Forgotten:
    """At most ``limit`` pages; of further ones only how many of them each VM and the kernel has."""

    def __init__(self, limit: int) -> None:
        self._keys: BoundedDict[_Key, int | None] = BoundedDict(limit, self._count_only)
        self._more: Counter[int | None] = Counter()

    def counts(self) -> Counter[int | None]:
        """{VM, None for the kernel: pages}."""
        return Counter(of for of, _ in self._keys) + self._more

    def forget(self, owner: Owner | None, pfn: int | None) -> None:
        """No incident remembers this page of a VM, or of the kernel."""
        self._keys[_key(owner, pfn)] = pfn

    def _count_only(self, key: _Key, _: int | None) -> None:
        self._more[key[0]] += 1

    def remember(self, owner: Owner | None, pfn: int | None) -> None:
        """An incident knows of it again."""
        self._keys.pop(_key(owner, pfn), None)
        if pfn is not None and owner is not None:
            self._keys.pop(_key(Owner(owner.vm, None), pfn), None)

    def mended(self, pfn: int, vm: int | None = None) -> None:
        """The page is no longer poisoned, or ``vm`` has another one in its place."""
        for key in [key for key, of in self._keys.items() if of == pfn]:
            if vm in (None, key[0]):
                del self._keys[key]

    def leave(self, vm: int) -> None:
        """The VM is gone, and no longer has any."""
        self._more.pop(vm, None)
        for key in [key for key in self._keys if key[0] == vm]:
            del self._keys[key]


def _key(owner: Owner | None, pfn: int | None) -> _Key:
    if owner is None:
        return None, pfn or 0
    return owner.vm, owner.gfn if owner.gfn is not None else -1 - (pfn or 0)
