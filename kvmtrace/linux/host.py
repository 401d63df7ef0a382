"""What this host offers, as data. Only reads; tests may pass other paths."""

from __future__ import annotations

import fcntl
import glob
import gzip
import json
import os
import re
import subprocess
import sys
from collections.abc import Mapping
from dataclasses import dataclass, field

from kvmtrace.errors import KvmtraceError
from kvmtrace.linux import kallsyms, memory_failure
from kvmtrace.linux.btf import Btf
from kvmtrace.linux.read import read_text
from kvmtrace.linux.tracefs import mount

# include/uapi/linux/capability.h
CAP_SYS_ADMIN = 21
CAP_SYS_RESOURCE = 24
CAP_PERFMON = 38
CAP_BPF = 39


@dataclass(frozen=True, slots=True)
class Privilege:
    """What this process may do. ``capabilities``: CapEff as a bit set."""

    euid: int
    capabilities: int

    def has(self, capability: int) -> bool:
        """Whether a capability (CAP_*) is effective.

        CAP_SYS_ADMIN implies CAP_BPF and CAP_PERFMON.
        """
        if self.capabilities >> capability & 1:
            return True
        return capability in (CAP_BPF, CAP_PERFMON) and self.has(CAP_SYS_ADMIN)

    @property
    def may_trace(self) -> bool:
        """Whether tracing may work; a kernel's policies may still refuse it."""
        return self.has(CAP_SYS_ADMIN) or (self.has(CAP_BPF) and self.has(CAP_PERFMON))


def privilege(status: str = "/proc/self/status") -> Privilege:
    """Return this process's effective user and capabilities."""
    match = re.search(r"^CapEff:\s*([0-9a-f]+)", read_text(status), re.MULTILINE)
    return Privilege(os.geteuid(), int(match[1], 16) if match else 0)


def lockdown(path: str = "/sys/kernel/security/lockdown") -> str | None:
    """Return ``none``, ``integrity`` or ``confidentiality``; None if the kernel has no lockdown."""
    match = re.search(r"\[(\w+)\]", read_text(path))
    return match[1] if match else None


# -- kvm


@dataclass(frozen=True, slots=True)
class Kvm:
    """The state of KVM. ``vendor``: the module for the hardware; ``device``: /dev/kvm exists.

    ``memory_fault_info``: the value of KVM_CAP_MEMORY_FAULT_INFO. For information only: it is 0 on
    arm64, which uses the exit nevertheless.
    """

    loaded: bool
    vendor: str | None
    device: bool
    memory_fault_info: int | None = None


def kvm(sys_module: str = "/sys/module", device: str = "/dev/kvm") -> Kvm:
    """Return the state of KVM, as a module or built in."""
    vendors = ("kvm_amd", "kvm_intel", "kvm_hv", "kvm_pr")
    vendor = next((name for name in vendors if os.path.isdir(f"{sys_module}/{name}")), None)
    there = os.path.exists(device)
    loaded = os.path.isdir(f"{sys_module}/kvm") or there
    return Kvm(loaded, vendor, there, _check_extension(device, 232) if there else None)


@dataclass(frozen=True, slots=True)
class Cpu:
    """A CPU's vendor and features; None if /proc/cpuinfo does not have them.

    ``vendor``: its vendor string ("AuthenticAMD"). ``physical_bits``: of a physical address,
    without those of the key of encrypted memory (arch/x86/kernel/cpu/intel.c, amd.c). ``smca``: it
    has AMD's Scalable MCA.
    """

    vendor: str | None
    physical_bits: int | None
    smca: bool = False


def cpu(proc: str = "/proc") -> Cpu:
    """Return the first of the host's CPUs."""
    text = read_text(f"{proc}/cpuinfo")
    # Zhaoxin's string has blanks around it.
    vendor = re.search(r"^vendor_id\s*: *(\S+) *$", text, re.MULTILINE)
    bits = re.search(r"^address sizes\s*: *(\d+) bits physical", text, re.MULTILINE)
    smca = re.search(r"^flags\s*:.* smca\b", text, re.MULTILINE) is not None
    return Cpu(vendor[1] if vendor else None, int(bits[1]) if bits else None, smca)


def _check_extension(device: str, capability: int) -> int | None:
    check_extension = 0xAE03  # KVM_CHECK_EXTENSION, include/uapi/linux/kvm.h
    try:
        descriptor = os.open(device, os.O_RDWR | os.O_CLOEXEC)
    except OSError:
        return None
    try:
        return fcntl.ioctl(descriptor, check_extension, capability)
    except OSError:
        return None
    finally:
        os.close(descriptor)


# -- types


@dataclass(frozen=True, slots=True)
class Types:
    """Which BTF files exist. ``memory_fault_exit``: kvm_run can report KVM_EXIT_MEMORY_FAULT.

    That is None while kvm's types cannot be read (not loaded, no BTF).
    """

    vmlinux: bool
    kvm: bool
    memory_fault_exit: bool | None


def types(root: str = "/sys/kernel/btf") -> Types:
    """Return which types the kernel has BTF of."""
    vmlinux, module = (os.path.exists(f"{root}/{name}") for name in ("vmlinux", "kvm"))
    return Types(vmlinux, module, _memory_fault_exit(root) if vmlinux else None)


def _memory_fault_exit(root: str) -> bool | None:
    try:
        btf = Btf(root)
    except KvmtraceError:
        return None
    if btf.size("kvm_run") is None:
        return None
    return btf.offset("kvm_run", "memory_fault") is not None


# -- tracing


def has_kprobes(devices: str = "/sys/bus/event_source/devices") -> bool:
    """Whether the kernel has kprobes at all (CONFIG_KPROBES), by perf or by tracefs."""
    root = mount.tracefs()
    return os.path.exists(f"{devices}/kprobe/type") or (
        root is not None and os.path.exists(f"{root}/kprobe_events")
    )


# -- bcc


@dataclass(frozen=True, slots=True)
class Bcc:
    """``version`` of the BPF compiler collection, or ``why`` it cannot be used.

    ``fix``: a hint. ``detail``: Python's error when bcc was imported.
    """

    version: str | None
    why: str = ""
    fix: str = ""
    detail: str | None = None


# Runs in another process, because importing bcc takes 60 MB.
_FIND_BCC = """
import json
try:
    import bcc
except Exception as error:
    print(json.dumps({"error": f"{type(error).__name__}: {error}"}))
else:
    version = getattr(bcc, "__version__", "unknown") if hasattr(bcc, "BPF") else None
    print(json.dumps({"version": version, "file": bcc.__file__}))
"""
_INSTALL = "apt install python3-bpfcc (or dnf install python3-bcc)"
# Debian and Ubuntu: python3/dist-packages; Fedora, RHEL, SUSE, Arch: python3.X/site-packages, of
# lib or lib64.
_DISTRIBUTION = ("/usr/lib*/python3*/*-packages/bcc",)
_LEAST_PYTHON = (3, 11)  # pyproject.toml, requires-python


def bcc(
    python: str = sys.executable, distribution: tuple[str, ...] = _DISTRIBUTION, timeout: float = 30
) -> Bcc:
    """Return the bcc that this Python finds."""
    try:
        # -P: ignore the current directory
        done = subprocess.run(
            [python, "-P", "-c", _FIND_BCC],
            stdin=subprocess.DEVNULL,
            capture_output=True,
            text=True,
            timeout=timeout,
            check=True,
        )
        found = json.loads(done.stdout)
    except (OSError, subprocess.SubprocessError, ValueError) as error:
        return Bcc(None, "asking for it failed", _INSTALL, str(error))
    if "error" in found:
        if found["error"].startswith("ModuleNotFoundError"):
            return bcc_not_found(distribution)
        return Bcc(None, "does not load", _INSTALL, found["error"])
    if found["version"] is None:
        return Bcc(
            None,
            f"{found['file']} is another project of that name",
            f"pip uninstall bcc, then {_INSTALL}",
        )
    return Bcc(found["version"])


def bcc_not_found(distribution: tuple[str, ...] = _DISTRIBUTION) -> Bcc:
    """Return why this Python finds no bcc.

    ``distribution``: where packages put it (glob patterns).
    """
    found = [path for pattern in distribution for path in glob.glob(pattern) if os.path.isdir(path)]
    if not found:
        return Bcc(None, "not installed", _INSTALL)
    versions = [re.search(r"/python(\d+)\.(\d+)/", path) for path in found]
    if all(match and (int(match[1]), int(match[2])) < _LEAST_PYTHON for match in versions):
        # RHEL 9 has Python 3.9.
        return Bcc(
            None,
            "installed, but for a Python that is too old for kvmtrace",
            "--source ftrace needs no bcc",
        )
    return Bcc(
        None,
        "installed, but out of this Python's sight",
        "make the venv with /usr/bin/python3 -m venv --system-site-packages",
    )


# -- kernel configuration


def kernel_option(
    name: str,
    release: str | None = None,
    boot: str = "/boot",
    config_gz: str = "/proc/config.gz",
) -> str | None:
    """Return ``y``, ``m`` or ``n`` for a CONFIG_ option; None if no configuration is found."""
    text = read_text(f"{boot}/config-{release or os.uname().release}")
    if not text:
        try:
            with gzip.open(config_gz, "rt") as file:
                text = file.read()
        except (OSError, EOFError):
            return None
    match = re.search(rf"^{name}=(\w)", text, re.MULTILINE)
    return match[1] if match else "n"


def corrected_errors_collector(debug: str = "/sys/kernel/debug") -> bool | None:
    """Whether the kernel collects corrected errors without reporting each (RAS_CEC).

    Checks for the running collector, which a kernel may be booted without (ras=cec_disable). None
    if neither debugfs nor the kernel's configuration can be read.
    """
    try:
        return "cec" in os.listdir(f"{debug}/ras")
    except OSError:
        option = kernel_option("CONFIG_RAS_CEC")
    return None if option is None else option == "y"


# -- all of it


@dataclass(frozen=True, slots=True)
class Facts:
    """The facts that `kvmtrace doctor` judges."""

    kernel: str
    machine: str
    privilege: Privilege
    lockdown: str | None
    kvm: Kvm
    types: Types
    tracefs: mount.Tracefs | None
    symbols: kallsyms.Symbols | None
    poison_names: bool
    bcc: Bcc
    ras_cec: bool | None = None
    memory_failure: Mapping[str, int] = field(default_factory=dict)
    """``memory_failure.settings``."""


def examine() -> Facts:
    """Collect the facts about this host."""
    uname = os.uname()
    return Facts(
        kernel=uname.release,
        machine=uname.machine,
        privilege=privilege(),
        lockdown=lockdown(),
        kvm=kvm(),
        types=types(),
        tracefs=mount.tracing(),
        symbols=kallsyms.symbols(kallsyms.functions(uname.machine)),
        poison_names=all(mount.memory_failure_names()),
        bcc=bcc(),
        ras_cec=corrected_errors_collector(),
        memory_failure=memory_failure.settings(),
    )
