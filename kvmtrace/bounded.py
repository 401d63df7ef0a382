"""A mapping that forgets its oldest entries."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable
from typing import TypeVar

K = TypeVar("K")
V = TypeVar("V")


class BoundedDict(OrderedDict[K, V]):
    """A mapping of at most ``limit`` keys: a new one beyond them drops the oldest.

    ``on_drop``: called with each key and value that is dropped so. To assign to a key that is there
    does not make it newer; ``renew`` does.
    """

    def __init__(self, limit: int, on_drop: Callable[[K, V], None] | None = None) -> None:
        super().__init__()
        self._limit = limit
        self._on_drop = on_drop

    def __setitem__(self, key: K, value: V) -> None:
        super().__setitem__(key, value)
        while len(self) > self._limit:
            dropped = self.popitem(last=False)
            if self._on_drop is not None:
                self._on_drop(*dropped)

    def renew(self, key: K, value: V) -> None:
        """Assign ``value`` and make ``key`` the newest."""
        if key in self:
            super().__setitem__(key, value)
            self.move_to_end(key)
        else:
            self[key] = value
