"""``kvmtrace doctor``: what this host offers, what is missing, and how to fix it.

The report is made of facts only (``host.Facts``, and the outcome of opening each source), so that
every verdict can be tested without such a host.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, replace

from kvmtrace import __version__
from kvmtrace.linux.host import Facts
from kvmtrace.probes import ProbeSpec, specs
from kvmtrace.source_choice import Attempt, choose
from kvmtrace.views.doctor_host import KeptPrograms, NotifiedVmm, host_checks, memory_failure_checks
from kvmtrace.views.doctor_report import PROBE, Check, Report

_TO_ATTACH = ("privilege", "lockdown", "tracefs", "poison's names", "bcc", "eBPF programs")


@dataclass(frozen=True, slots=True)
class Serving:
    """The ``kvmtrace serve`` that runs on this host, of ``version`` (None: not known)."""

    pid: int
    version: str | None


def judge(
    facts: Facts,
    attempts: Sequence[Attempt],
    programs: KeptPrograms | None = None,
    *,
    serving: Serving | None = None,
    vmms: Sequence[NotifiedVmm] = (),
) -> Report:
    """The report on a host. ``attempts`` in order of preference; of ``serving``, its own only."""
    choice = choose(attempts)
    chosen = choice[0] if choice else None
    seen = chosen is not None and chosen.sees_exits
    ok = seen and facts.types.memory_fault_exit is True
    if ok and chosen and serving:
        verdict = f"memory-fault exits are seen here, by {chosen.kind} of kvmtrace serve"
    elif ok and chosen:
        verdict = f"memory-fault exits can be seen here, by {chosen.kind}"
    elif seen and facts.types.memory_fault_exit is False:
        verdict = "this kernel has no memory-fault exit; poison and SIGBUS can be seen"
    elif seen:
        verdict = "KVM_RUN can be watched, but whether it reports memory faults is not known"
    else:
        verdict = "memory-fault exits cannot be seen here"
    checks = list(host_checks(facts, programs))
    if serving and seen:
        # What a command would need to attach on its own is no fault where none has to.
        checks = [
            replace(one, ok=None, fix="") if one.name in _TO_ATTACH and not one.ok else one
            for one in checks
        ]
    checks += memory_failure_checks(facts.memory_failure, vmms)
    if serving:
        checks.append(_serve_check(serving))
    checks += [*_source_checks(attempts), *_probe_checks(facts, chosen)]
    return Report(tuple(_each_cure_once(checks)), tuple(attempts), ok, verdict)


def _each_cure_once(checks: Iterable[Check]) -> Iterator[Check]:
    """Refer to the first check that names a cure instead of naming it again."""
    first: dict[str, str] = {}
    for check in checks:
        cure = None if check.name.startswith(PROBE) else check.cure
        if cure and first.setdefault(cure, check.name) != check.name:
            yield replace(check, fix=f"see {first[cure]}")
        else:
            yield check


def _serve_check(serving: Serving) -> Check:
    version = f", kvmtrace {serving.version}" if serving.version else ""
    found = f"runs (pid {serving.pid}{version}); what follows are its probes"
    if serving.version not in (None, __version__):
        return Check("serve", None, found, f"restart it: this is kvmtrace {__version__}")
    return Check("serve", True, found)


def _source_checks(attempts: Sequence[Attempt]) -> Iterator[Check]:
    # One working source is enough: then errors of the other one are notes.
    works = any(attempt.refused is None for attempt in attempts)
    for attempt in attempts:
        if attempt.refused is not None:
            yield Check(
                f"source {attempt.kind}",
                None if works else False,
                attempt.refused,
                attempt.hint,
                attempt.detail,
            )
        else:
            attached = sum(probe.attached for probe in attempt.probes)
            found = f"{attached} of {len(attempt.probes)} probes"
            yield Check(f"source {attempt.kind}", True, found)
    choice = choose(attempts)
    if len(attempts) > 1 and choice is not None:
        chosen, why = choice
        yield Check("--source auto", True, f"{chosen.kind} ({why})")


def _probe_checks(facts: Facts, chosen: Attempt | None) -> Iterator[Check]:
    states = {probe.name: probe for probe in chosen.probes} if chosen else {}
    for spec in specs(facts.machine):
        state = states.get(spec.name)
        missing = f"not seen without it: {spec.without}"
        if state is None:
            yield Check(f"{PROBE}{spec.name}", False, _untried(spec, facts), missing)
        elif state.attached:
            via = f" ({state.via})" if state.via else ""
            less = f", {state.why}" if state.why else ""
            found = f"{state.target}{via}{less}"
            yield Check(f"{PROBE}{spec.name}", True, found, detail=state.detail)
        else:
            found = state.why or "not attached"
            yield Check(f"{PROBE}{spec.name}", False, found, missing, state.detail)


def _untried(spec: ProbeSpec, facts: Facts) -> str:
    if spec.is_tracepoint:
        return f"not tried ({spec.targets[0]})"
    if facts.symbols is None:
        return "not tried"
    here = next((target for target in spec.targets if target in facts.symbols.modules), None)
    return f"not tried ({here} is there)" if here else "no function to attach to"
