"""``kvmtrace check``: this host in one line, for cron and for monitors that run plugins."""

from __future__ import annotations

import sys
from collections import Counter
from collections.abc import Mapping
from typing import Any, NoReturn

import click

from kvmtrace.cli.console import print_json, print_line
from kvmtrace.cli.errors import as_kvmtrace_error
from kvmtrace.cli.inputs import Batch, EventLog, ask_serve, load_log
from kvmtrace.cli.options import from_option, json_option
from kvmtrace.events import Lost
from kvmtrace.views import check as check_view
from kvmtrace.views.check import CheckResult, CheckState

# What was lost before is no reason to warn.
_LATELY_NS = 3600 * 1_000_000_000


class _Plugin(click.Command):
    """A command whose wrong usage is UNKNOWN, too: 2 would be CRITICAL."""

    def make_context(self, *arguments: Any, **extra: Any) -> click.Context:
        try:
            return super().make_context(*arguments, **extra)
        except click.UsageError as error:
            self.refuse(error.format_message())

    @staticmethod
    def refuse(why: str) -> NoReturn:
        """End for want of usable arguments or settings."""
        print_line(check_view.unknown(why).line())
        raise click.exceptions.Exit(CheckState.UNKNOWN)


@click.command(cls=_Plugin)
@from_option
@json_option
def check(recording: str | None, as_json: bool) -> None:
    """Print a line and a status for cron and monitors.

    For Nagios, Icinga and the like. Asks the running `kvmtrace serve`, and attaches nothing. The
    status is 0 if nobody needs to act; 1 (warning) if somebody must act soon, or something may go
    unseen; 2 (critical) if somebody must act now; 3 (unknown) if no serve answers.

    \b
    Example: kvmtrace check || mail -s "$(hostname)" oncall@example.org
    """
    try:
        found = _check(recording)
    except Exception as error:  # any failure is UNKNOWN: other numbers have meanings
        failure = as_kvmtrace_error(error)
        found = check_view.unknown(": ".join(filter(None, (failure.message, failure.hint))))
    if as_json:
        print_json(found.as_object())
    else:
        print_line(found.line())
    sys.exit(found.state)


def _check(recording: str | None) -> CheckResult:
    if recording is None:
        return _judged(ask_serve())
    with load_log(recording, "auto", 0) as log:
        return _judged(log)


def _judged(log: EventLog) -> CheckResult:
    losses: list[Lost] = []

    def note(batch: Batch) -> None:
        losses.extend(event for event in batch[0] if isinstance(event, Lost))

    snapshot = log.model(note)
    now = log.now if log.now is not None else snapshot.last_ts or 0
    return check_view.check(snapshot, now, _lately(snapshot.lost, losses, now))


def _lately(lost: Mapping[str, int], losses: list[Lost], now: int) -> dict[str, int]:
    """What was lost within the last hour. Places without events of their own count as they are."""
    recent: Counter[str] = Counter()
    for one in losses:
        recent[one.where] += one.count if now - one.ts < _LATELY_NS else 0
    found = {where: recent.get(where, count) for where, count in lost.items()}
    return {where: count for where, count in found.items() if count}
