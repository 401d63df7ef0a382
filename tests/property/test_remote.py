"""A serve, a command connected to it, a replay and printed output agree on the same events."""

from __future__ import annotations

import io
import json
import socket
import threading
from collections.abc import Iterator, Sequence
from typing import Any

from hypothesis import example, given
from hypothesis import strategies as st
from prometheus_client import CollectorRegistry, generate_latest
from prometheus_client.parser import text_string_to_metric_families

from kvmtrace.correlate import Correlator
from kvmtrace.events import Event, Exit, Host, Lost, Poison, Sigbus, Tick, VmGone, VmSeen
from kvmtrace.model import Snapshot
from kvmtrace.session.history import CompactLog
from kvmtrace.session.subscriber import Subscriber
from kvmtrace.sources.codec import DECODE_ERRORS, checked
from kvmtrace.sources.recording import RecordingSource, Writer
from kvmtrace.sources.remote import RemoteSource
from kvmtrace.views import event_lines, explain, json_output
from kvmtrace.views.tables import table
from kvmtrace.views.web import landing, metrics
from tests.property import examples
from tests.property.damage import placed
from tests.property.stories import EVENTS as ANYTHING
from tests.property.test_correlate import EVENTS, STORIES
from tests.property.test_recordings import check_json, unfit
from tests.unit.fake import PROBES

HOST = Host("sick-host", "6.18.15", "bpf")


def _as_told(events: list[Event]) -> list[Event]:
    """Events as a source reports them: in order, VMs before their events, no key used twice."""
    told: list[Event] = []
    born: set[int] = set()
    gone: set[int] = set()
    for event in sorted(events, key=lambda event: event.ts):
        match event:
            case VmSeen(vm=vm) if vm in gone:
                continue
            case VmSeen(vm=vm):
                born.add(vm)
            case VmGone(vm=vm) if vm not in born or vm in gone:
                continue
            case VmGone(vm=vm):
                gone.add(vm)
        told.append(event)
    return told


TOLD = st.one_of(st.lists(EVENTS, max_size=60), STORIES, STORIES).map(_as_told)


def model(events: Sequence[Event]) -> Snapshot:
    correlator = Correlator()
    for event in events:
        correlator.feed(event)
    return correlator.snapshot()


def joined(past: list[Event], batches: list[list[Event]]) -> list[Event]:
    """The events that a command gets from a serve: the backlog, then new ones."""
    ours, theirs = socket.socketpair()

    def speak() -> None:
        with theirs, theirs.makefile("rw", encoding="utf-8", newline="") as file:
            while file.readline().strip():
                pass
            file.write("HTTP/1.1 200 OK\r\nConnection: close\r\n\r\n")
            writer = Writer(file, HOST)
            writer.write(past, PROBES)
            writer.mark()
            for batch in batches:
                writer.write(batch, PROBES)

    speaker = threading.Thread(target=speak)
    speaker.start()
    source = RemoteSource(ours, 1)
    heard = source.poll(0)
    wanted = sum(map(len, batches))
    while wanted > 0:
        more = source.poll(60)
        heard += more
        wanted -= len(more)
        assert more
    source.close()
    speaker.join()
    return heard


def replayed(events: Sequence[Event]) -> list[Event]:
    file = io.StringIO()
    Writer(file, HOST).write(events, PROBES)
    source = RecordingSource(placed(file.getvalue().encode(), "recording"))
    read: list[Event] = []
    while not source.done:
        read += source.poll(0)
    source.close()
    return read


def same(one: Snapshot, other: Snapshot) -> None:
    """Compare incidents and counts; ended VMs without events may be missing."""
    assert other.incidents == one.incidents
    assert (other.poisons, other.latency) == (one.poisons, one.latency)
    counted(one, other)


def counted(one: Snapshot, other: Snapshot) -> None:
    for key in one.vms.keys() | other.vms.keys():
        before, after = (
            (vm.exits, vm.sigbus) if (vm := shown.vms.get(key)) else ({}, {})
            for shown in (one, other)
        )
        assert after == before
    assert other.poisons == one.poisons


# The last counts of a VM are read after its end, and after a command has joined.
_LATE = [VmSeen(0, 1, 4001), VmGone(0, 1), Exit(1, 1, 1, 133, 39, True, gfn=1)]


# A VM that has another process than before: an earlier signal to that one was not to its VMM.
_OTHER_PROCESS = [
    VmSeen(0, 1, 4001),
    VmSeen(1, 2, 4002),
    Poison(1, 256, "dirty LRU page", "Ignored"),
    Sigbus(1, 4002, 1, 4, 0x7F00_0000_0000, pfn=256),
    VmSeen(1, 2, 4001),
    VmGone(2, 2),
]


@example(events=_LATE, cut=2)
@example(events=_OTHER_PROCESS, cut=6)
@given(events=TOLD, cut=st.integers(0, 60))
@examples(150)
def test_serve_joiner_and_replay_know_the_same(events: list[Event], cut: int) -> None:
    events = [event for event in map(_readable, events) if event is not None]
    log = CompactLog()
    for event in events[:cut]:
        log.add(event)
    serve = model(events)
    heard = joined(log.events(), [events[cut:]])
    same(serve, model(heard))
    assert model(heard).lost == serve.lost
    same(serve, model(replayed(events)))
    assert replayed(heard) == heard


def _readable(event: Event) -> Event | None:
    try:
        return checked(event)
    except DECODE_ERRORS:
        return None


# Both of a VM's processes are in the log that has no room for either.
_TWO_PROCESSES = [VmSeen(0, 1, 4002), VmSeen(0, 1, 4001), VmGone(0, 1)]


@example(events=_TWO_PROCESSES, limit=4, lag=1, cut=0)
@given(
    events=TOLD,
    limit=st.sampled_from([4, 20, 100]),
    lag=st.sampled_from([1, 8, 1000]),
    cut=st.integers(0, 60),
)
@examples(150)
def test_who_has_no_room_counts_the_same_or_says_what_is_lost(
    events: list[Event], limit: int, lag: int, cut: int
) -> None:
    log = CompactLog(limit)
    for event in events[:cut]:
        log.add(event)
    subscriber = Subscriber(log.events(), lag)
    for event in events[cut:]:
        subscriber.publish([event])
    heard = subscriber.backlog + subscriber.read(0)
    lost = {event.where for event in heard if isinstance(event, Lost)} & {"history", "follower"}
    serve, joiner = model(events), model(heard)
    assert set(joiner.lost) - set(serve.lost) <= {"history", "follower", "unknown_vms"}
    if not lost:
        counted(serve, joiner)


def _counters(snapshots: metrics.Exporter) -> dict[tuple[str, frozenset[tuple[str, str]]], float]:
    return {
        (sample.name, frozenset(sample.labels.items())): sample.value
        for family in snapshots.collect()
        for sample in family.samples
        if sample.name.endswith(("_total", "_bucket", "_count"))
    }


@given(events=TOLD, at=st.integers(1, 9), max_vms=st.sampled_from([1, 2, 500]))
@examples(100)
def test_no_counter_goes_down(events: list[Event], at: int, max_vms: int) -> None:
    """Whatever happens between two scrapes."""
    correlator = Correlator()
    scraped = metrics.Exporter(correlator.snapshot, max_vms=max_vms)
    before = _counters(scraped)
    for number, event in enumerate(events):
        correlator.feed(event)
        if number % at == 0:
            now = _counters(scraped)
            for key, value in before.items():
                # Series of a VM end when it is forgotten; those of all VMs together never do.
                assert now.get(key, value) >= value, key
                assert key in now or "vm" in dict(key[1])
            before = now


def _texts(correlator: Correlator, told: Sequence[Any]) -> Iterator[str]:
    shown = correlator.snapshot()
    yield from filter(None, map(event_lines.event_text, told))
    yield table.table_text(shown, now=shown.last_ts or 0, width=100)
    yield landing.render(shown, shown.last_ts or 0)
    for incident in shown.incidents:
        yield explain.explain_text(incident, shown)


@given(events=st.lists(ANYTHING, max_size=20))
@examples(150)
def test_what_is_shown_is_fit_and_what_is_json_comes_back(events: list[Event]) -> None:
    """For any events that readers accept, with tenants' names in all fields."""
    correlator = Correlator()
    readable = [event for event in map(_readable, events) if event is not None]
    told = [correlator.feed(event) for event in readable]
    for text in _texts(correlator, told):
        assert not unfit(text)
    shown = correlator.snapshot()
    for made in (
        *filter(None, map(json_output.event_line, told)),
        json_output.top(shown),
        *(explain.as_object(incident, shown) for incident in shown.incidents),
    ):
        text = json.dumps(made, ensure_ascii=False)
        assert not unfit(text)
        assert check_json(text) == made
    registry = CollectorRegistry(auto_describe=False)
    registry.register(metrics.Exporter(lambda: shown))
    exposition = generate_latest(registry).decode()
    assert not unfit(exposition)
    assert list(text_string_to_metric_families(exposition))


def test_quiet_is_no_news() -> None:
    assert joined([], [[Tick(5)]]) == [Tick(5)]
