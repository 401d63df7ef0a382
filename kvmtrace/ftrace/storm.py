"""Storms: exits that come too often to be told one by one are muted in the ring, not in the count.

A key that storms is excluded by the events' own filters, so that it costs neither room in the ring
nor our time; the hist triggers, which do not look at the events' filter, go on counting it. When
it has been quiet for a while its events are let through again.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass

from kvmtrace import kvm
from kvmtrace.ftrace.hist import ExitKey

RATE = 200  # events of one key between two readings of the counts (one second)
QUIET_READINGS = 3
MAX_MUTED = 32


@dataclass(slots=True)
class _Muted:
    struct: int
    total: int
    quiet: int = 0


class Storms:
    """Which keys are muted. ``changed`` says that the filters have to be written again."""

    def __init__(self) -> None:
        self._window: Counter[ExitKey] = Counter()
        self._muted: dict[ExitKey, _Muted] = {}
        self.changed = False

    def __bool__(self) -> bool:
        return bool(self._muted)

    def event(self, key: ExitKey, struct: int) -> None:
        """An event of this key came, in the VM at ``struct``."""
        self._window[key] += 1
        if self._window[key] >= RATE and key not in self._muted and len(self._muted) < MAX_MUTED:
            self._muted[key] = _Muted(struct, 0)
            self.changed = True

    def reading(self, totals: Mapping[ExitKey, int]) -> None:
        """The counts were read: keys that have been quiet are heard again."""
        self._window.clear()
        for key, muted in list(self._muted.items()):
            total = totals.get(key, 0)
            muted.quiet = muted.quiet + 1 if total == muted.total else 0
            muted.total = total
            if muted.quiet >= QUIET_READINGS:
                del self._muted[key]
                self.changed = True

    def gone(self, struct: int) -> None:
        """The VM is gone; its addresses may be another's soon."""
        for key in [key for key, muted in self._muted.items() if muted.struct == struct]:
            del self._muted[key]
            self.changed = True

    def in_vm(self, struct: int) -> bool:
        """Whether some key of this VM is muted."""
        return any(muted.struct == struct for muted in self._muted.values())

    def mutes(self, struct: int, gfn: int) -> bool:
        """Whether faults of this page are not heard of."""
        return any(
            muted.struct == struct and key.gpa is not None and kvm.gfn_of(key.gpa) == gfn
            for key, muted in self._muted.items()
        )

    def conditions(self) -> dict[str, str]:
        """{event: what to add to its filter}."""
        run, gmem, faultin = [], [], []
        for key, muted in self._muted.items():
            if key.gpa is None:
                run.append(f"vcpu == {key.vcpu:#x} && ret == {key.ret} && reason == {key.reason}")
                continue
            gfn = kvm.gfn_of(key.gpa)
            run.append(f"vcpu == {key.vcpu:#x} && ret == {key.ret} && gpa == {key.gpa:#x}")
            gmem.append(f"kvm == {muted.struct:#x} && gfn == {gfn:#x}")
            faultin.append(f"vcpu == {key.vcpu:#x} && ret == {key.ret} && gfn == {gfn:#x}")
        found = {"run": run, "gmem": gmem, "faultin": faultin}
        return {
            event: "".join(f" && !({one})" for one in dict.fromkeys(excluded))
            for event, excluded in found.items()
        }
