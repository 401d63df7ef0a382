"""What serve has kept, for commands that show what was: at one time, or of a span of time."""

from __future__ import annotations

import contextlib
import datetime
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, ParamSpec, TypeVar

import click

from kvmtrace.cli.inputs import Batch, RecordedLog
from kvmtrace.cli.options import point_in_time
from kvmtrace.correlate import Correlator
from kvmtrace.errors import KvmtraceError
from kvmtrace.linux import clock
from kvmtrace.model import IncidentStatus, Snapshot
from kvmtrace.views.format import date_of, zone_of

if TYPE_CHECKING:
    from kvmtrace.session.archived import ArchivedSource

P = ParamSpec("P")
R = TypeVar("R")

PLACE = "/var/lib/kvmtrace/history.db"
"""Where the service keeps it: in its state directory."""

TIMES = "2h (ago), 20:15, 2026-09-21T20:15, now"

history_option = click.option(
    "--history",
    type=click.Path(dir_okay=False),
    default=PLACE,
    show_default=True,
    metavar="DB",
    help="Where serve keeps what happened.",
)


def span_options(since: str, at: str) -> Callable[[Callable[P, R]], Callable[P, R]]:
    """``--since``, ``--until``, ``--at`` and ``--history``, with what the first and last do."""

    def add(command: Callable[P, R]) -> Callable[P, R]:
        for option in (
            history_option,
            click.option("--at", metavar="TIME", help=at),
            click.option(
                "--until", type=point_in_time, metavar="TIME", help="With --since: up to then."
            ),
            click.option("--since", type=point_in_time, metavar="TIME", help=f"{since} {TIMES}."),
        ):
            command = option(command)
        return command

    return add


@dataclass(frozen=True)
class Span:
    """Which time a person asked for: from ``since`` to ``until``, or the moment ``until``."""

    since: int | None
    until: int
    history: str

    @property
    def option(self) -> str:
        """What makes another command show the end of that time."""
        when = datetime.datetime.fromtimestamp(self.until // 1_000_000_000, datetime.UTC)
        history = "" if self.history == PLACE else " --history DB"
        return f" --at {when.isoformat().replace('+00:00', 'Z')}{history}"


def span_of(
    since: int | None, until: int | None, at: str | None, history: str, recording: str | None = None
) -> Span | None:
    """The time that the options name; None if they name none.

    Raises click.UsageError if they do not go together, click.BadParameter if ``at`` is no time.
    """
    if recording is not None:
        if since is not None or until is not None:
            raise click.UsageError("--since and --until are for what serve has kept, not --from")
        return None
    if until is not None and since is None:
        raise click.UsageError("--until needs --since")
    if since is not None and at is not None:
        raise click.UsageError("--since or --at: one is enough")
    if at is not None:
        return Span(None, point_in_time(at), history)
    if since is None:
        return None
    end = clock.now_ns() if until is None else until
    if end < since:
        raise click.UsageError("--until is before --since")
    return Span(since, end, history)


@contextlib.contextmanager
def open_history(path: str, until: int) -> Iterator[ArchivedSource]:
    """What serve has kept until then. Raises KvmtraceError if there is nothing to read."""
    # Other commands do not need SQLite.
    from kvmtrace.session.archived import ArchivedSource  # noqa: PLC0415

    with contextlib.closing(ArchivedSource(path, until)) as source:
        yield source


class PastLog(RecordedLog):
    """What serve has kept, to the end of a span of time."""

    def __init__(self, source: ArchivedSource, span: Span) -> None:
        super().__init__(source, "history")
        self._archived, self._span = source, span
        self.now = span.until

    def model(self, on_batch: Callable[[Batch], None] | None = None) -> Snapshot:
        """The model at the end; of incidents and VMs, those that there were at ``since`` or later.

        Raises KvmtraceError if nothing was kept of that time.
        """
        before: Snapshot | None = None
        correlator = Correlator(page_shift=self.host.page_shift)
        since, began = self._span.since, None
        for batch in self.batches():
            if on_batch is not None:
                on_batch(batch)
            for event in batch[0]:
                if before is None and since is not None and event.ts >= since:
                    before = correlator.snapshot()
                began = event.ts if began is None else min(began, event.ts)
                correlator.feed(event)
        if began is None:
            raise self._source_has_nothing()
        snapshot = correlator.snapshot().of_log(self.host, (), began)
        if since is None:
            return snapshot
        return _later(snapshot, snapshot if before is None else before)

    def _source_has_nothing(self) -> KvmtraceError:
        asked, begins = (
            f"{date_of(one)} {zone_of(one)}" for one in (self._span.until, self._archived.began())
        )
        return KvmtraceError(f"nothing was kept until {asked}", f"the history begins at {begins}")


def _later(snapshot: Snapshot, before: Snapshot) -> Snapshot:
    over = {one.id for one in before.incidents if one.state == IncidentStatus.CLOSED}
    incidents = tuple(
        one
        for one in snapshot.incidents
        if one.id not in over or one.state != IncidentStatus.CLOSED
    )
    concerned = {vm for one in incidents for vm in one.vm_identities}
    gone = {key for key, vm in before.vms.items() if vm.gone} - concerned
    vms = {key: vm for key, vm in snapshot.vms.items() if key not in gone}
    return replace(snapshot, incidents=incidents, vms=vms)
