"""Recordings: the event log of a host as JSON lines, for replay elsewhere.

A header line describes the host. Event lines follow (``codec.to_record``), with a ``probes`` line
wherever the state of a probe changed. Events are recorded, not conclusions, so a better correlator
improves old recordings. A recording is input from outside: it is checked, and its strings are
cleaned like names from /proc. Each line has a checksum (``checksums``), and the last line marks the
end, so that a recording that was cut off is recognized.
"""

from __future__ import annotations

import dataclasses
import functools
import json
import os
import tempfile
from collections import deque
from collections.abc import Iterable, Mapping
from typing import IO, Any

from kvmtrace import __version__
from kvmtrace.errors import KvmtraceError
from kvmtrace.events import ClockStep, Event, Host, Lost, wall_time
from kvmtrace.probes import Probe, ProbeRuns
from kvmtrace.sanitize import clean
from kvmtrace.sources.checksums import EXACT, ODD, Broken, Checker, Sealer
from kvmtrace.sources.codec import (
    DECODE_ERRORS,
    UNSTEPPED,
    UNWRITABLE,
    Decoder,
    checked,
    dataclass_from,
    to_record,
    version_of,
)
from kvmtrace.sources.dataclass_checks import TIMES, MalformedLine
from kvmtrace.sources.recording_faults import RecordingFaults
from kvmtrace.sources.unpack import STANDARD_INPUT, open_packed
from kvmtrace.spool import spooling

FORMAT = 1
BACKLOG_END = "from_here_on"
"""Kind of the line between the backlog and new events."""
MISSING = "missing_lines"
"""Place of the Lost for lines of a recording that are missing or damaged."""

# A poison with hundreds of owners is below 100 kB; a file with longer lines is no recording.
MAX_LINE = 1 << 20
BATCH = 256  # so few that they are in the CPU's cache until they have been correlated
# Lines that are parsed together, and bytes after which no more are added to them.
_TOGETHER = 64
_TOGETHER_BYTES = 1 << 18
_BETWEEN = os.urandom(16).hex()
MAX_STEPS = 256
_PAGE_SHIFTS = range(12, 21)
# xz, zstd, bzip2: gzip is unpacked.
_PACKED = (b"\xfd7zXZ", b"\x28\xb5\x2f\xfd", b"BZh")


class Writer:
    """Writes a recording to an open file, which the caller flushes and closes."""

    def __init__(
        self, file: IO[str], host: Host, version: str | None = __version__, *, ends: bool = False
    ) -> None:
        """``version``: the kvmtrace that the events come from, if that is another one.

        ``ends``: ``end`` will be called, so a reader recognizes a missing end.
        """
        self._file = file
        self._sealer = Sealer()
        self._probes: tuple[Probe, ...] = ()
        self._steps: list[ClockStep] = []
        header = {
            "kvmtrace_recording": FORMAT,
            "version": version,
            "ends": ends or None,
            EXACT: ODD,
        }
        self._line(_known(header | dataclasses.asdict(host)))

    def write(self, events: Iterable[Event], probes: tuple[Probe, ...]) -> None:
        """Append events, and the state of the probes if it changed."""
        if probes != self._probes:
            self._probes = probes
            self._line({"kind": "probes", "probes": self._states()})
        for event in events:
            self._line(self._record(_readable(event)))

    def mark(self) -> None:
        """Mark the end of the backlog: see ``session.feed``."""
        self._line({"kind": BACKLOG_END})

    def end(self) -> None:
        """Mark the end of the recording, by a line that to older readers is a ``probes`` line."""
        self._line({"kind": "probes", "end": True, "probes": self._states()})

    def _states(self) -> list[dict[str, Any]]:
        return [_known(dataclasses.asdict(probe)) for probe in self._probes]

    def _record(self, event: Event) -> dict[str, Any]:
        """Return the event's line: ``ts`` by the wall clock, and after a step ``UNSTEPPED`` too."""
        record = to_record(event)
        if isinstance(event, ClockStep):
            self._steps = [*self._steps[-MAX_STEPS:], event]
        if self._steps and (wall := wall_time(event.ts, self._steps)) != event.ts:
            record |= {"ts": wall, UNSTEPPED: event.ts}
        return record

    def _line(self, record: Mapping[str, Any]) -> None:
        self._file.write(self._sealer.seal(record))


_DAMAGED = "the file was damaged or edited"
_END = b'{"kind":"probes","end":true,'


class RecordingSource:
    """A recording as a source: ``poll`` returns the next events at once, until ``done``.

    It may be in a bundle, and compressed (``unpack``).

    ``recorded``: the host in the header, written by kvmtrace ``version`` (None: not given).
    ``host``: the same as a replay shows it. ``truncated``: the last line was cut off (the writer
    was killed) and is left out. ``whole``: all was read, including the end.

    A line that does not match its checksum is left out, and the next ones are read. Without
    checksums nothing after a damaged line can be trusted, so reading ends there.
    """

    name = "recording"
    epoch_offset_ns: int | None = None  # its events were stamped elsewhere

    def __init__(self, path: str, *, twice: bool = False) -> None:
        """``twice``: ``rewind`` will be called, for which the content of a pipe is kept."""
        self.path = "standard input" if path == STANDARD_INPUT else path
        self._copy: IO[bytes] | None = None
        self._left: int | None = None
        self._end = 0
        # Lines, and what each is in JSON, if that is plain.
        self._ahead: deque[tuple[bytes, dict[str, Any] | None]] = deque()
        self._ahead_error: OSError | None = None  # what comes after them
        try:
            self.file: IO[bytes] = open_packed(path)
        except OSError as error:
            raise KvmtraceError(
                f"{self.path}: {error.strerror or error}",
                "name a file that `kvmtrace record` or `kvmtrace bundle` made",
            ) from error
        try:
            if twice and not self.file.seekable():
                with spooling():
                    self._copy = tempfile.TemporaryFile()  # noqa: SIM115 (as long as the source)
            self._begin()
        except BaseException:
            self.close()
            raise
        name = clean(os.path.basename(self.path))
        self.why: str | None = f"replay of {name}, from {self.recorded.source}"
        self.host = dataclasses.replace(self.recorded, source=self.name, source_why=self.why)

    def _begin(self) -> None:
        self.done = self.truncated = False
        self._number = 0
        self._ahead.clear()
        self._ahead_error = None
        self._decoder = Decoder()
        self._checker = Checker()
        self._faults = RecordingFaults()
        self._ended = self.whole = False
        try:
            self.recorded, self.version = self._header()
        except OSError as error:
            raise KvmtraceError(f"{self.path}: {error.strerror}") from error

    def rewind(self) -> None:
        """Start again, and end where reading ended, though the file may have grown.

        May be called again, also before the end; what was not read before the first time is left
        out.
        """
        if self._copy is not None:
            self.file.close()
            self.file, self._copy = self._copy, None
        ahead = sum(len(line) for line, _ in self._ahead)
        self._end = max(self._end, self.file.tell() - ahead)
        self._left = self._end
        with spooling():
            self.file.seek(0)
        self._begin()

    @property
    def damage(self) -> KvmtraceError | None:
        """What is wrong with the recording, as far as it is known before ``done``."""
        return self._faults.error(self.path)

    @property
    def doubt(self) -> KvmtraceError | None:
        """That some lines were read unchecked, without a checksum or with rounded numbers."""
        if not self._checker.sealed:
            return None
        return self._faults.doubt(self.path, self._checker.is_rounded)

    def poll(self, timeout: float) -> list[Event]:
        """Return the next events of the file, without waiting."""
        events: list[Event] = []
        for _ in range(BATCH):
            if self.done:
                break
            try:
                self._take(events)
            except (MalformedLine, Broken) as error:
                self.done |= not self._checker.sealed
                self._faults.leave_out(self._number, str(error), self.done)
            except OSError as error:
                self.done = True
                self._faults.leave_out(self._number, error.strerror or "unreadable", True)
        at_end = self.done and (self.truncated or not self._line)
        promised = self._promised and self._checker.sealed
        self._faults.no_end = at_end and promised and not self._ended
        self.whole = at_end and (self._ended or not (promised or self.truncated))
        return events

    def probes(self) -> tuple[Probe, ...]:
        """The state of the probes when the last event was recorded."""
        return self._decoder.probes

    def probe_runs(self) -> Mapping[str, ProbeRuns]:
        """Empty: not recorded."""
        return {}

    def close(self) -> None:
        self.file.close()
        if self._copy is not None:
            self._copy.close()

    def _take(self, events: list[Event]) -> None:
        """Append the event of the next line, if any. Raises MalformedLine, Broken, OSError."""
        record = self._record()
        if record is None:
            return
        if "kvmtrace_recording" in record:
            if self._checker.sealed and record == self._head:
                raise Broken("the header, repeated")
            self.done = True  # its keys mean other VMs
            raise MalformedLine("another recording begins here")
        faults, checker = self._faults, self._checker
        missing = checker.missing_before(self._line, record)
        if missing or faults.passed or not checker.is_checked:
            self._note_gap(missing)
        try:
            event = self._decoder.event(record)
        finally:
            if missing:
                events.append(Lost(self._decoder.ts, MISSING, missing))
        self._ended = "end" in record and record["end"] is True
        if event is not None:
            events.append(event)
            faults.kept += 1

    def _header(self) -> tuple[Host, str | None]:
        record = self._record()
        self._head = dict(record or {})
        if record is None or "kvmtrace_recording" not in record:
            packed = self._line.startswith(_PACKED)
            raise KvmtraceError(
                f"{self.path} is not a recording",
                "it is compressed: unpack it first"
                if packed
                else "`kvmtrace record FILE` makes one; a bundle has one, too",
            )
        number = record["kvmtrace_recording"]
        if type(number) is not int or number > FORMAT:
            raise KvmtraceError(
                f"{self.path} was recorded by a newer kvmtrace", "replay it with that version"
            )
        try:
            host = dataclass_from(Host, record)
        except DECODE_ERRORS as error:
            raise self._bad("incomplete header") from error
        if host.page_shift not in _PAGE_SHIFTS:
            raise self._bad(f"pages of 2**{host.page_shift} bytes")
        self._promised = record.get("ends") is True
        try:
            self._note_gap(self._checker.missing_before(self._line, record))
        except Broken as error:
            # The lines that follow can be read without the header.
            self._faults.first = 1, str(error)
            self._checker.last = 1
        return host, version_of(record)

    def _note_gap(self, missing: int) -> None:
        """Note lines that are missing before this one, and whether it has no checksum."""
        if missing or self._checker.is_checked:
            self._faults.miss(self._number, missing)
        if not self._checker.is_checked:
            self._faults.unchecked.add(self._number)

    def _record(self) -> dict[str, Any] | None:
        """Return the next line.

        None (and ``done``) at the end of the file, None for an empty line.
        """
        self._number += 1
        if not self._ahead:
            self._read_ahead()
        line, record = self._ahead.popleft()
        self._line = line
        if record is not None:
            return record
        if not line.strip():
            self.done = not line
            return None
        try:
            record = json.loads(line)
        except (ValueError, RecursionError) as error:
            whole = line.endswith(b"\n") or len(line) >= MAX_LINE
            if not whole and self._number > 1:
                self.done = self.truncated = True
                self._ended = line.startswith(_END)
                return None
            if self._number == 1:
                return None
            self.done = len(line) >= MAX_LINE
            raise MalformedLine("not JSON") from error
        if not isinstance(record, dict):
            if self._number == 1:
                return None
            raise MalformedLine("not an object")
        return record

    def _read_ahead(self) -> None:
        """Read lines that are parsed together; the header is alone. Raises OSError."""
        if self._ahead_error is not None:
            error, self._ahead_error = self._ahead_error, None
            raise error
        lines: list[bytes] = []
        size, most = 0, _TOGETHER if self._number > 1 else 1
        is_plain = self._left is None and self._copy is None
        read = functools.partial(self.file.readline, MAX_LINE) if is_plain else self._read
        try:
            while len(lines) < most and size < _TOGETHER_BYTES:
                line = read()
                lines.append(line)
                size += len(line)
                if not line:
                    break
        except OSError as error:
            if not lines:
                raise
            self._ahead_error = error
        self._ahead.extend(zip(lines, _parsed(lines), strict=True))

    def _read(self) -> bytes:
        line = self.file.readline(MAX_LINE if self._left is None else min(MAX_LINE, self._left))
        if self._left is not None:
            self._left -= len(line)
        if self._copy is not None:
            with spooling():
                self._copy.write(line)
        return line

    def _bad(self, what: str) -> KvmtraceError:
        return KvmtraceError(f"{self.path}, line {self._number}: {what}", _DAMAGED)


def _parsed(lines: list[bytes]) -> list[dict[str, Any] | None]:
    """Return what each line is in JSON; all None if one of them is no object, or no whole line.

    To parse many at once takes a third of the time. What is put between them cannot be guessed, so
    each stands for itself if all of that is found between values.
    """
    unknown: list[dict[str, Any] | None] = [None] * len(lines)
    whole = lines if lines[-1] else lines[:-1]
    if not all(line.startswith(b'{"') and line.endswith(b"}\n") for line in whole):
        return unknown
    text = b"[" + f',"{_BETWEEN}",'.encode().join(whole) + b"]"
    try:
        values = json.loads(text)
    except (ValueError, RecursionError):
        return unknown
    between = values[1::2]
    if len(between) != len(whole) - 1 or between.count(_BETWEEN) != len(between):
        return unknown
    found = values[::2]
    if len(found) != len(whole) or any(type(one) is not dict for one in found):
        return unknown
    return [*found, *unknown[len(whole) :]]


def _readable(event: Event) -> Event:
    """Return the event as a reader decodes it; Lost if no reader would accept it."""
    try:
        return checked(event)
    except DECODE_ERRORS:
        ts = event.ts if event.ts in TIMES else 0
        return Lost(ts, UNWRITABLE, 1)


def _known(fields: Mapping[str, Any]) -> dict[str, Any]:
    return {name: value for name, value in fields.items() if value is not None}
