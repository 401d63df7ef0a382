"""compile: the eBPF programs for this kernel, ahead of the first start."""

from __future__ import annotations

import os

import click

from kvmtrace import sources
from kvmtrace.cli.console import busy, print_line
from kvmtrace.errors import KvmtraceError
from kvmtrace.linux import host


@click.command("compile")
def compile_() -> None:
    """Compile the eBPF programs for the running kernel and keep them.

    Otherwise the first start compiles them, which takes a second and needs bcc. After this command,
    starts need neither, until the kernel or kvmtrace changes. For packages and images.
    """
    from kvmtrace.sources.bpf import programs  # noqa: PLC0415 (only what watches needs it)

    if not host.privilege().may_trace:
        raise KvmtraceError("compiling for the kernel needs root", "run it with sudo")
    if not host.kvm().loaded:
        raise KvmtraceError(
            "kvm is not loaded, and the programs are compiled for its types",
            "modprobe kvm_intel or kvm_amd",
        )
    before = programs.kept()
    with busy(lambda: sources.stage() or "compiling"):
        after = before if before and before.bcc else programs.keep()
    if after.bcc is None:
        raise KvmtraceError(
            f"the programs compile, but cannot be kept: {after.trouble}",
            f"{after.path} has to be a directory of root's where nobody else may write",
        )
    word = "were kept already" if after is before else "are kept"
    print_line(
        f"eBPF programs for Linux {os.uname().release} {word} in {after.path} (bcc {after.bcc})"
    )
