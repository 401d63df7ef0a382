"""Check whether this host lets us trace, and explain why not."""

from __future__ import annotations

import errno
import os

from kvmtrace.errors import KvmtraceError
from kvmtrace.linux import host
from kvmtrace.linux.tracefs import mount


def tracefs() -> str:
    """The path of tracefs. Raises KvmtraceError where it cannot be used."""
    if not host.privilege().may_trace:
        raise KvmtraceError("tracing the kernel needs root", "run it with sudo")
    found = mount.tracing()
    if found is None:
        # Under lockdown it cannot be mounted either.
        locked = _locked_down() if host.lockdown() == "confidentiality" else None
        raise locked or KvmtraceError(
            "tracefs is not mounted", "mount -t tracefs tracefs /sys/kernel/tracing"
        )
    if not found.readable or not os.access(f"{found.path}/instances", os.W_OK):
        raise _locked_down() or KvmtraceError(
            f"{found.path} cannot be written", "run it with sudo, where it is mounted read-write"
        )
    if not found.dynamic_events:
        raise _locked_down() or KvmtraceError(
            "this kernel has no dynamic events",
            "a kernel built with CONFIG_FPROBE_EVENTS or CONFIG_KPROBE_EVENTS has them",
        )
    return found.path


def to_kvmtrace_error(error: OSError) -> KvmtraceError:
    """Turn the error of a control file into one with a hint."""
    if error.errno in (errno.EMFILE, errno.ENFILE):
        return KvmtraceError(
            "no file descriptors are left for the rings of all CPUs", "raise `ulimit -n`"
        )
    if error.errno in (errno.EPERM, errno.EACCES):
        locked = _locked_down()
        if locked is not None:
            return locked
    return KvmtraceError(
        f"tracefs refused {error.filename or 'a setting'}: {error.strerror}",
        "`kvmtrace doctor` shows what is missing",
    )


def _locked_down() -> KvmtraceError | None:
    mode = host.lockdown()
    if mode in (None, "none"):
        return None
    return KvmtraceError(
        f"kernel lockdown ({mode}) forbids tracing",
        "boot without lockdown= on the kernel's command line, or with Secure Boot off",
    )
