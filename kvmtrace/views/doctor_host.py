"""What ``kvmtrace doctor`` checks of the host: privileges, kernel, handling of memory failure."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

from kvmtrace.linux.host import CAP_BPF, CAP_PERFMON, CAP_SYS_ADMIN, CAP_SYS_RESOURCE, Facts
from kvmtrace.views.doctor_report import Check
from kvmtrace.wording import some_of

_CAPABILITIES = {
    "CAP_BPF": CAP_BPF,
    "CAP_PERFMON": CAP_PERFMON,
    "CAP_SYS_ADMIN": CAP_SYS_ADMIN,
    "CAP_SYS_RESOURCE": CAP_SYS_RESOURCE,
}

_MAX_NAMED = 8

_MOUNT_TRACEFS = "mount -t tracefs tracefs /sys/kernel/tracing"
_LOAD_KVM = "modprobe kvm_intel or kvm_amd; kvmtrace waits for it"
_HAVE_BTF = "run a kernel built with CONFIG_DEBUG_INFO_BTF"


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
class NotifiedVmm:
    """The VMM of a VM, and whether it is notified of a poisoned page before its guest accesses it.

    ``early``: None if that is not known.
    """

    label: str
    early: bool | None


def memory_failure_checks(
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
    parts = [f"when a page is poisoned: {some_of(early, _MAX_NAMED)}"] * bool(early)
    parts += [f"only when a guest accesses it: {some_of(late, _MAX_NAMED)}"] * bool(late)
    parts += [f"not known: {some_of(unknown, _MAX_NAMED)}"] * bool(unknown)
    return Check(
        "early notification",
        True if not (late or unknown) else None,
        "; ".join(parts),
        "until then these guests cannot avoid the page. vm.memory_failure_early_kill=1 notifies "
        "all at once, and ends a VMM that does not handle SIGBUS"
        if late
        else "",
    )


def host_checks(facts: Facts, programs: KeptPrograms | None) -> Iterator[Check]:
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
