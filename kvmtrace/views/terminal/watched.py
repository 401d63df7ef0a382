"""What the live table shows and can ask for: a host, or a recording with time."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Protocol

from kvmtrace.linux import clock
from kvmtrace.model import CorrelatedEvent, Snapshot


class Tape(Protocol):
    """A recording that is played. Times are nanoseconds since the epoch, by the events' clock."""

    @property
    def playing(self) -> bool:
        """Whether time goes on."""

    @property
    def place(self) -> str:
        """Where it is, for people."""

    def toggle(self) -> None:
        """Play or pause; from the end it plays from the beginning."""

    def step(self, moments: int) -> None:
        """Go to a later (or, below 0, an earlier) moment at which something happened."""

    def faster(self, factor: float) -> None:
        """Play so many times as fast as now."""


@dataclass(frozen=True)
class Watched:
    """Where the display gets everything from. The functions must return at once.

    ``snapshot``: None while there is nothing to show yet. ``now``: by the clock of its events.
    ``recent``: the last events, oldest first. ``status``: what a person has to know of the
    source now, "" if nothing. ``bundle``: write a bundle and return what to print about
    it; it may take long, and raise KvmtraceError or OSError. ``tape``: the recording, if it is one.
    """

    snapshot: Callable[[], Snapshot | None]
    now: Callable[[], int] = clock.now_ns
    recent: Callable[[], Sequence[CorrelatedEvent]] = tuple
    status: Callable[[], str] = str
    bundle: Callable[[], str] | None = None
    tape: Tape | None = None
