"""Muting: keep keys that come too often out of the ring, while the kernel goes on counting them.

A muted key is excluded by the events' own filters, so that it takes no room in the ring and none of
our time. Hist triggers do not look at these filters, and go on counting. A key that has been quiet
for a while is let through again.
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
    """Which keys are muted. ``changed``: the filters have to be written again."""

    def __init__(self) -> None:
        self._window: Counter[K] = Counter()
        self._muted: dict[K, _Muted] = {}
        self.changed = False
        self.counted = True
        """The kernel counts these keys; otherwise muting would lose them."""
        self.refused = False
        """The kernel refused a filter: nothing is muted any more."""

    def __bool__(self) -> bool:
        return bool(self._muted)

    def __contains__(self, key: K) -> bool:
        return key in self._muted

    def event(self, key: K, struct: int | None) -> None:
        """Count an event of this key, of the VM at address ``struct``; mute the key if needed."""
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

    def update_totals(self, totals: Mapping[K, int]) -> None:
        """Let keys through again that have been quiet. ``totals``: the kernel's counts, just read.

        Keys without an entry in them are let through, too: only their events count them.
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
        """The kernel refused the filters: let all keys through, and mute none from now on."""
        self._muted.clear()
        self.refused = True

    def forget_vm(self, struct: int) -> None:
        """Forget a destroyed VM: its addresses may be another VM's soon."""
        for key in [key for key, muted in self._muted.items() if muted.struct == struct]:
            del self._muted[key]
            self.changed = True

    def any_muted_in(self, struct: int) -> bool:
        """Whether some key of this VM is muted."""
        return any(muted.struct == struct for muted in self._muted.values())


class ExitMuting(Muting[ExitKey]):
    """Muting of failed exits."""

    def is_muted(self, struct: int, gfn: int) -> bool:
        """Whether the faults of a page are muted."""
        return any(
            muted.struct == struct and key.gpa is not None and kvm.gfn_of(key.gpa) == gfn
            for key, muted in self._muted.items()
        )

    def conditions(self) -> dict[str, list[str]]:
        """{event: conditions of what to exclude from it}."""
        found: dict[str, list[str]] = {"run": [], "gmem": [], "faultin": []}
        # In it, a call that bypassed ``run`` looks like a muted one.
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
    """Muting of signals, and of the faults and exits that come with them."""

    def __init__(self) -> None:
        super().__init__()
        self._faults: dict[SignalKey, tuple[int, int]] = {}
        self._returns: dict[SignalKey, int] = {}

    def fault(self, key: SignalKey, vcpu: int, gfn: int) -> None:
        """Exclude the fault that a muted signal was sent from."""
        if key in self._muted and key not in self._faults:
            self._faults[key] = (vcpu, gfn)
            self.changed = True

    def returned(self, key: SignalKey, vcpu: int) -> None:
        """Exclude the return from KVM_RUN that a muted signal leads to."""
        if key in self._muted and key not in self._returns:
            self._returns[key] = vcpu
            self.changed = True

    def conditions(self) -> dict[str, list[str]]:
        """{event: conditions of what to exclude from it}."""
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
    """{event: what to add to its filter}, from several ``conditions``."""
    found: dict[str, dict[str, None]] = {}
    for one in conditions:
        for event, excluded in one.items():
            found.setdefault(event, {}).update(dict.fromkeys(excluded))
    return {
        event: "".join(f" && !({one})" for one in excluded) for event, excluded in found.items()
    }
