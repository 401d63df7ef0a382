"""The probes: a name each, where they may attach (in order), and what is not seen without them.

Data only. Sources try the targets in order against kallsyms and BTF; the first that exists is
taken. Architectures differ in data here, not in code elsewhere.
"""

from __future__ import annotations

import os
from dataclasses import dataclass

NO_KVM = "kvm is not loaded"
"""Why a probe is not attached that will be once kvm is there."""
ATTACHING_ANEW = "kvm came or went; all programs are being attached anew"
"""Why no probe is attached now; events are not read meanwhile."""


@dataclass(frozen=True, slots=True)
class ProbeSpec:
    """``targets``: functions, or ``system:event`` tracepoints. ``at``: "entry" or "return"."""

    name: str
    targets: tuple[str, ...]
    at: str
    without: str

    @property
    def is_tracepoint(self) -> bool:
        return ":" in self.targets[0]

    @property
    def absent(self) -> str:
        """The reason, for people, where the kernel has none of the targets."""
        other = ", nor under another name" if len(self.targets) > 1 else ""
        return f"this kernel has no {self.targets[0]}{other}"


# The function that contains the private fault path comes first: it also sees faults on HVA-backed
# memory, and compilers inline its only callee. The callee's names by release (6.8, 6.13, 6.18)
# follow, for a kernel in which only they can be probed.
_FAULTIN = {
    "x86_64": (
        "kvm_mmu_faultin_pfn",
        "kvm_faultin_pfn",
        "kvm_mmu_faultin_pfn_gmem",
        "kvm_mmu_faultin_pfn_private",
        "kvm_faultin_pfn_private",
    ),
    "aarch64": ("kvm_handle_guest_abort",),
}

# Linux 6.19 to 7.1 have it in a system of its own; so may other kernels that are patched.
POISON_EVENTS = ("ras:memory_failure_event", "memory_failure:memory_failure_event")

# Elsewhere hardware errors come in other ways: see context_specs.
_MACHINE_CHECKS = {"x86_64": ("mce:mce_record",)}


def specs(machine: str | None = None) -> tuple[ProbeSpec, ...]:
    """The probes for an architecture (``os.uname().machine``)."""
    machine = machine or os.uname().machine
    probes = (
        ProbeSpec(
            "run", ("kvm_arch_vcpu_ioctl_run",), "return", "exits of KVM_RUN: errno, gpa, flags"
        ),
        ProbeSpec(
            "gmem", ("kvm_gmem_get_pfn",), "return", "whether an EFAULT is conversion or backing"
        ),
        ProbeSpec(
            "faultin",
            _FAULTIN.get(machine, ()),
            "return",
            "access, and the gfn of bare faults",
        ),
        ProbeSpec("poison", POISON_EVENTS, "entry", "poisoned pages"),
        ProbeSpec(
            "gmem_error", ("kvm_gmem_error_folio",), "entry", "owners of poisoned guest_memfd pages"
        ),
        ProbeSpec("sigbus", ("send_sig_mceerr",), "entry", "SIGBUS to the VMM"),
        ProbeSpec(
            "sigbus_forced", ("force_sig_mceerr",), "entry", "SIGBUS to the thread that was hit"
        ),
        ProbeSpec(
            "sigbus_bare", ("force_sig",), "entry", "SIGBUS without an address, after a poison"
        ),
        ProbeSpec("mce", _MACHINE_CHECKS.get(machine, ()), "entry", "machine checks"),
        ProbeSpec("vm_new", ("kvm_arch_init_vm",), "return", "VMs before their first fault"),
        ProbeSpec("vm_gone", ("kvm_destroy_vm",), "entry", "the end of a VM at once"),
    )
    return tuple(probe for probe in probes if probe.targets)


def context_specs() -> tuple[ProbeSpec, ...]:
    """Probes for where poison comes from and goes to: one that a kernel lacks is not missed.

    Which of them exist depends on the architecture and on drivers; sources leave out what is not
    there instead of reporting it as not attached.
    """
    return (
        ProbeSpec("mc_event", ("ras:mc_event",), "entry", "memory errors by EDAC, with the DIMM"),
        ProbeSpec("extlog", ("ras:extlog_mem_event",), "entry", "memory errors by firmware's log"),
        ProbeSpec(
            "apei", ("arch_apei_report_mem_error",), "entry", "memory errors by firmware (GHES)"
        ),
        ProbeSpec("arm_event", ("ras:arm_event",), "entry", "errors of Arm processors"),
        ProbeSpec(
            "non_standard", ("ras:non_standard_event",), "entry", "errors in vendors' own formats"
        ),
        ProbeSpec(
            "arm_sea", ("kvm_handle_guest_sea",), "return", "exits with KVM_EXIT_ARM_SEA, no errno"
        ),
        ProbeSpec(
            "vncr",
            ("kvm_handle_vncr_abort",),
            "return",
            "memory faults of arm64's nested virtualization, no errno",
        ),
        ProbeSpec("soft_offline", ("soft_offline_page",), "return", "pages moved off bad memory"),
        ProbeSpec("unpoison", ("unpoison_memory",), "return", "pages taken off the poison list"),
    )


USERSPACE_EXIT = "kvm:kvm_userspace_exit"
"""Every return of KVM_RUN: its exit reason and errno (virt/kvm/kvm_main.c)."""

# What a source needs beside `run`, to see those that were in KVM_RUN when it attached.
RUN_UNDER_WAY = ProbeSpec(
    "run_under_way", (USERSPACE_EXIT,), "entry", "exits that began before the start"
)


@dataclass(frozen=True, slots=True)
class Probe:
    """What became of one probe. ``why``: the reason where it is not attached, in one sentence.

    ``detail``: the message of the kernel or a library, word for word.
    """

    name: str
    attached: bool
    target: str | None = None
    via: str | None = None
    why: str | None = None
    detail: str | None = None


@dataclass(frozen=True, slots=True)
class ProbeRuns:
    """The kernel's own account of a probe (kernel.bpf_stats_enabled): runs and nanoseconds."""

    runs: int
    run_ns: int
