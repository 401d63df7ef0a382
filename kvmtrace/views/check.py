"""A host in one line for monitors that run plugins: state, summary and numbers.

As the Monitoring Plugins Development Guidelines ask: ``SERVICE STATE - text | label=value …``, and
the exit status is the state.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass
from enum import IntEnum
from typing import Any

from kvmtrace.judgement.actions import actions, named
from kvmtrace.judgement.urgency import Level, Urgency, by_urgency, host_urgency, urgency_of
from kvmtrace.model import Incident, Snapshot
from kvmtrace.views.answer import answer
from kvmtrace.views.format import age_of, counted, listed
from kvmtrace.views.not_known import kernel_difference

SERVICE = "KVMTRACE"


class CheckState(IntEnum):
    """The state of a service; its number is the exit status of the command."""

    OK = 0
    WARNING = 1
    CRITICAL = 2
    UNKNOWN = 3


@dataclass(frozen=True, slots=True)
class CheckResult:
    """The state of a host and why.

    ``numbers``: {label: value}; the value of one that only grows ends in ``c``.
    """

    state: CheckState
    summary: str
    numbers: dict[str, str]

    def line(self) -> str:
        """The one line. A bar begins the numbers, so the summary has none."""
        summary = " ".join(self.summary.replace("|", "/").split())
        text = f"{SERVICE} {self.state.name} - {summary}"
        numbers = " ".join(f"{label}={value}" for label, value in self.numbers.items())
        return f"{text} | {numbers}" if numbers else text

    def as_object(self) -> dict[str, Any]:
        return {
            "state": self.state.name.lower(),
            "status": int(self.state),
            "summary": self.summary,
            "numbers": {label: int(value.rstrip("c")) for label, value in self.numbers.items()},
        }


def unknown(why: str) -> CheckResult:
    """A host that could not be checked."""
    return CheckResult(CheckState.UNKNOWN, why, {})


def check(snapshot: Snapshot, now: int, lost: Mapping[str, int]) -> CheckResult:
    """Judge a host at ``now``: critical if somebody must act now, warning if soon.

    ``lost``: what was lost lately, {where: count}. What was lost long ago is only counted.
    """
    here = [one for one in snapshot.incidents if urgency_of(one) != Urgency.CLOSED]
    worst = host_urgency(snapshot)
    level = worst.level if worst is not None else None
    gaps = _gaps(snapshot, lost)
    if level == Level.NOW:
        state = CheckState.CRITICAL
    elif level == Level.SOON or gaps:
        state = CheckState.WARNING
    else:
        state = CheckState.OK
    parts = [_incidents(by_urgency(here), snapshot, now), *gaps]
    return CheckResult(state, "; ".join(parts), _numbers(here, snapshot))


def _incidents(here: list[Incident], snapshot: Snapshot, now: int) -> str:
    """What is worst and what to do about it, and how many others there are."""
    if not here and snapshot.kernel_pages:
        pages = counted(snapshot.kernel_pages, "poisoned page")
        return f"the host can go down at any time: its kernel may use {pages}"
    if not here:
        age = ""
        if snapshot.since is not None:
            age = f", watching for {age_of(snapshot.since, now, snapshot.steps)}"
        return f"no poisoned page of a VM is known{age}"
    counts = Counter(urgency_of(one) for one in here)
    if urgency_of(here[0]).level not in (Level.NOW, Level.SOON):
        return f"nothing urgent: {_counts(counts)}"
    first = named(here[0], snapshot)
    todo = actions(first, snapshot)[0].brief
    text = f"{urgency_of(first).value}: {answer(first, snapshot, now).rstrip('.')}: {todo}"
    text += f" ({first.id})"
    counts.subtract([urgency_of(first)])
    return f"{text}; and {_counts(counts)}" if here[1:] else text


def _counts(urgencies: Counter[Urgency]) -> str:
    """``1 stopped, 5 latent``."""
    ordered = sorted(urgencies.items(), key=lambda one: one[0].rank)
    return listed(f"{count} {urgency.value}" for urgency, count in ordered if count)


def _gaps(snapshot: Snapshot, lost: Mapping[str, int]) -> list[str]:
    """Why something may have gone unseen."""
    gaps = []
    if off := [probe.name for probe in snapshot.probes if not probe.attached]:
        gaps.append(f"not attached: {listed(off)}")
    if places := listed((f"{count} at {where}" for where, count in sorted(lost.items())), ""):
        gaps.append(f"lost within an hour: {places}")
    if snapshot.kernel is not None and snapshot.kernel.missed:
        gaps.append(f"memory failures: {kernel_difference(snapshot)}")
    return gaps


def _numbers(here: list[Incident], snapshot: Snapshot) -> dict[str, str]:
    urgencies = Counter(urgency_of(one) for one in here)
    live = [vm for vm in snapshot.vms.values() if not vm.gone]
    numbers = {
        urgency.value: str(urgencies[urgency]) for urgency in Urgency if urgency != Urgency.CLOSED
    }
    return numbers | {
        "vms": str(len(live)),
        "poisoned_pages": str(sum(vm.poisoned_pages for vm in live)),
        "kernel_poisoned_pages": str(snapshot.kernel_pages),
        "probes_missing": str(sum(not probe.attached for probe in snapshot.probes)),
        "lost": f"{sum(snapshot.lost.values())}c",
    }
