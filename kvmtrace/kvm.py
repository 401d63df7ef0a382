"""The vocabulary of KVM and of memory failure: numbers from the uapi headers and their names.

Unknown values are accepted and printed as numbers: kernels newer than this file must be readable.
"""

from __future__ import annotations

import errno as _errno
import functools
import os

# include/uapi/linux/kvm.h, Linux 7.3
EXIT_REASONS: dict[int, str] = dict(
    enumerate(
        "UNKNOWN EXCEPTION IO HYPERCALL DEBUG HLT MMIO IRQ_WINDOW_OPEN SHUTDOWN FAIL_ENTRY INTR "
        "SET_TPR TPR_ACCESS S390_SIEIC S390_RESET DCR NMI INTERNAL_ERROR OSI PAPR_HCALL "
        "S390_UCONTROL WATCHDOG S390_TSCH EPR SYSTEM_EVENT S390_STSI IOAPIC_EOI HYPERV ARM_NISV "
        "X86_RDMSR X86_WRMSR DIRTY_RING_FULL AP_RESET_HOLD X86_BUS_LOCK XEN RISCV_SBI RISCV_CSR "
        "NOTIFY LOONGARCH_IOCSR MEMORY_FAULT TDX ARM_SEA ARM_LDST64B SNP_REQ_CERTS".split()
    )
)
EXIT_MEMORY_FAULT = 39
EXIT_ARM_SEA = 41

# Bit 4 is in no released kernel. Every version of the KVM Userfault series has it as USERFAULT; the
# RFC of September 2023 had it as HWPOISON, beside errno EHWPOISON.
MEMORY_EXIT_FLAGS: dict[int, str] = {3: "PRIVATE", 4: "USERFAULT"}
MEMORY_EXIT_FLAG_PRIVATE = 1 << 3
MEMORY_EXIT_FLAG_USERFAULT = 1 << 4

EINTR = _errno.EINTR
EAGAIN = _errno.EAGAIN
EFAULT = _errno.EFAULT
EHWPOISON = 133

# include/uapi/asm-generic/siginfo.h
SIGBUS_CODES: dict[int, str] = {4: "AR", 5: "AO", 0x80: "KERNEL"}
SI_KERNEL = 0x80
BUS_MCEERR_AR = 4
BUS_MCEERR_AO = 5

PAGE_SHIFT = os.sysconf("SC_PAGESIZE").bit_length() - 1


def exit_reason_name(reason: int) -> str:
    """``39`` → ``"MEMORY_FAULT"``; an unknown number stays a number."""
    return EXIT_REASONS.get(reason, str(reason))


def errno_name(number: int) -> str:
    """``133`` → ``"EHWPOISON"``, by Linux's own numbers; an unknown one stays a number."""
    if number == EHWPOISON:
        return "EHWPOISON"
    return _errno.errorcode.get(number, str(number))


@functools.lru_cache(maxsize=256)
def outcome_name(errno: int, reason: int | None) -> str:
    """How KVM_RUN ended: its errno, or the exit's reason if only that shows a failure."""
    return errno_name(errno) if errno or reason is None else exit_reason_name(reason)


def flag_names(flags: int, errno: int | None = None) -> str:
    """Memory-fault exit flags for people: ``"PRIVATE"``, ``"PRIVATE|0x20"``, ``"0"``.

    Bits without a name are printed as one hexadecimal number. ``errno``: that of KVM_RUN; with
    EHWPOISON, bit 4 does not mean demand paging and has no name.
    """
    if not flags:
        return "0"
    named = dict(MEMORY_EXIT_FLAGS)
    if errno == EHWPOISON:
        del named[4]
    names = [name for bit, name in named.items() if flags >> bit & 1]
    rest = flags & ~sum(1 << bit for bit in named)
    return "|".join(names + ([hex(rest)] if rest else []))


def unknown_flags(flags: int) -> int:
    """Return the bits of memory-fault exit flags whose meaning is not known."""
    return flags & ~sum(1 << bit for bit in MEMORY_EXIT_FLAGS)


def sigbus_code_name(code: int) -> str:
    """``4`` → ``"AR"`` (action required), ``5`` → ``"AO"`` (optional), 128 → ``"KERNEL"``."""
    return SIGBUS_CODES.get(code, str(code))


def lsb_of(value: int | None) -> int | None:
    """``si_addr_lsb`` of a signal; None if it is no size of memory."""
    return value if value is not None and 0 <= value < 64 else None


def gfn_of(gpa: int) -> int:
    """Guest frame number of a guest physical address, in pages of the host's size."""
    return gpa >> PAGE_SHIFT
