"""Recordings: the event log of a host as JSON lines, to look at again elsewhere.

A header line says what host it is; event lines follow as ``events.to_record`` writes them, with a
``probes`` line wherever a probe came or went. Events are logged, not conclusions: a better
correlator improves old recordings. A recording comes from outside, so it is checked like any
input, and its strings are cleaned like names from /proc.
"""

from __future__ import annotations

import dataclasses
import json
import os
from collections.abc import Iterable, Mapping
from typing import IO, Any

from kvmtrace import __version__
from kvmtrace.errors import KvmtraceError
from kvmtrace.events import ClockStep, Event, Lost, to_record, wall_time
from kvmtrace.identity import clean
from kvmtrace.model import Host, Probe, ProbeRuns
from kvmtrace.sources.decoding import (
    TIMES,
    UNSTEPPED,
    UNWRITABLE,
    WRONG,
    Decoder,
    Malformed,
    build,
    checked,
    version_of,
)

FORMAT = 1
MARK = "from_here_on"

# A poison with hundreds of owners is below 100 kB; anything longer is no recording.
MAX_LINE = 1 << 20
BATCH = 4096
MAX_STEPS = 256
_PAGE_SHIFTS = range(12, 21)


class Writer:
    """Writes events to an open file; the caller flushes and closes it."""

    def __init__(self, file: IO[str], host: Host, version: str | None = __version__) -> None:
        """``version``: of the kvmtrace that saw the events, where that is another one."""
        self._file = file
        self._probes: tuple[Probe, ...] = ()
        self._steps: list[ClockStep] = []
        header = {"kvmtrace_recording": FORMAT, "version": version}
        self._line(_known(header | dataclasses.asdict(host)))

    def write(self, events: Iterable[Event], probes: tuple[Probe, ...]) -> None:
        """Append events, and the state of the probes where it changed."""
        if probes != self._probes:
            self._probes = probes
            states = [_known(dataclasses.asdict(probe)) for probe in probes]
            self._line({"kind": "probes", "probes": states})
        for event in events:
            self._line(self._record(_readable(event)))

    def mark(self) -> None:
        """What was written so far happened before somebody came to listen: see ``door``."""
        self._line({"kind": MARK})

    def _record(self, event: Event) -> dict[str, Any]:
        """``ts`` by the wall clock; after a step of that, the time that takes no part in it too."""
        record = to_record(event)
        if isinstance(event, ClockStep):
            self._steps = [*self._steps[-MAX_STEPS:], event]
        if self._steps and (wall := wall_time(event.ts, self._steps)) != event.ts:
            record |= {"ts": wall, UNSTEPPED: event.ts}
        return record

    def _line(self, record: Mapping[str, Any]) -> None:
        self._file.write(json.dumps(record, separators=(",", ":")) + "\n")


class RecordingSource:
    """A recording as a source: ``poll`` gives the next events at once, until ``done``.

    ``recorded``: the host as it was recorded, by a kvmtrace of ``version`` (None: not said), and
    ``host`` as a replay shows it. ``truncated``: the last line was cut off (whoever wrote it was
    killed) and is left out. ``damage``: what ended it before its end; events before that are told.
    """

    name = "recording"
    epoch_offset_ns: int | None = None  # its events were stamped elsewhere

    def __init__(self, path: str) -> None:
        self.path = path
        self.done = False
        self.truncated = False
        self._number = 0
        self.damage: KvmtraceError | None = None
        self._decoder = Decoder()
        try:
            self.file = open(path, "rb")  # noqa: SIM115 (lives as long as the source)
        except OSError as error:
            raise KvmtraceError(
                f"{path}: {error.strerror}", "name a file that `kvmtrace record` made"
            ) from error
        try:
            self.recorded, self.version = self._header()
        except OSError as error:
            self.file.close()
            raise KvmtraceError(f"{path}: {error.strerror}") from error
        except BaseException:
            self.file.close()
            raise
        name = clean(os.path.basename(path))
        self.why: str | None = f"replay of {name}, from {self.recorded.source}"
        self.host = dataclasses.replace(self.recorded, source=self.name, source_why=self.why)

    def poll(self, timeout: float) -> list[Event]:
        """The next events of the file; ``timeout`` is not needed."""
        events: list[Event] = []
        while not self.done and len(events) < BATCH:
            try:
                record = self._record()
                event = self._decoder.event(record) if record is not None else None
            except (Malformed, OSError) as error:
                what = str(error) if isinstance(error, Malformed) else error.strerror
                self.done, self.damage = True, self._bad(what or "unreadable")
                break
            if event is not None:
                events.append(event)
        return events

    def probes(self) -> tuple[Probe, ...]:
        """The probes as they were when the last event read was recorded."""
        return self._decoder.probes

    def probe_runs(self) -> Mapping[str, ProbeRuns]:
        """Not recorded."""
        return {}

    def close(self) -> None:
        """Close the file."""
        self.file.close()

    def _header(self) -> tuple[Host, str | None]:
        record = self._record()
        if record is None or "kvmtrace_recording" not in record:
            raise KvmtraceError(
                f"{self.path} is not a recording", "`kvmtrace record FILE` makes one"
            )
        number = record["kvmtrace_recording"]
        if not isinstance(number, int) or number > FORMAT:
            raise KvmtraceError(
                f"{self.path} was recorded by a newer kvmtrace", "replay it with that version"
            )
        try:
            host = build(Host, record)
        except WRONG as error:
            raise self._bad("incomplete header") from error
        if host.page_shift not in _PAGE_SHIFTS:
            raise self._bad(f"pages of 2**{host.page_shift} bytes")
        return host, version_of(record)

    def _record(self) -> dict[str, Any] | None:
        """The next line; None (and ``done``) at the end of the file, None for an empty line."""
        line = self.file.readline(MAX_LINE)
        self._number += 1
        if not line.strip():
            self.done = not line
            return None
        try:
            record = json.loads(line)
        except (ValueError, RecursionError) as error:
            if not line.endswith(b"\n") and len(line) < MAX_LINE and self._number > 1:
                self.done = self.truncated = True
                return None
            if self._number == 1:
                return None
            raise Malformed("not JSON") from error
        if not isinstance(record, dict):
            if self._number == 1:
                return None
            raise Malformed("not an object")
        return record

    def _bad(self, what: str) -> KvmtraceError:
        return KvmtraceError(
            f"{self.path}, line {self._number}: {what}", "the file was damaged or edited"
        )


def _readable(event: Event) -> Event:
    """The event as a reader will have it; Lost where no reader takes it."""
    try:
        return checked(event)
    except WRONG:
        ts = event.ts if event.ts in TIMES else 0
        return Lost(ts, UNWRITABLE, 1)


def _known(fields: Mapping[str, Any]) -> dict[str, Any]:
    return {name: value for name, value in fields.items() if value is not None}
