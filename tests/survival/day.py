"""A day of a host on which 100,000 VMs begin and end, in simulated time: what serve holds then.

The events go the way of a serve: archive, session, log of incidents, exporter. Only the kernel and
the clock are made up.
"""

from __future__ import annotations

import gc
import os
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from kvmtrace.events import Event, Exit, GmemPage, Host, Owner, Poison, Tick, VmGone, VmSeen
from kvmtrace.session.archive import Archive
from kvmtrace.session.resumed import ResumedSource
from kvmtrace.session.session import Session
from kvmtrace.views.incident_log import IncidentLog
from kvmtrace.views.web.metrics import Exporter
from tests.bench.models import T0
from tests.bench.timing import table
from tests.unit.fake import FakeSource

HOURS = 24
VMS = 100_000
SIZE = 8 << 20
"""Of the file: reached within hours, after which it must not grow."""

_MINUTE = 60 * 10**9
_LIVE_MINUTES = 30
POISON_EVERY = 500  # VMs

_PAGE = "dirty unevictable LRU page"


@dataclass(frozen=True)
class Held:
    """What serve holds after an hour: in memory (MiB, kept events, VMs) and on the disk (MiB)."""

    hour: int
    rss: float
    file: float
    log: int
    vms: int
    incidents: int


class Kernel(FakeSource):
    """A source of the events that are to come next."""

    def happen(self, events: list[Event]) -> None:
        """Return these next."""
        self._batches.append(events)


def minutes(hours: int, vms: int) -> Iterator[tuple[int, list[Event]]]:
    """(time, events) of each minute: VMs begin, live for half an hour, some lose a page."""
    count = hours * 60
    each = vms // count
    for minute in range(count):
        ts = T0 + minute * _MINUTE
        events: list[Event] = [Tick(ts)]
        for number in range(minute * each, (minute + 1) * each):
            name = f"job-{number}"
            events.append(VmSeen(ts, number, 10_000 + number % 50_000, name, None, "qemu"))
            if number % POISON_EVERY == 0:
                page = GmemPage(number, 8, (Owner(number, 8),))
                events.append(Poison(ts + 1, 0x1000 + number, _PAGE, "Failed", gmem=page))
                events.append(Exit(ts + 2, number, 0, 133, 39, True, 77, gfn=8, gmem=133))
        ended = minute - _LIVE_MINUTES
        if ended >= 0:
            events += [VmGone(ts, number) for number in range(ended * each, (ended + 1) * each)]
        yield ts, events


def _rss() -> float:
    gc.collect()
    pages = int(Path("/proc/self/statm").read_text().split()[1])
    return pages * os.sysconf("SC_PAGE_SIZE") / (1 << 20)


def day(path: str, hours: int = HOURS, vms: int = VMS, size: int = SIZE) -> Iterator[Held]:
    """Let the hours pass; what serve holds after each."""
    now = [T0]
    archive = Archive(
        path,
        Host("bench", "6.12.0", "bpf"),
        print,
        size=size,
        wall=lambda: now[0],
        now=lambda: now[0],
    )
    past, first = archive.begin()
    kernel = Kernel()
    kernel.drained.set()
    source = ResumedSource(kernel, past, archive, lambda: now[0], first)
    session, log = Session(source), IncidentLog()
    exporter = Exporter(session.snapshot)
    for number, (ts, events) in enumerate(minutes(hours, vms), 1):
        now[0] = ts
        kernel.happen(events)
        session.pump(0)
        archive._write()
        if number % 10 == 0:
            log.entries(session.snapshot(), ts)
        if number % 60 == 0:
            archive._next_trim = 0.0
            archive._write()
            for _ in exporter.collect():
                pass
            snapshot = session.snapshot()
            state = archive.state()
            assert not any(state.dropped.values()), state
            assert session._log is not None
            yield Held(
                number // 60,
                _rss(),
                state.size / (1 << 20),
                len(session._log.events()),
                len(snapshot.vms),
                len(snapshot.incidents),
            )
    session.close()


def measure() -> list[str]:
    """Memory and file after some of the hours."""
    with tempfile.TemporaryDirectory() as directory:
        held = list(day(str(Path(directory) / "history.db")))
    rows = [
        (
            str(one.hour),
            f"{one.rss:.0f}",
            f"{one.file:.1f}",
            f"{one.log:,}",
            f"{one.vms:,}",
            f"{one.incidents:,}",
        )
        for one in held
        if one.hour in (1, 2, 4, 6, 8, 12, 16, 20, 24)
    ]
    head = ("hour", "memory MiB", "file MiB", "events kept for readers", "VMs", "incidents")
    return [
        f"A day in which {VMS:,} VMs begin and end, every {POISON_EVERY}th with a poisoned page;"
        f" `--history-size {SIZE >> 20}`:",
        "",
        *table(head, rows),
        "",
        "What grows is what happened to pages: up to 1,024 incidents, and 32,768 events in memory.",
    ]
