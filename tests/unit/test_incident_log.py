"""What is logged when something changes, and that a storm is not logged line by line."""

from __future__ import annotations

import json

from kvmtrace import events
from kvmtrace.correlate import Correlator
from kvmtrace.events import Event, Exit, Lost, Owned, Owner, Poison, VmGone, VmSeen
from kvmtrace.probes import Probe
from kvmtrace.views.incident_log import (
    INCIDENT_ID,
    LOST_ID,
    PROBE_ID,
    STORM_ID,
    IncidentLog,
    LogEntry,
)
from tests.unit.fake import PROBES, SECOND, STORY, T0

ATTACHED = tuple(probe for probe in PROBES if probe.attached)


class Host:
    """Events in, entries out, as serve does once a second."""

    def __init__(self, burst: int = 20) -> None:
        self._correlator = Correlator()
        self._log = IncidentLog(burst)
        self.probes = ATTACHED
        self.now = T0

    @property
    def waits(self) -> bool:
        return self._log.waits

    def after(self, *events: Event, seconds: float = 1.0) -> list[LogEntry]:
        for event in events:
            self._correlator.feed(event)
        self.now += round(seconds * SECOND)
        snapshot = self._correlator.snapshot().of_log(HOST, self.probes)
        return self._log.entries(snapshot, self.now)


HOST = events.Host("hv-1", "6.18.15", "bpf")


def of(entries: list[LogEntry], message_id: str) -> list[LogEntry]:
    return [entry for entry in entries if entry.message_id == message_id]


def test_each_change_of_an_incident_is_an_entry_and_a_count_is_none() -> None:
    host = Host()
    seen = VmSeen(T0, 1, 4001, "web-1", "5b2f0000-1c2d-4e5f-8a9b-0123456789ab", "qemu")
    exit_ = Exit(T0 + SECOND, 1, 0, 133, 39, True, 77, gfn=8)
    (first,) = host.after(seen, exit_)
    assert first.message_id == INCIDENT_ID
    assert "web-1 (pid 4001)" in first.message
    assert first.fields["VM_UUID"] == seen.uuid
    assert first.fields["INCIDENT"] in first.message
    assert first.fields["ACTION"]
    assert host.after(Exit(T0 + SECOND, 1, 0, 133, 39, True, 77, gfn=8)) == []
    (looping,) = host.after(
        *(Exit(T0 + n * SECOND, 1, 0, 133, 39, True, 77, gfn=8, count=50) for n in range(2, 9))
    )
    assert (looping.fields["URGENCY"], looping.priority) == ("looping", 2)
    assert "do: " in looping.message
    (over,) = host.after(VmGone(T0 + 10 * SECOND, 1))
    assert (over.fields["STATE"], over.priority) == ("closed", 6)
    assert "do: " not in over.message


def test_two_incidents_that_become_one_are_an_entry() -> None:
    """Somebody may have read the other id in the log."""
    log, correlator = IncidentLog(), Correlator()
    log.entries(correlator.snapshot(), 0)
    exit_ = Exit(T0 + 1, 1, 0, 133, 39, True, 4002, gfn=8)
    for event in (
        VmSeen(T0, 1, 4001, "web-1"),
        Poison(T0, 0x103275, "dirty LRU page", "Failed"),
        exit_,
    ):
        correlator.feed(event)
    page, place = (entry.fields["INCIDENT"] for entry in log.entries(correlator.snapshot(), 0))
    correlator.feed(Owned(T0 + 2, 0x103275, Owner(1, 8, 0x7F3A00008000), "pagemap"))
    (entry,) = log.entries(correlator.snapshot(), 0)
    kept, other = sorted((page, place), key=lambda one: one.startswith("g"))
    assert (entry.fields["INCIDENT"], entry.fields["FORMER_INCIDENTS"]) == (kept, other)
    assert f"page 0x103275, the same as {other}; do: " in entry.message


def test_nothing_is_logged_of_a_quiet_host() -> None:
    host = Host()
    assert host.after() == []
    assert host.after(VmSeen(T0, 1, 4001, "web-1")) == []


def test_a_storm_is_its_beginning_and_a_total() -> None:
    host = Host(burst=5)
    storm = [Poison(T0 + n, 0x1000 + n, "dirty LRU page", "Recovered") for n in range(100)]
    entries = host.after(*storm)
    assert len(of(entries, INCIDENT_ID)) == 5
    assert host.waits
    assert host.after() == []
    (total,) = host.after(seconds=10)
    assert total.message_id == STORM_ID
    assert total.fields["CHANGES"] == "95"
    assert "100 unowned" in total.message
    assert not host.waits
    assert host.after(seconds=10) == []


def test_what_is_lost_is_logged_at_a_bounded_rate() -> None:
    host = Host()
    (first,) = host.after(Lost(T0, "ring", 7))
    assert first.message_id == LOST_ID
    assert "7 at ring" in first.message
    assert host.after(Lost(T0, "ring", 1)) == []
    assert host.after(Lost(T0, "disk", 2)) == []
    assert host.waits
    (later,) = host.after(seconds=10)
    assert later.fields["LOST"] == "3"
    host.after(seconds=10)
    assert not host.waits


def test_a_probe_that_goes_and_comes_is_logged() -> None:
    host = Host()
    host.after()
    host.probes = (Probe(ATTACHED[0].name, False, why="kvm is not loaded"), *ATTACHED[1:])
    (gone,) = host.after()
    assert (gone.message_id, gone.priority) == (PROBE_ID, 4)
    assert "kvm is not loaded" in gone.message
    host.probes = ATTACHED
    (back,) = host.after()
    assert "attached again" in back.message


def test_names_that_tenants_choose_stay_within_their_field() -> None:
    host = Host()
    hostile = 'web\n\x1b[31m"}\nPRIORITY=0'
    (entry,) = host.after(
        VmSeen(T0, 1, 4001, hostile), Exit(T0 + SECOND, 1, 0, 133, 39, True, 77, gfn=8)
    )
    assert "\n" not in entry.message
    assert "\x1b" not in entry.message
    line = entry.as_json(T0)
    assert "\n" not in line
    assert json.loads(line)["priority"] == entry.priority


def test_a_story() -> None:
    host = Host()
    messages = [entry.message for event in STORY for entry in host.after(event)]
    assert len(messages) >= 2
    assert all(message.startswith(("incident ", "probe ", "lost: ")) for message in messages)
