"""``kvmtrace doctor``: what this host offers, what is missing, and how to fix it.

The report is made of facts only (``host.Facts``, and the outcome of opening each source), so that
every verdict can be tested without such a host.
"""

from __future__ import annotations

import textwrap
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from kvmtrace import __version__
from kvmtrace.choice import Attempt, choose
from kvmtrace.linux.host import CAP_BPF, CAP_PERFMON, CAP_SYS_ADMIN, CAP_SYS_RESOURCE, Facts
from kvmtrace.probes import ProbeSpec, specs
from kvmtrace.views import json_output

_MIN_TEXT_WIDTH = 20  # beside the name of a check

_CAPABILITIES = {
    "CAP_BPF": CAP_BPF,
    "CAP_PERFMON": CAP_PERFMON,
    "CAP_SYS_ADMIN": CAP_SYS_ADMIN,
    "CAP_SYS_RESOURCE": CAP_SYS_RESOURCE,
}


@dataclass(frozen=True, slots=True)
class Check:
    """One line. ``ok``: True, False, or None for a note.

    ``detail``: the message of a library or of the kernel, word for word.
    """

    name: str
    ok: bool | None
    found: str
    fix: str = ""
    detail: str | None = None


@dataclass(frozen=True, slots=True)
class Report:
    """All checks and the verdict. ``ok``: memory-fault exits can be seen on this host."""

    checks: tuple[Check, ...]
    attempts: tuple[Attempt, ...]
    ok: bool
    verdict: str


@dataclass(frozen=True, slots=True)
class KeptPrograms:
    """Compiled eBPF programs for this kernel, in the directory ``path`` ("": there is to be none).

    ``bcc``: the version that compiled them; None if there are none. ``trouble``: why what is there
    is not used, or nothing can be kept.
    """

    path: str
    bcc: str | None
    trouble: str | None


@dataclass(frozen=True, slots=True)
class Serving:
    """The ``kvmtrace serve`` that runs on this host, of ``version`` (None: not known)."""

    pid: int
    version: str | None


@dataclass(frozen=True, slots=True)
class NotifiedVmm:
    """The VMM of a VM, and whether it is notified of a poisoned page before its guest accesses it.

    ``early``: None if that is not known.
    """

    label: str
    early: bool | None


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
    checks = list(_host_checks(facts, programs))
    if serving and seen:
        # What a command would need to attach by itself is no fault where none has to.
        checks = [
            replace(one, ok=None, fix="") if one.name in _TO_ATTACH and not one.ok else one
            for one in checks
        ]
    checks += _memory_failure_checks(facts.memory_failure, vmms)
    if serving:
        checks.append(_serve_check(serving))
    checks += [*_source_checks(attempts), *_probe_checks(facts, chosen)]
    return Report(tuple(_each_cure_once(checks)), tuple(attempts), ok, verdict)


_TO_ATTACH = ("privilege", "lockdown", "tracefs", "poison's names", "bcc", "eBPF programs")


def _each_cure_once(checks: Iterable[Check]) -> Iterator[Check]:
    """Refer to the first check that names a cure instead of naming it again."""
    first: dict[str, str] = {}
    for check in checks:
        fix = _fix_of(check)
        if (
            fix
            and not check.name.startswith(_PROBE)
            and first.setdefault(fix, check.name) != check.name
        ):
            yield replace(check, fix=f"see {first[fix]}")
        else:
            yield check


def _serve_check(serving: Serving) -> Check:
    version = f", kvmtrace {serving.version}" if serving.version else ""
    found = f"runs (pid {serving.pid}{version}); what follows are its probes"
    if serving.version not in (None, __version__):
        return Check("serve", None, found, f"restart it: this is kvmtrace {__version__}")
    return Check("serve", True, found)


def _memory_failure_checks(
    settings: Mapping[str, int], vmms: Sequence[NotifiedVmm]
) -> Iterator[Check]:
    """What the kernel does about a poisoned page (Documentation/admin-guide/sysctl/vm.rst)."""
    if (recovers := settings.get("memory_failure_recovery")) is not None:
        yield Check(
            "memory recovery",
            True if recovers else None,
            "the kernel takes poisoned pages out of use"
            if recovers
            else "off: the kernel panics at any memory failure, and all VMs with it",
            "sysctl vm.memory_failure_recovery=1",
        )
    if (soft := settings.get("enable_soft_offline")) is not None:
        yield Check(
            "soft offline",
            True if soft else None,
            "the kernel moves pages away from memory that begins to fail"
            if soft
            else "off: pages stay where memory begins to fail, until they are poisoned",
            "sysctl vm.enable_soft_offline=1",
        )
    if settings.get("panic_on_unrecoverable_memory_failure"):
        yield Check(
            "memory panic",
            None,
            "the kernel panics if it cannot take a poisoned page out of use",
            "sysctl vm.panic_on_unrecoverable_memory_failure=0, if the VMs are to go on",
        )
    if vmms or "memory_failure_early_kill" in settings:
        yield _early_check(settings.get("memory_failure_early_kill"), vmms)


def _early_check(by_default: int | None, vmms: Sequence[NotifiedVmm]) -> Check:
    """Which VMMs are notified of a page before a guest accesses it, and what follows from that."""
    early, late, unknown = (
        [one.label for one in vmms if one.early is early] for early in (True, False, None)
    )
    if not vmms:
        found = "each VMM is notified when a page is poisoned, unless it refused that"
        if not by_default:
            found = "a VMM is notified when a guest accesses a poisoned page; QEMU asks for earlier"
        return Check("early notification", True if by_default else None, found)
    parts = [f"when a page is poisoned: {_some(early)}"] * bool(early)
    parts += [f"only when a guest accesses it: {_some(late)}"] * bool(late)
    parts += [f"not known: {_some(unknown)}"] * bool(unknown)
    return Check(
        "early notification",
        True if not (late or unknown) else None,
        "; ".join(parts),
        "until then these guests cannot avoid the page. vm.memory_failure_early_kill=1 notifies "
        "all at once, and ends a VMM that does not handle SIGBUS"
        if late
        else "",
    )


_MAX_NAMED = 8


def _some(names: list[str]) -> str:
    more = f" and {len(names) - _MAX_NAMED} more" if len(names) > _MAX_NAMED else ""
    return ", ".join(names[:_MAX_NAMED]) + more


def _host_checks(facts: Facts, programs: KeptPrograms | None) -> Iterator[Check]:
    privilege = facts.privilege
    held = [name for name, number in _CAPABILITIES.items() if privilege.has(number)]
    yield Check(
        "privilege",
        privilege.may_trace,
        f"uid {privilege.euid}, {', '.join(held) if held else 'none of the capabilities needed'}",
        "run it with sudo",
    )
    yield Check(
        "lockdown",
        facts.lockdown != "confidentiality",
        facts.lockdown or "not in this kernel",
        "boot without lockdown=confidentiality: it forbids reading kernel memory",
    )
    yield _kvm_check(facts)
    types = facts.types
    yield Check(
        "types (BTF)",
        types.vmlinux,
        "vmlinux and kvm" if types.kvm else "vmlinux" if types.vmlinux else "none",
        _HAVE_BTF,
    )
    exit_ = types.memory_fault_exit
    yield Check(
        "memory-fault exit",
        exit_,
        f"Linux {facts.kernel} has it"
        if exit_
        else f"not in Linux {facts.kernel}"
        if exit_ is False
        else "unknown until kvm's types can be read",
        "run Linux 6.8 or newer"
        if exit_ is False
        else _LOAD_KVM
        if not facts.kvm.loaded
        else _HAVE_BTF
        if not types.vmlinux
        else "run a kernel built with CONFIG_DEBUG_INFO_BTF_MODULES",
    )
    yield _tracefs_check(facts)
    yield Check(
        "poison's names",
        facts.poison_names or None,
        "read from this kernel" if facts.poison_names else "not readable: numbers are shown",
        _MOUNT_TRACEFS if facts.tracefs is None else "is tracefs mounted with its events?",
    )
    is_needed = programs is None or programs.bcc is None
    yield Check(
        "bcc",
        True if facts.bcc.version is not None else False if is_needed else None,
        facts.bcc.version or facts.bcc.why,
        facts.bcc.fix,
        facts.bcc.detail,
    )
    if programs is not None:
        yield _programs_check(programs, facts)
    if facts.ras_cec:
        yield Check(
            "corrected errors", None, "this kernel collects them without an event (RAS_CEC)"
        )


_MOUNT_TRACEFS = "mount -t tracefs tracefs /sys/kernel/tracing"
_LOAD_KVM = "modprobe kvm_intel or kvm_amd; kvmtrace waits for it"
_HAVE_BTF = "run a kernel built with CONFIG_DEBUG_INFO_BTF"


def _programs_check(programs: KeptPrograms, facts: Facts) -> Check:
    if programs.bcc is not None:
        return Check("eBPF programs", True, f"compiled for this kernel, in {programs.path}")
    compiles = "`kvmtrace compile` keeps them; until then each start compiles"
    if programs.trouble is None:
        if facts.bcc.version is None:
            compiles = facts.bcc.fix
        return Check("eBPF programs", None, "not compiled for this kernel yet", compiles)
    return Check(
        "eBPF programs",
        None,
        f"compiled at each start: {programs.trouble}",
        "a directory of root's where nobody else may write; KVMTRACE_CACHE_DIR names another one",
    )


def _kvm_check(facts: Facts) -> Check:
    kvm = facts.kvm
    if not kvm.loaded:
        return Check("kvm", False, "not loaded", _LOAD_KVM)
    parts = [kvm.vendor or "loaded", "/dev/kvm" if kvm.device else "no /dev/kvm"]
    if kvm.memory_fault_info is not None:
        parts.append(f"KVM_CAP_MEMORY_FAULT_INFO {kvm.memory_fault_info}")
    return Check(
        "kvm",
        kvm.device,
        ", ".join(parts),
        "is virtualization switched on in the firmware? `dmesg | grep -i kvm`",
    )


def _tracefs_check(facts: Facts) -> Check:
    tracefs = facts.tracefs
    if tracefs is None:
        return Check("tracefs", False, "not mounted", _MOUNT_TRACEFS)
    if not tracefs.readable:
        return Check("tracefs", False, f"{tracefs.path}, not readable", "see privilege, lockdown")
    events = "function probes" if tracefs.fprobes else "kprobes only"
    if not tracefs.dynamic_events:
        events = "no dynamic events"
    return Check(
        "tracefs",
        tracefs.dynamic_events,
        f"{tracefs.path}, {events}",
        "run a kernel built with CONFIG_KPROBE_EVENTS",
    )


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


_PROBE = "probe "


def _probe_checks(facts: Facts, chosen: Attempt | None) -> Iterator[Check]:
    states = {probe.name: probe for probe in chosen.probes} if chosen else {}
    for spec in specs(facts.machine):
        state = states.get(spec.name)
        missing = f"not seen without it: {spec.without}"
        if state is None:
            yield Check(f"{_PROBE}{spec.name}", False, _untried(spec, facts), missing)
        elif state.attached:
            via = f" ({state.via})" if state.via else ""
            less = f", {state.why}" if state.why else ""
            found = f"{state.target}{via}{less}"
            yield Check(f"{_PROBE}{spec.name}", True, found, detail=state.detail)
        else:
            found = state.why or "not attached"
            yield Check(f"{_PROBE}{spec.name}", False, found, missing, state.detail)


def _untried(spec: ProbeSpec, facts: Facts) -> str:
    if spec.is_tracepoint:
        return f"not tried ({spec.targets[0]})"
    if facts.symbols is None:
        return "not tried"
    here = next((target for target in spec.targets if target in facts.symbols.modules), None)
    return f"not tried ({here} is there)" if here else "no function to attach to"


def with_texts(report: Report, change: Callable[[str], str]) -> Report:
    """The report with ``change`` applied to all texts from the host."""
    checks = (
        replace(
            check,
            found=change(check.found),
            fix=change(check.fix),
            detail=check.detail and change(check.detail),
        )
        for check in report.checks
    )
    return replace(report, checks=tuple(checks))


def as_object(report: Report) -> dict[str, Any]:
    """The object that ``doctor --json`` prints."""
    return {
        "ok": report.ok,
        "verdict": report.verdict,
        "checks": [
            json_output.known(name=c.name, ok=c.ok, found=c.found, fix=_fix_of(c), detail=c.detail)
            for c in report.checks
        ],
        "sources": [
            json_output.known(
                name=attempt.kind,
                works=attempt.refused is None,
                why=attempt.refused,
                detail=attempt.detail,
                probes=[json_output.probe(probe) for probe in attempt.probes],
            )
            for attempt in report.attempts
        ],
    }


def _fix_of(check: Check) -> str | None:
    return check.fix if check.fix and not check.ok else None


def render(
    report: Report, *, ascii_only: bool = False, width: int | None = None, verbose: bool = False
) -> str:
    """The report as text. Each line has a sign and a word, so that it reads without the sign too.

    ``width``: in columns; None: lines of any length. ``verbose``: with the messages of libraries
    and of the kernel.
    """
    signs = (
        {True: "ok", False: "no", None: "--"} if ascii_only else {True: "✓", False: "✗", None: "–"}
    )
    words = {True: "yes", False: "NO", None: "note"}
    checks = report.checks if verbose else _brief(report)
    name_width = max(len(check.name) for check in checks)
    lines = []
    for check in checks:
        word = f"{signs[check.ok]} {words[check.ok]:<4}"
        head = f"{word}  {check.name:<{name_width}}  "
        below = " " * len(head)
        lines += _wrapped(check.found, head, below, width)
        if fix := _fix_of(check):
            lines += _wrapped(fix, f"{below}→ ", f"{below}  ", width)
        if verbose and check.detail:
            lines += _wrapped(check.detail, f"{below}| ", f"{below}| ", width)
    lines += ["", f"{signs[report.ok]} {report.verdict}"]
    text = "\n".join(lines)
    return text.replace("→ ", "> ") if ascii_only else text


def _brief(report: Report) -> list[Check]:
    """The checks, with probes that are missing for one reason together in one line."""
    works = any(attempt.refused is None for attempt in report.attempts)
    missing: dict[str, list[Check]] = {}
    brief: list[Check] = []
    for check in report.checks:
        if not check.name.startswith(_PROBE) or check.ok:
            brief.append(check)
        else:
            reason = check.found if works else "not tried: no source works"
            missing.setdefault(reason, []).append(check)
    for reason, alike in missing.items():
        if len(alike) == 1 and works:
            brief += alike
        else:
            names = ", ".join(check.name.removeprefix(_PROBE) for check in alike)
            brief.append(Check(f"{len(alike)} probes", False, f"{reason}: {names}", _WITHOUT))
    return brief


_WITHOUT = "`kvmtrace doctor --verbose` has what is not seen without each"


def _wrapped(text: str, head: str, below: str, width: int | None) -> list[str]:
    if width is None:
        return [head + text]
    return textwrap.wrap(
        text,
        max(width, len(head) + _MIN_TEXT_WIDTH),
        initial_indent=head,
        subsequent_indent=below,
        break_long_words=False,
        break_on_hyphens=False,
    )
