"""Whether a thread hangs, or is only slow.

On a busy or emulated machine an orderly end takes seconds, in many small steps; a thread that hangs
in the kernel takes none.
"""

from __future__ import annotations

import sys
import time


class Standstill:
    """Looks at a thread of Python now and then; ``ident`` as ``threading.Thread.ident``."""

    def __init__(self, ident: int | None) -> None:
        self._ident = ident
        self._at: tuple[int, int] | None = None
        self._since = time.monotonic()

    def seconds(self) -> float:
        """How long it has been seen at one and the same instruction."""
        frame = sys._current_frames().get(self._ident or 0)
        at = (id(frame), frame.f_lasti) if frame is not None else None
        if at != self._at:
            self._at, self._since = at, time.monotonic()
        return time.monotonic() - self._since
