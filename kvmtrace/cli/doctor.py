"""``kvmtrace doctor``: check what this host offers."""

from __future__ import annotations

import contextlib
import shutil
import sys
from collections.abc import Iterator

import click

from kvmtrace import sources
from kvmtrace.cli.console import busy, print_json, print_line
from kvmtrace.cli.errors import as_kvmtrace_error
from kvmtrace.cli.inputs import connect
from kvmtrace.cli.options import json_option, source_option
from kvmtrace.events import vm_label
from kvmtrace.linux import host, memory_failure
from kvmtrace.source_choice import Attempt
from kvmtrace.views.doctor import Serving, judge
from kvmtrace.views.doctor_host import KeptPrograms, NotifiedVmm
from kvmtrace.views.doctor_report import Report, as_object, render
from kvmtrace.vmm import processes
from kvmtrace.vmm.identity import Identity

WIDTH_WITHOUT_TERMINAL = 80


@click.command()
@json_option
@click.option("--verbose", is_flag=True, help="Include messages of the kernel and of libraries.")
@source_option
@click.pass_context
def doctor(ctx: click.Context, as_json: bool, verbose: bool, source: str) -> None:
    """Check what this host offers, and how to fix what is missing.

    Attaches all probes for a moment to see which ones can be attached. If a serve runs here, its
    probes are shown instead. The exit status is 0 only if memory-fault exits can be seen here.
    """
    report = doctor_report(source)
    if as_json:
        print_json(as_object(report))
    else:
        width = shutil.get_terminal_size((WIDTH_WITHOUT_TERMINAL, 24)).columns
        ascii_only = not _can_print("✓✗→")
        print_line(render(report, ascii_only=ascii_only, width=width, verbose=verbose))
    ctx.exit(0 if report.ok else 1)


def doctor_report(source: str, *, with_names: bool = True) -> Report:
    """The report on this host and on these sources ("auto": a running serve's, or both).

    Beside a serve nothing is attached: a second set of probes would slow down every VM exit.
    Without ``with_names`` VMs are called by their pids.
    """
    with busy("looking at this host"):
        facts, vmms = host.examine(), list(_notified_vmms(with_names))
    if source == "auto" and (remote := connect()) is not None:
        with contextlib.closing(remote):
            serving = Serving(remote.pid, remote.version)
            own = [Attempt(remote.name, remote.probes())]
            return judge(facts, own, None, serving=serving, vmms=vmms)
    kinds = _kinds(source)
    # Before the attempts, which compile what is not there.
    may_look = "bpf" in kinds and host.privilege().may_trace
    programs = _kept_programs() if may_look else None
    attempts = [_attempt(kind) for kind in kinds]
    return judge(facts, attempts, programs, vmms=vmms)


def _notified_vmms(with_names: bool) -> Iterator[NotifiedVmm]:
    """The VMMs that can be read, by pid."""
    settings = memory_failure.settings()
    pids = sorted(processes.vm_processes())
    wishes = processes.memory_failure_wishes(pids)
    for pid in pids:
        found = processes.identify(pid).identity if with_names else Identity()
        label = vm_label(pid, found.name, found.vmid)
        yield NotifiedVmm(
            f"{label} ({pid})" if found.name else label,
            memory_failure.is_notified_early(wishes.get(pid, ()), settings),
        )


def _kept_programs() -> KeptPrograms | None:
    from kvmtrace.sources.bpf import programs  # noqa: PLC0415 (only what watches needs it)

    kept = programs.kept()
    return KeptPrograms(kept.path, kept.bcc, kept.trouble) if kept else None


def _kinds(source: str) -> tuple[str, ...]:
    return ("bpf", "ftrace") if source == "auto" else (source,)


def _attempt(kind: str) -> Attempt:
    """Attach, read once, detach. An error is a finding here."""
    try:
        with busy(lambda: sources.stage() or f"attaching probes by {kind}"):
            source = sources.open_source(kind)
        try:
            source.poll(0)
            return Attempt(kind, source.probes())
        finally:
            source.close()
    except Exception as error:
        failure = as_kvmtrace_error(error)
        detail = failure.detail or None
        return Attempt(kind, refused=failure.message, hint=failure.hint, detail=detail)


def _can_print(text: str) -> bool:
    try:
        text.encode(getattr(sys.stdout, "encoding", None) or "ascii")
    except UnicodeEncodeError:
        return False
    return True
