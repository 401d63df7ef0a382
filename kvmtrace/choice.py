"""Which source ``--source auto`` takes: the one that sees more of what a watch is for, and why."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import dataclass

from kvmtrace.probes import NO_KVM, Probe, context_specs

# What a watch is for comes first: exits, then poison, then what else notifies the VMM.
_WEIGHT = ("run", "poison", "sigbus_forced", "sigbus", "gmem_error", "gmem", "faultin")
_INDISPENSABLE = _WEIGHT[:2]
_NAMED = 3


@dataclass(frozen=True, slots=True)
class Attempt:
    """The outcome of opening a source: its probes, or why it ``refused`` and a ``hint``.

    ``detail``: what a library or the kernel said of it, word for word.
    """

    kind: str
    probes: tuple[Probe, ...] = ()
    refused: str | None = None
    hint: str = ""
    detail: str | None = None

    @property
    def sees_exits(self) -> bool:
        """Whether KVM_RUN's return is probed."""
        return "run" in self.attached

    @property
    def attached(self) -> frozenset[str]:
        return frozenset(probe.name for probe in self.probes if probe.attached)

    @property
    def missing(self) -> tuple[str, ...]:
        """Names of probes that are not attached and that another source may be able to attach.

        Not of those that wait for kvm, or have no place in this kernel.
        """
        return tuple(
            probe.name
            for probe in self.probes
            if not probe.attached
            and probe.why != NO_KVM
            and (probe.target is not None or probe.name in _INDISPENSABLE)
        )


def choose(attempts: Sequence[Attempt]) -> tuple[Attempt, str] | None:
    """The one to take and the reason, for people; None where all refused.

    ``attempts`` in order of preference, which decides where two see as much.
    """
    works = [attempt for attempt in attempts if attempt.refused is None]
    if not works:
        return None
    first = attempts[0]
    complete = first.refused is None and not first.missing
    best = first if complete else max(works, key=_sight)
    missing = _listed(best.missing)
    if first.refused is not None:
        return best, f"{first.kind} does not work here: {first.refused}"
    if best is not first:
        why = f"{first.kind} does not see {_listed(best.attached - first.attached)} here"
        return best, f"{why}; without {missing}" if missing else why
    if any(name in _INDISPENSABLE for name in best.missing):
        return best, f"{best.kind} sees most here, but not {missing}"
    why = f"{best.kind} works here"
    return best, f"{why}, without {missing}" if missing else why


def _sight(attempt: Attempt) -> tuple[bool | int, ...]:
    # Context that only one of them has is no reason to prefer it.
    expected = attempt.attached - {spec.name for spec in context_specs()}
    return (*(name in expected for name in _WEIGHT), len(expected))


def _listed(names: Collection[str]) -> str:
    """The weightiest by name, the others by number; "" for none."""
    order = {name: place for place, name in enumerate(_WEIGHT)}
    ordered = sorted(names, key=lambda name: (order.get(name, len(order)), name))
    shown = ", ".join(ordered[:_NAMED])
    more = len(ordered) - _NAMED
    return f"{shown} and {more} more" if more > 0 else shown
