"""Why a program could not be attached: a short reason for people, and bcc's own text."""

from __future__ import annotations

import errno
import os
from dataclasses import dataclass

_ENOTSUPP = 524  # include/linux/errno.h: internal to the kernel, but the BPF system call returns it

# {errno: reason}; {way} is what was tried: fentry, fexit, kprobe, raw_tracepoint.
_REASONS = {
    errno.EPERM: "the kernel does not permit {way} programs",
    errno.EACCES: "the kernel does not permit {way} programs",
    errno.EINVAL: "the kernel rejects the {way} program",
    errno.ENOENT: "the kernel finds nothing to attach a {way} program to",
    errno.EBUSY: "another tracer holds the place of the {way} program",
    errno.E2BIG: "the kernel finds the {way} program too large",
    errno.ENOMEM: "the kernel has no memory for the {way} program",
    errno.EOPNOTSUPP: "this kernel does not support {way} programs",
    _ENOTSUPP: "this kernel does not support {way} programs",
}


@dataclass(frozen=True, slots=True)
class AttachFailure:
    """``why``: for people. ``detail``: the kernel's words; None if it was not asked.

    ``number``: the errno behind it.
    """

    why: str
    detail: str | None = None
    number: int | None = None


def explain(way: str, error: OSError) -> AttachFailure:
    """The failure behind an error of the loader's, with the verifier's word if it has one."""
    words = f"{way}: {error.strerror or error}"
    log = getattr(error, "log", "")
    reason = _REASONS.get(error.errno or 0, "the kernel refuses the {way} program")
    return AttachFailure(reason.format(way=way), f"{words} ({log})" if log else words, error.errno)


def errno_in(text: str) -> int | None:
    """The errno whose strerror(3) text a library's message contains."""
    return next((number for number in _REASONS if os.strerror(number) in text), None)


def both(trampoline: AttachFailure, kprobe: AttachFailure) -> AttachFailure:
    """The one failure of a function that can be attached to in neither way."""
    details = [one.detail for one in (trampoline, kprobe) if one.detail]
    return AttachFailure(f"{trampoline.why}, and {kprobe.why}", "; ".join(details) or None)
