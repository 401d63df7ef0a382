"""A recording with time: the model at any moment of it, played, stepped and sought."""

from __future__ import annotations

import bisect
import contextlib
import datetime
import re
import time
from array import array
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import replace

import click

from kvmtrace.cli.inputs import Batch, RecordedLog, Replayed, reading
from kvmtrace.cli.options import seconds
from kvmtrace.cli.signals import stop
from kvmtrace.correlate import Correlator
from kvmtrace.errors import UsageError
from kvmtrace.events import Event
from kvmtrace.model import CorrelatedEvent, Snapshot
from kvmtrace.sanitize import clean
from kvmtrace.views.format import age_of, date_of, zone_of

RECENT = 500

_SECOND = 1_000_000_000
_FASTEST, _SLOWEST = 3600.0, 0.125


class RecordedTape:
    """A recording at one moment. Going back reads it from its beginning, so it may be of any size.

    ``source`` was opened to be read twice, and nothing was read of it. ``monotonic``: seconds, by
    which it plays.
    """

    def __init__(
        self,
        source: Replayed,
        monotonic: Callable[[], float] = time.monotonic,
        since: int = 0,
    ) -> None:
        """Read it once to the end, where it is then. ``since``: it begins there."""
        self._source = source
        self._since = since
        self._monotonic = monotonic
        # The seconds in which anything happened, as their last event.
        self._moments = array("q")
        self._begun = 0  # the last of them
        self._speed = 1.0
        self._played: float | None = None  # when time last went on
        self._begin()
        self._read_until(None)
        self.first = self._moments[0] if self._moments else 0
        self.last = self._moments[-1] if self._moments else 0
        self._now = self.last

    def _begin(self) -> None:
        self._correlator = Correlator(page_shift=self._source.recorded.page_shift)
        self._recent: deque[CorrelatedEvent] = deque(maxlen=RECENT)
        self._ahead: deque[Event] = deque()
        self._snapshot: Snapshot | None = None

    def _read_until(self, ts: int | None) -> None:
        """Take in all events up to ``ts``; None: all there are, noting their moments."""
        while not stop.requested:
            if not self._ahead:
                if self._source.done:
                    return
                with reading(self._source):
                    self._ahead.extend(self._source.poll(0))
                continue
            if ts is not None and self._ahead[0].ts > ts:
                return
            event = self._ahead.popleft()
            self._recent.append(self._correlator.feed(event))
            self._snapshot = None
            if ts is None:
                self._note(event.ts)

    def _note(self, ts: int) -> None:
        # Events may come a little out of order: time does not go back.
        if ts < self._since:
            return
        if self._moments and ts - self._begun < _SECOND:
            self._moments[-1] = max(ts, self._moments[-1])
        else:
            self._moments.append(ts)
            self._begun = ts

    # -- what is shown

    def snapshot(self) -> Snapshot:
        """The model at this moment. While it plays, time has gone on since the last call."""
        if self._played is not None:
            now = self._monotonic()
            elapsed, self._played = now - self._played, now
            self._go(min(self.last, self._now + int(elapsed * self._speed * _SECOND)))
            if self._now >= self.last:
                self._played = None
        if self._snapshot is None:
            source = self._source
            self._snapshot = self._correlator.snapshot().of_log(source.host, source.probes())
        return self._snapshot

    def now(self) -> int:
        """The moment, by the clock of the events."""
        return self._now

    def recent(self) -> Sequence[CorrelatedEvent]:
        """The last events before this moment."""
        return tuple(self._recent)

    @property
    def place(self) -> str:
        what = f"PLAYING {self._speed:g}×" if self.playing else "PAUSED"
        if self._now >= self.last:
            what = "END"
        back = age_of(self._now, self.last)
        return f"{what}  {back} before the end" if self._now < self.last else what

    # -- moving

    @property
    def playing(self) -> bool:
        return self._played is not None

    def toggle(self) -> None:
        """Play or pause; from the end it plays from the beginning."""
        if self.playing:
            self._played = None
            return
        if self._now >= self.last:
            self._go(self.first)
        self._played = self._monotonic()

    def step(self, moments: int) -> None:
        """Go so many moments on or, below 0, back, and stay there."""
        self._played = None
        if moments > 0:
            at = bisect.bisect_right(self._moments, self._now) + moments - 1
        else:
            at = bisect.bisect_left(self._moments, self._now) + moments
        if self._moments:
            self._go(self._moments[max(0, min(at, len(self._moments) - 1))])

    def faster(self, factor: float) -> None:
        """Play so many times as fast as now."""
        self._speed = max(_SLOWEST, min(_FASTEST, self._speed * factor))

    def seek(self, text: str) -> None:
        """Go to a time of day (15:51:20), a time with its date, or so long before the end (5m).

        Times are in the zone that is shown. Raises UsageError, also if the recording is elsewhere.
        """
        self._played = None
        if not self._moments:
            raise UsageError("the recording has no events", "leave out --at")
        ts = self._moment(text)
        if not self.first <= ts < self.last + _SECOND:
            raise self._elsewhere(clean(text))
        self._go(min(ts, self.last))

    def seek_to(self, ts: int) -> None:
        """Go to a time in nanoseconds since the epoch; the end, if that is before it.

        Raises UsageError if the recording begins later.
        """
        if not self._moments or ts < self.first:
            raise self._elsewhere(f"{date_of(ts)} {zone_of(ts)}")
        self._go(min(ts, self.last))

    def _elsewhere(self, when: str) -> UsageError:
        first, last = (f"{date_of(one)} {zone_of(one)}" for one in (self.first, self.last))
        return UsageError(f"the recording has nothing of {when}", f"it is from {first} to {last}")

    def _moment(self, text: str) -> int:
        text = text.strip()
        with contextlib.suppress(click.BadParameter):
            return self.last - round(seconds(text) * _SECOND)
        first = datetime.datetime.fromtimestamp(self.first // _SECOND, datetime.UTC).astimezone()
        try:
            if re.fullmatch(r"\d\d?:\d\d(:\d\d)?", text, re.ASCII):
                when = datetime.datetime.combine(first, datetime.time.fromisoformat(text.zfill(5)))
                # To the end of that second.
                if round(when.timestamp() + 1) * _SECOND <= self.first:
                    when += datetime.timedelta(days=1)
            else:
                when = datetime.datetime.fromisoformat(text)
            return round(when.timestamp() + 1) * _SECOND - 1
        except (ValueError, OverflowError, OSError):
            raise UsageError(
                f"{clean(text)} is no time of a recording",
                "a time of day (15:51:20), with its date (2026-09-21T15:51:20), or 5m before the"
                " end",
            ) from None

    def _go(self, ts: int) -> None:
        if ts < self._now:
            self._source.rewind()
            self._begin()
        self._now = ts
        self._read_until(ts)


class MomentLog(RecordedLog):
    """A recording up to a moment, as ``RecordedTape.seek`` understands it."""

    def __init__(self, source: Replayed, at: str) -> None:
        super().__init__(source)
        self._recording, self._at = source, at

    def model(self, on_batch: Callable[[Batch], None] | None = None) -> Snapshot:
        """The model then; sets ``now``. Raises UsageError if the recording is elsewhere."""
        tape = RecordedTape(self._recording)
        tape.seek(self._at)
        self.now = tape.now()
        return replace(tape.snapshot(), since=tape.first)
