"""Count reads of other processes that were given up."""

from __future__ import annotations

from kvmtrace.enrich.stage import Stage
from kvmtrace.events import Event, Lost
from kvmtrace.linux.proc_reader import READER


class HungReads(Stage):
    """Adds a Lost for reads of /proc/PID that hung (``proc_reader``)."""

    def __init__(self) -> None:
        self._counted = READER.hangs

    def process(self, events: list[Event], now: int, *, last: bool = False) -> list[Event]:
        new = READER.hangs - self._counted
        self._counted += new
        return [*events, Lost(now, "hung_reads", new)] if new else events
