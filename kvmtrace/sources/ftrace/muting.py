"""Storms: what comes too often to be reported one by one is muted in the ring, not in the count.

A key that storms is excluded by the events' own filters, so that it costs neither room in the ring
nor our time; the hist triggers, which do not look at the events' filter, go on counting it. When
it has been quiet for a while its events are let through again.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Hashable, Mapping
from dataclasses import dataclass
from typing import Generic, TypeVar

from kvmtrace import kvm
from kvmtrace.sources.ftrace.totals import ExitKey, SignalKey
from kvmtrace.sources.limits import MAX_MUTED, MUTE_AFTER, QUIET_READINGS

K = TypeVar("K", bound=Hashable)


@dataclass(slots=True)
class _Muted:
    struct: int | None
    total: int
    quiet: int = 0


class Muting(Generic[K]):
    """Which keys are muted. ``changed`` says that the filters have to be written again."""

    def __init__(self) -> None:
        self._window: Counter[K] = Counter()
        self._muted: dict[K, _Muted] = {}
        self.changed = False
        self.counted = True
        """The kernel counts these: without that, muting would lose them."""
        self.refused = False
        """The kernel did not take a filter: nothing is muted any more."""

    def __bool__(self) -> bool:
        return bool(self._muted)

    def __contains__(self, key: K) -> bool:
        return key in self._muted

    def event(self, key: K, struct: int | None) -> None:
        """An event of this key came, in the VM at ``struct``."""
        self._window[key] += 1
        if (
            self._window[key] >= MUTE_AFTER
            and key not in self._muted
            and len(self._muted) < MAX_MUTED
            and self.counted
            and not self.refused
        ):
            self._muted[key] = _Muted(struct, 0)
            self.changed = True

    def reading(self, totals: Mapping[K, int]) -> None:
        """The counts were read: keys that have been quiet are let through again.

        So are those that the kernel has no entry for, since nothing but their events counts them.
        """
        self._window.clear()
        for key, muted in list(self._muted.items()):
            total = totals.get(key, 0)
            muted.quiet = muted.quiet + 1 if total == muted.total else 0
            muted.total = total
            if muted.quiet >= QUIET_READINGS or key not in totals:
                del self._muted[key]
                self.changed = True

    def refuse(self) -> None:
        """The kernel refused the filters that were to mute these: all come through."""
        self._muted.clear()
        self.refused = True

    def gone(self, struct: int) -> None:
        """The VM is gone; its addresses may be another's soon."""
        for key in [key for key, muted in self._muted.items() if muted.struct == struct]:
            del self._muted[key]
            self.changed = True

    def in_vm(self, struct: int) -> bool:
        """Whether some key of this VM is muted."""
        return any(muted.struct == struct for muted in self._muted.values())


class ExitMuting(Muting[ExitKey]):
    """Of failed exits."""

    def mutes(self, struct: int, gfn: int) -> bool:
        """Whether faults of this page are muted."""
        return any(
            muted.struct == struct and key.gpa is not None and kvm.gfn_of(key.gpa) == gfn
            for key, muted in self._muted.items()
        )

    def conditions(self) -> dict[str, list[str]]:
        """{event: what to leave out of it}."""
        found: dict[str, list[str]] = {"run": [], "gmem": [], "faultin": []}
        # For it a call that ``run`` was not there for looks like one that is muted.
        found["run_under_way"] = ["errno < 0"] if self._muted else []
        for key, muted in self._muted.items():
            ret = f"vcpu == {key.vcpu:#x} && ret == {key.ret}"
            if key.gpa is None:
                found["run"].append(f"{ret} && reason == {key.reason}")
                continue
            gfn = kvm.gfn_of(key.gpa)
            found["run"].append(f"{ret} && gpa == {key.gpa:#x}")
            found["gmem"].append(f"kvm == {muted.struct:#x} && gfn == {gfn:#x}")
            found["faultin"].append(f"{ret} && gfn == {gfn:#x}")
        return found


class SignalMuting(Muting[SignalKey]):
    """Of signals, and the faults in which KVM sends them."""

    def __init__(self) -> None:
        super().__init__()
        self._faults: dict[SignalKey, tuple[int, int]] = {}
        self._returns: dict[SignalKey, int] = {}

    def fault(self, key: SignalKey, vcpu: int, gfn: int) -> None:
        """The fault that such a signal was sent from."""
        if key in self._muted and key not in self._faults:
            self._faults[key] = (vcpu, gfn)
            self.changed = True

    def returned(self, key: SignalKey, vcpu: int) -> None:
        """The vCPU that left KVM_RUN for such a signal."""
        if key in self._muted and key not in self._returns:
            self._returns[key] = vcpu
            self.changed = True

    def conditions(self) -> dict[str, list[str]]:
        """{event: what to leave out of it}."""
        found: dict[str, list[str]] = {"sigbus": [], "sigbus_forced": [], "faultin": [], "run": []}
        self._returns = {key: at for key, at in self._returns.items() if key in self._muted}
        found["run"] = [f"vcpu == {vcpu:#x} && ret == -4" for vcpu in self._returns.values()]
        self._faults = {key: at for key, at in self._faults.items() if key in self._muted}
        for key in self._muted:
            tid = "tid" if key.probe == "sigbus" else "common_pid"
            found[key.probe].append(f"{tid} == {key.tid} && addr == {key.addr:#x}")
            if key in self._faults:
                vcpu, gfn = self._faults[key]
                found["faultin"].append(f"vcpu == {vcpu:#x} && ret >= 0 && gfn == {gfn:#x}")
        return found


def exclusions(*conditions: Mapping[str, list[str]]) -> dict[str, str]:
    """{event: what to add to its filter}, from several storms."""
    found: dict[str, dict[str, None]] = {}
    for one in conditions:
        for event, excluded in one.items():
            found.setdefault(event, {}).update(dict.fromkeys(excluded))
    return {
        event: "".join(f" && !({one})" for one in excluded) for event, excluded in found.items()
    }
