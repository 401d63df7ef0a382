"""Which source ``--source auto`` takes, and why: the one that sees more of what matters."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import dataclass

from kvmtrace.probes import NO_KVM, Probe, context_specs
from kvmtrace.wording import some_of

# The most important first: exits, then poison, then what else notifies the VMM.
_IMPORTANCE = ("run", "poison", "sigbus_forced", "sigbus", "gmem_error", "gmem", "faultin")
_INDISPENSABLE = _IMPORTANCE[:2]
_MAX_NAMED = 3


@dataclass(frozen=True, slots=True)
class Attempt:
    """The outcome of opening a source: its probes, or why it ``refused`` and a ``hint``.

    ``detail``: the message of a library or of the kernel, word for word.
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
        """Names of probes that are not attached, but might be by another source.

        Without those that wait for kvm, and those for which this kernel has no target.
        """
        return tuple(
            probe.name
            for probe in self.probes
            if not probe.attached
            and probe.why != NO_KVM
            and (probe.target is not None or probe.name in _INDISPENSABLE)
        )


def choose(attempts: Sequence[Attempt]) -> tuple[Attempt, str] | None:
    """The attempt to use, and the reason in words; None if all refused.

    ``attempts`` in order of preference, which decides between two that see equally much.
    """
    working = [attempt for attempt in attempts if attempt.refused is None]
    if not working:
        return None
    first = attempts[0]
    complete = first.refused is None and not first.missing
    best = first if complete else max(working, key=_coverage)
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


def _coverage(attempt: Attempt) -> tuple[bool | int, ...]:
    # Context probes that only one source has are no reason to prefer it.
    expected = attempt.attached - {spec.name for spec in context_specs()}
    return (*(name in expected for name in _IMPORTANCE), len(expected))


def _listed(names: Collection[str]) -> str:
    """The most important by name, the others as a number; "" for none."""
    order = {name: rank for rank, name in enumerate(_IMPORTANCE)}
    ordered = sorted(names, key=lambda name: (order.get(name, len(order)), name))
    return some_of(ordered, _MAX_NAMED, "")
