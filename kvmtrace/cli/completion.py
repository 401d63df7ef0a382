"""Completion of VMs and incidents, as a running serve has them.

It is quick and silent: without a serve, or with an old or slow one, nothing is offered.
"""

from __future__ import annotations

import contextlib
import re
import threading
from collections.abc import Callable, Iterator

import click
from click.shell_completion import CompletionItem

from kvmtrace.correlate import Correlator
from kvmtrace.model import IncidentStatus, Snapshot
from kvmtrace.sources.remote import RemoteSource

SECONDS = 1.5
# Shells put what is offered into the command line as it is, and tenants name VMs.
_HARMLESS = re.compile(r"[A-Za-z0-9_][A-Za-z0-9_.@+,-]*", re.ASCII)


def complete_vm(_: click.Context, __: click.Parameter, incomplete: str) -> list[CompletionItem]:
    """VMs that run, for ``--vm``."""
    return _beginning_with(incomplete, _vms)


def complete_target(_: click.Context, __: click.Parameter, incomplete: str) -> list[CompletionItem]:
    """What ``explain`` takes: VMs, and incidents that are open."""
    return _beginning_with(
        incomplete, lambda snapshot: [*_vms(snapshot), *_open_incidents(snapshot)]
    )


def _beginning_with(
    incomplete: str, names: Callable[[Snapshot], list[tuple[str, str]]]
) -> list[CompletionItem]:
    snapshot = _snapshot()
    if snapshot is None:
        return []
    found = dict(reversed(names(snapshot)))
    return [
        CompletionItem(name, help=what)
        for name, what in sorted(found.items())
        if name.startswith(incomplete)
    ]


def _vms(snapshot: Snapshot) -> list[tuple[str, str]]:
    """Names; the pid of a VM whose name needs quotes."""
    return [
        (vm.name if vm.name and _HARMLESS.fullmatch(vm.name) else str(vm.pid), "VM")
        for vm in snapshot.vms.values()
        if not vm.gone
    ]


def _open_incidents(snapshot: Snapshot) -> Iterator[tuple[str, str]]:
    for incident in snapshot.incidents:
        if incident.state != IncidentStatus.CLOSED:
            yield incident.id, f"incident, {incident.state}"


def _snapshot() -> Snapshot | None:
    """What the serve of this host has; None if that takes longer than ``SECONDS``."""
    found: list[Snapshot] = []

    def look() -> None:
        with contextlib.suppress(Exception):  # a message would end up in the command line
            if (remote := RemoteSource.connect()) is not None:
                with contextlib.closing(remote):
                    correlator = Correlator()
                    for event in remote.poll(0):
                        correlator.feed(event)
                    found.append(correlator.snapshot())

    with contextlib.suppress(RuntimeError):  # no thread can be started
        thread = threading.Thread(target=look, daemon=True)
        thread.start()
        thread.join(SECONDS)
    return found[0] if found else None
