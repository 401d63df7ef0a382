"""Hits that kprobe events missed: no instance was left, or the CPU was in another kprobe."""

from __future__ import annotations

import re

from kvmtrace.linux.read import read_text

_EVENT = re.compile(r"^[pr]\d*:(\S+) ", re.MULTILINE)
_PROFILE = re.compile(r"^ +(\S+) +\d+ +(\d+)$", re.MULTILINE)


class Missed:
    """Missed hits of one group's events in tracefs ``root``. fprobe events do not count them."""

    def __init__(self, root: str, group: str) -> None:
        self._root = root
        self._prefix = f"{group}/"
        self._last: dict[str, int] = {}

    def newly_missed(self) -> int:
        """How many hits were missed since the last call."""
        now = self._now()
        found = sum(max(0, count - self._last.get(name, 0)) for name, count in now.items())
        self._last = now
        return found

    def _now(self) -> dict[str, int]:
        events = _EVENT.findall(read_text(f"{self._root}/kprobe_events"))
        profile = _PROFILE.findall(read_text(f"{self._root}/kprobe_profile"))
        # The profile lacks the groups. Both files list the same events in the same order
        # (kernel/trace/trace_dynevent.c), unless one was added or removed in between.
        if [event.rpartition("/")[2] for event in events] != [name for name, _ in profile]:
            return self._last
        return {
            event: int(missed)
            for event, (_, missed) in zip(events, profile, strict=True)
            if event.startswith(self._prefix)
        }
