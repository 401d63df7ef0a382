"""What the kernel says of a program that it refuses, in words for people."""

from __future__ import annotations

import errno
import os

import pytest

from kvmtrace.sources.bpf import attach_errors
from kvmtrace.sources.bpf.attach_errors import AttachFailure
from kvmtrace.sources.bpf.loader import LoadError, _last_word

LOG = b"""func#0 @0
0: R1=ctx() R10=fp0
0: (79) r1 = *(u64 *)(r1 +999)
func 'x' doesn't have 125-th argument
invalid bpf_context access off=999 size=8
processed 1 insns (limit 1000000) max_states_per_insn 0 total_states 0 peak_states 0 mark_read 0

"""


@pytest.mark.parametrize(
    ("way", "error", "why"),
    [
        ("fexit", OSError(errno.EPERM, ""), "the kernel does not permit fexit programs"),
        ("fexit", LoadError(errno.EINVAL, "R1 !read_ok"), "the kernel rejects the fexit program"),
        ("fentry", OSError(524, ""), "this kernel does not support fentry programs"),
        ("kprobe", OSError(errno.EIO, ""), "the kernel refuses the kprobe program"),
        (
            "kprobe",
            OSError(errno.ENOENT, ""),
            "the kernel finds nothing to attach a kprobe program to",
        ),
        (
            "raw_tracepoint",
            OSError(errno.EBUSY, ""),
            "another tracer holds the place of the raw_tracepoint program",
        ),
    ],
)
def test_one_short_sentence(way: str, error: OSError, why: str) -> None:
    failure = attach_errors.explain(way, error)
    assert (failure.why, failure.number) == (why, error.errno)
    assert len(failure.why) <= 80
    assert failure.detail is not None
    assert failure.detail.startswith(f"{way}: ")


def test_the_verifiers_last_word_is_the_detail() -> None:
    word = _last_word(LOG)
    assert word == "invalid bpf_context access off=999 size=8"
    failure = attach_errors.explain("fexit", LoadError(errno.EACCES, word))
    assert failure.detail == f"fexit: {os.strerror(errno.EACCES)} ({word})"
    assert _last_word(b"") == ""


def test_two_ways_are_one_sentence() -> None:
    failed = attach_errors.both(AttachFailure("a"), AttachFailure("b", "said"))
    assert failed == AttachFailure("a, and b", "said")
