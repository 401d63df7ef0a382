"""What bcc and its libraries print of a program that is failed, in words for people."""

from __future__ import annotations

import pytest

from kvmtrace.sources.bpf import attach_errors
from kvmtrace.sources.bpf.attach_errors import AttachFailure

# As bcc 0.26 and 0.31 said it.
KPROBE = (
    "Failed to attach BPF program b'kp_run' to kprobe b'kvm_arch_vcpu_ioctl_run', it's not "
    'traceable (either non-existing, inlined, or marked as "notrace")'
)


@pytest.mark.parametrize(
    ("way", "error", "stderr", "why"),
    [
        (
            "fexit",
            "Failed to load BPF program b'kretfunc__vmlinux__x': Operation not permitted",
            ("",),
            "the kernel does not permit fexit programs",
        ),
        (
            "fexit",
            "Failed to load BPF program b'kretfunc__vmlinux__x': Invalid argument",
            ("bpf: Failed to load program: Invalid argument", "R1 !read_ok", "processed 0 insns"),
            "the kernel rejects the fexit program",
        ),
        (
            "fentry",
            "Failed to attach BPF to entry kernel func",
            ("bpf_attach_kfunc: Unknown error 524",),
            "this kernel does not support fentry programs",
        ),
        ("kprobe", KPROBE, (), "bcc cannot attach a kprobe program"),
        (
            "raw_tracepoint",
            "Failed to attach BPF to raw tracepoint",
            ("bpf_attach_raw_tracepoint (mce_record): Device or resource busy",),
            "another tracer holds the place of the raw_tracepoint program",
        ),
    ],
)
def test_one_short_sentence(way: str, error: str, stderr: tuple[str, ...], why: str) -> None:
    failure = attach_errors.explain(way, error, stderr)
    assert failure.why == why
    assert len(failure.why) <= 80
    assert failure.detail is not None
    assert failure.detail.startswith(error)
    assert not stderr or stderr[0] in failure.detail


def test_two_ways_are_one_sentence() -> None:
    failed = attach_errors.both(AttachFailure("a"), AttachFailure("b", "said"))
    assert failed == AttachFailure("a, and b", "said")
