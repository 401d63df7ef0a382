"""What this host offers, as data. Reads only; every path can be put elsewhere (for tests)."""

from __future__ import annotations

import fcntl
import glob
import gzip
import json
import os
import re
import subprocess
import sys
from collections.abc import Iterable
from dataclasses import dataclass

from kvmtrace.errors import KvmtraceError
from kvmtrace.linux import kallsyms
from kvmtrace.linux.btf import Btf
from kvmtrace.probes import POISON_EVENTS

TRACEFS = ("/sys/kernel/tracing", "/sys/kernel/debug/tracing")

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
        """Whether a capability (CAP_*) is effective; CAP_SYS_ADMIN implies the two newer ones."""
        if self.capabilities >> capability & 1:
            return True
        return capability in (CAP_BPF, CAP_PERFMON) and self.has(CAP_SYS_ADMIN)

    @property
    def may_trace(self) -> bool:
        """Whether it is worth trying: kernels' own policies may refuse later."""
        return self.has(CAP_SYS_ADMIN) or (self.has(CAP_BPF) and self.has(CAP_PERFMON))


def privilege(status: str = "/proc/self/status") -> Privilege:
    """This process's effective user and capabilities."""
    match = re.search(r"^CapEff:\s*([0-9a-f]+)", _read(status), re.MULTILINE)
    return Privilege(os.geteuid(), int(match[1], 16) if match else 0)


def lockdown(path: str = "/sys/kernel/security/lockdown") -> str | None:
    """``none``, ``integrity`` or ``confidentiality``; None where the kernel has no lockdown."""
    match = re.search(r"\[(\w+)\]", _read(path))
    return match[1] if match else None


# -- kvm


@dataclass(frozen=True, slots=True)
class Kvm:
    """``vendor``: the module that drives the hardware; ``device``: /dev/kvm is there.

    ``memory_fault_info``: what KVM_CAP_MEMORY_FAULT_INFO answers. For information only: arm64
    answers 0 and uses the exit all the same.
    """

    loaded: bool
    vendor: str | None
    device: bool
    memory_fault_info: int | None = None


def kvm(sys_module: str = "/sys/module", device: str = "/dev/kvm") -> Kvm:
    """Whether KVM is here, as a module or built in."""
    vendors = ("kvm_amd", "kvm_intel", "kvm_hv", "kvm_pr")
    vendor = next((name for name in vendors if os.path.isdir(f"{sys_module}/{name}")), None)
    there = os.path.exists(device)
    loaded = os.path.isdir(f"{sys_module}/kvm") or there
    return Kvm(loaded, vendor, there, _check_extension(device, 232) if there else None)


@dataclass(frozen=True, slots=True)
class Cpu:
    """``vendor``: by its own name ("AuthenticAMD"). ``physical_bits``: of a physical address, less
    those that hold the key of encrypted memory (arch/x86/kernel/cpu/intel.c, amd.c). None where
    /proc/cpuinfo does not say. ``smca``: it has AMD's Scalable MCA.
    """

    vendor: str | None
    physical_bits: int | None
    smca: bool = False


def cpu(proc: str = "/proc") -> Cpu:
    """The first of the host's CPUs."""
    text = _read(f"{proc}/cpuinfo")
    # Zhaoxin's name has blanks around it.
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
    """BTF files there are; ``memory_fault_exit``: kvm_run can report KVM_EXIT_MEMORY_FAULT.

    That is None while kvm's own types cannot be seen (not loaded, no BTF).
    """

    vmlinux: bool
    kvm: bool
    memory_fault_exit: bool | None


def types(root: str = "/sys/kernel/btf") -> Types:
    """The types that the kernel has BTF of."""
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


# -- tracefs


@dataclass(frozen=True, slots=True)
class Tracefs:
    """``readable``: lockdown lets us read it. ``dynamic_events``, ``fprobes``: what it can do."""

    path: str
    readable: bool
    dynamic_events: bool
    fprobes: bool


def tracing(candidates: tuple[str, ...] = TRACEFS) -> Tracefs | None:
    """The tracefs that is mounted, or None."""
    path = tracefs(candidates)
    if path is None:
        return None
    readme = _read(f"{path}/README")
    return Tracefs(
        path,
        readable=bool(readme),
        dynamic_events=os.access(f"{path}/dynamic_events", os.W_OK)
        or os.access(f"{path}/kprobe_events", os.W_OK),
        fprobes=re.search(r"^\s*f\[:", readme, re.MULTILINE) is not None,
    )


def tracefs(candidates: tuple[str, ...] = TRACEFS) -> str | None:
    """Where tracefs is mounted, or None."""
    for path in candidates:
        if os.path.exists(f"{path}/README"):
            return path
    return None


_SYMBOLIC = re.compile(r"__print_symbolic\(\s*REC->(\w+)\s*,")
_PAIR = re.compile(
    r'\{\s*(-?(?:0[xX][0-9a-fA-F]{1,16}|[0-9]{1,20}))U?L*\s*,\s*"((?:[^"\\]|\\.)*)"\s*\}'
)


def symbolic_tables(event_format: str) -> dict[str, dict[int, str]]:
    """{field: {number: string}} of a trace event's ``format`` text (its ``__print_symbolic``).

    The kernel puts its enums' numbers there (TRACE_DEFINE_ENUM); a name that it left in place
    is left out here, and prints as a number.
    """
    _, _, print_format = event_format.partition("print fmt:")
    starts = list(_SYMBOLIC.finditer(print_format))
    tables: dict[str, dict[int, str]] = {}
    for index, start in enumerate(starts):
        end = starts[index + 1].start() if index + 1 < len(starts) else len(print_format)
        pairs = _PAIR.findall(print_format, start.end(), end)
        tables[start[1]] = {_number(number): text for number, text in pairs}
    return tables


def _number(text: str) -> int:
    return int(text, 16 if "x" in text.lower() else 10)


def memory_failure_names(root: str | None = None) -> tuple[dict[int, str], dict[int, str]]:
    """Page types and results of memory_failure_event as this very kernel prints them.

    ``root``: tracefs. Both empty where tracefs is not there.
    """
    root = root or tracefs() or TRACEFS[0]
    event = tracepoint(POISON_EVENTS, root)
    tables = symbolic_tables(event_format(event, root)) if event else {}
    return tables.get("type", {}), tables.get("result", {})


def tracepoint(targets: Iterable[str], root: str) -> str | None:
    """The first ``system:event`` of these that the tracefs at ``root`` has."""
    return next((target for target in targets if event_format(target, root)), None)


def event_format(target: str, root: str) -> str:
    """The ``format`` of ``system:event``; "" where that is not there or cannot be read."""
    return _read(f"{root}/events/{target.replace(':', '/')}/format")


def has_kprobes(devices: str = "/sys/bus/event_source/devices") -> bool:
    """Whether the kernel has kprobes at all (CONFIG_KPROBES); both ways to them are looked at."""
    root = tracefs()
    return os.path.exists(f"{devices}/kprobe/type") or (
        root is not None and os.path.exists(f"{root}/kprobe_events")
    )


# -- bcc


@dataclass(frozen=True, slots=True)
class Bcc:
    """``version`` of the BPF compiler collection, or ``why`` it cannot be used.

    ``detail``: what Python said when it was to load it.
    """

    version: str | None
    why: str = ""
    fix: str = ""
    detail: str | None = None


# In a process of its own: loading bcc takes 60 MB, and must not happen for asking.
_ASK_BCC = """
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
    """The bcc that this Python finds."""
    try:
        # -P: what happens to be in the current directory is nobody's bcc
        done = subprocess.run(
            [python, "-P", "-c", _ASK_BCC],
            stdin=subprocess.DEVNULL,
            capture_output=True,
            text=True,
            timeout=timeout,
            check=True,
        )
        answer = json.loads(done.stdout)
    except (OSError, subprocess.SubprocessError, ValueError) as error:
        return Bcc(None, "asking for it failed", _INSTALL, str(error))
    if "error" in answer:
        if answer["error"].startswith("ModuleNotFoundError"):
            return bcc_not_found(distribution)
        return Bcc(None, "does not load", _INSTALL, answer["error"])
    if answer["version"] is None:
        return Bcc(
            None,
            f"{answer['file']} is another project of that name",
            f"pip uninstall bcc, then {_INSTALL}",
        )
    return Bcc(answer["version"])


def bcc_not_found(distribution: tuple[str, ...] = _DISTRIBUTION) -> Bcc:
    """Why this Python finds no bcc. ``distribution``: where packages put it (glob patterns)."""
    found = [path for pattern in distribution for path in glob.glob(pattern) if os.path.isdir(path)]
    if not found:
        return Bcc(None, "not installed", _INSTALL)
    versions = [re.search(r"/python(\d+)\.(\d+)/", path) for path in found]
    if all(match and (int(match[1]), int(match[2])) < _LEAST_PYTHON for match in versions):
        # RHEL 9: its own Python is 3.9.
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
    """``y``, ``m`` or ``n`` for a CONFIG_ option; None where no configuration is to be found."""
    text = _read(f"{boot}/config-{release or os.uname().release}")
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

    Asked of the collector itself: a kernel that has it may be booted without it (ras=cec_disable).
    None where neither debugfs nor the kernel's configuration can be read.
    """
    try:
        return "cec" in os.listdir(f"{debug}/ras")
    except OSError:
        option = kernel_option("CONFIG_RAS_CEC")
    return None if option is None else option == "y"


# -- all of it


@dataclass(frozen=True, slots=True)
class Facts:
    """What `kvmtrace doctor` judges."""

    kernel: str
    machine: str
    privilege: Privilege
    lockdown: str | None
    kvm: Kvm
    types: Types
    tracefs: Tracefs | None
    symbols: kallsyms.Symbols | None
    poison_names: bool
    bcc: Bcc
    ras_cec: bool | None = None


def examine() -> Facts:
    """This host, now."""
    uname = os.uname()
    return Facts(
        kernel=uname.release,
        machine=uname.machine,
        privilege=privilege(),
        lockdown=lockdown(),
        kvm=kvm(),
        types=types(),
        tracefs=tracing(),
        symbols=kallsyms.symbols(kallsyms.functions(uname.machine)),
        poison_names=all(memory_failure_names()),
        bcc=bcc(),
        ras_cec=corrected_errors_collector(),
    )


def _read(path: str) -> str:
    try:
        with open(path, encoding="utf-8", errors="replace") as file:
            return file.read()
    except OSError:
        return ""
