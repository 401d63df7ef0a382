"""Which event lines a command prints: ``--kind``, ``--state``, ``--vm``."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable
from dataclasses import dataclass
from typing import ParamSpec, TypeVar

import click

from kvmtrace import sanitize
from kvmtrace.cli.completion import complete_vm
from kvmtrace.errors import UsageError
from kvmtrace.events import VmSeen
from kvmtrace.judgement.urgency import Urgency, urgency_of
from kvmtrace.model import CorrelatedEvent, IncidentStatus, Snapshot
from kvmtrace.views.event_lines import LINE_KINDS, kinds_of
from kvmtrace.wording import some_of

P = ParamSpec("P")
R = TypeVar("R")

_MAX_NAMED = 8
# As the tables show them, and as JSON has them.
STATES = tuple(dict.fromkeys([*map(str, Urgency), *map(str, IncidentStatus)]))


def _words(among: Collection[str], what: str) -> Callable[[str], tuple[str, ...]]:
    """A type of options whose values are words with commas between them."""

    def words(value: str | tuple[str, ...]) -> tuple[str, ...]:
        if isinstance(value, tuple):
            return value
        found = tuple(word for word in value.lower().replace(",", " ").split() if word)
        wrong = [word for word in found if word not in among]
        if wrong or not found:
            raise click.BadParameter(f"{value!r} is no {what}: {', '.join(among)}")
        return found

    return words


def _completing(
    among: Collection[str],
) -> Callable[[click.Context, click.Parameter, str], list[str]]:
    return lambda _ctx, _option, begun: [word for word in among if word.startswith(begun)]


def filter_options(command: Callable[P, R]) -> Callable[P, R]:
    for option in (
        click.option(
            "--vm",
            metavar="PID|NAME",
            shell_complete=complete_vm,
            help="Print only events of this VM, and what was lost. The VM must be known at the "
            "start, or be given as the pid of a live process.",
        ),
        click.option(
            "--state",
            "states",
            multiple=True,
            type=_words(STATES, "state"),
            shell_complete=_completing(STATES),
            metavar="STATE,…",
            help=f"Print only events of incidents that are in this state: {', '.join(STATES)}.",
        ),
        click.option(
            "--kind",
            "kinds",
            multiple=True,
            type=_words(LINE_KINDS, "kind"),
            shell_complete=_completing(LINE_KINDS),
            metavar="KIND,…",
            help="Print only events of this kind: exit, poison, sigbus, mce, vm, page (or owner, "
            "found, soft_offline, unpoison), lost, clock, reboot.",
        ),
    ):
        command = option(command)
    return command


@dataclass(frozen=True, slots=True)
class EventFilter:
    """What to print; empty: everything. ``vm``: a VM's name, uuid, number or pid."""

    kinds: frozenset[str]
    states: frozenset[str]
    vm: str | None

    @classmethod
    def of_options(
        cls, kinds: Iterable[tuple[str, ...]], states: Iterable[tuple[str, ...]], vm: str | None
    ) -> EventFilter:
        """The filter of the values that ``filter_options`` give."""
        return cls(
            frozenset(word for words in kinds for word in words),
            frozenset(word for words in states for word in words),
            vm,
        )

    @property
    def has_lost(self) -> bool:
        """Whether what was lost is printed."""
        return not self.states and (not self.kinds or "lost" in self.kinds)

    def chosen(
        self, batch: Iterable[CorrelatedEvent], snapshot: Callable[[], Snapshot]
    ) -> list[CorrelatedEvent]:
        """The events to print. ``snapshot``: called if needed, for states after the batch."""
        found = [one for one in batch if self._is_of_kind(one) and self._concerns(one)]
        if not (self.states and found):
            return found
        ids = {
            key
            for incident in snapshot().incidents
            if self.states & {str(incident.state), str(urgency_of(incident))}
            for key in (incident.id, *incident.former_ids)
        }
        return [one for one in found if one.incident in ids]

    def _is_of_kind(self, correlated: CorrelatedEvent) -> bool:
        return not self.kinds or bool(self.kinds.intersection(kinds_of(correlated.event)))

    def _concerns(self, correlated: CorrelatedEvent) -> bool:
        """Whether it is about the VM. Losses may be; steps of the clock and reboots concern all."""
        vm = self.vm
        return (
            vm is None
            or is_named(correlated.vm, vm)
            or any(is_named(seen, vm) for _, seen in correlated.owners)
            or correlated.event.kind in ("lost", "clock", "reboot")
            or (
                correlated.event.kind == "sigbus" and vm == str(getattr(correlated.event, "pid", 0))
            )
        )


def is_named(seen: VmSeen | None, vm: str) -> bool:
    """Whether a VM goes by this name, uuid, number or pid."""
    if seen is None:
        return False
    names = (str(seen.pid), f"pid {seen.pid}", seen.name, seen.label, seen.vmid)
    return vm in names or (seen.uuid is not None and vm.lower() == seen.uuid.lower())


def require_vm(vm: str, seen: Iterable[VmSeen]) -> None:
    """Raise UsageError with the VMs that there are, if none of them goes by that name."""
    names = set()
    for one in seen:
        if is_named(one, vm):
            return
        names.add(one.label)
    some = f"there are: {some_of(sorted(names), _MAX_NAMED)}" if names else "none is running"
    raise UsageError(f"no VM {sanitize.clean(vm)!r} here", some)
