"""Ring pages, formats and counts of real kernels, read as events and held against the VMM's words.

Recorded in the lab while its VMM ("recorded") had pages poisoned and taken away; ``vmm`` has its
answers, which are the truth.
"""

from __future__ import annotations

import base64
import json
from collections import Counter
from pathlib import Path
from typing import Any

import pytest

from kvmtrace.correlate import Correlator
from kvmtrace.events import Event, Exit, Mce, Poison, Sigbus, VmGone, VmSeen
from kvmtrace.linux.tracefs import mount, ring_page
from kvmtrace.linux.tracefs.histogram import HistogramReader
from kvmtrace.sources.ftrace import totals
from kvmtrace.sources.ftrace.records import Record
from kvmtrace.sources.ftrace.translator import FtraceTranslator
from kvmtrace.sources.ftrace.vms import VmResolver
from kvmtrace.sources.vm_table import VmTable

RECORDINGS = sorted((Path(__file__).parent.parent / "recordings" / "ftrace").glob("*.json"))

pytestmark = pytest.mark.parametrize("path", RECORDINGS, ids=lambda path: path.stem)


def recorded(path: Path) -> tuple[dict[str, Any], list[Event]]:
    recording: dict[str, Any] = json.loads(path.read_text())
    layout = ring_page.PageLayout.parse(recording["header_page"])
    formats = {}
    for probe, text in recording["formats"].items():
        known = ring_page.EventFormat(text)
        formats[known.id] = (probe, known)
    found = []
    for _, page in recording["pages"]:
        for ts, entry in ring_page.entries(base64.b64decode(page), layout):
            probe, known = formats[ring_page.event_id(entry)]
            found.append(Record(ts + recording["offset_ns"], probe, known.decode(entry)))
    found.sort(key=lambda record: record.ts)
    tables = mount.symbolic_tables(recording["formats"]["poison"])
    vms = VmResolver(VmTable("/nonexistent"), lambda tid: None)
    translator = FtraceTranslator(vms, (tables["type"], tables["result"]))
    translator.exits.watches_gmem = True
    return recording, translator.batch(found, found[-1].ts, last=True)


def answers(recording: dict[str, Any], step: str) -> list[dict[str, Any]]:
    return [a for a in recording["vmm"] if a["step"] == step and "error" not in a]


def test_exits_are_those_that_the_vmm_was_notified_of(path: Path) -> None:
    recording, events = recorded(path)
    told: Counter[tuple[Any, ...]] = Counter()
    for row in recording["vmm"][-1]["failed"]:
        known = (row.get("gpa"), row.get("flags"), row.get("size"))
        told[(row["tid"], row["vcpu"], row["errno_nr"], row["reason"], *known)] += row["count"]
    seen: Counter[tuple[Any, ...]] = Counter()
    for e in events:
        if isinstance(e, Exit):
            seen[(e.tid, e.vcpu, e.errno, e.reason, e.gpa, e.flags, e.size)] += e.count
    assert seen == told
    counted = totals.KernelTotals()
    counted.add("run", HistogramReader().read("run", lambda: recording["hist"]))
    assert sum(counted.exits.values()) == sum(told.values())
    assert counted.exits_without_entry == 0


def test_each_exit_has_its_fault(path: Path) -> None:
    recording, events = recorded(path)
    for e in events:
        if isinstance(e, Exit):
            assert e.access == "r"
            assert e.gmem == (e.errno if e.annotated else 0)
    faults = {e.gfn for e in events if isinstance(e, Exit)}
    assert faults == {
        a["page"] for step in ("touch", "loop") for a in answers(recording, step) if not a["ok"]
    } - {e.gfn for e in events if isinstance(e, Sigbus)}


def test_poison_and_signals_are_those_that_the_vmm_saw(path: Path) -> None:
    recording, events = recorded(path)
    poisons = [e for e in events if isinstance(e, Poison)]
    assert [e.pfn for e in poisons] == [a["pfn"] for a in answers(recording, "poison")]
    assert not any(e.page_type.isdecimal() or e.result.isdecimal() for e in poisons)
    told = {(s["tid"], s["hva"], s["lsb"]) for s in recording["vmm"][-1]["sigbus"]}
    signals = [e for e in events if isinstance(e, Sigbus)]
    assert {(e.tid, e.hva, e.lsb) for e in signals} == told
    (own,) = [e for e in signals if e.vcpu is not None]
    (touch,) = [a for a in answers(recording, "touch") if a.get("errno") == "EINTR"]
    assert (own.tid, own.gfn, own.code) == (touch["tid"], touch["page"], 4)
    (mce,) = [e for e in events if isinstance(e, Mce)]
    assert mce.addr == answers(recording, "mce")[0]["addr"]


def test_events_are_within_the_steps_that_made_them(path: Path) -> None:
    recording, events = recorded(path)
    assert [e.ts for e in events] == sorted(e.ts for e in events)
    ends = [a["mono_ns"] for a in recording["vmm"] if a["step"] == "poison" and "error" not in a]
    for end, poison in zip(ends, [e for e in events if isinstance(e, Poison)], strict=True):
        assert 0 < end - (poison.ts - recording["offset_ns"]) < 1_000_000_000


def test_vms_are_born_and_die(path: Path) -> None:
    recording, events = recorded(path)
    born = [e for e in events if isinstance(e, VmSeen)]
    assert len(born) == len(answers(recording, "create"))
    assert {e.pid for e in born} == {recording["vmm"][0]["pid"]}
    assert {e.name for e in born} == {"recorded"}  # of $comm: there is no such process here
    assert {e.vm for e in events if isinstance(e, VmGone)} == {e.vm for e in born}


def test_incidents_come_of_it(path: Path) -> None:
    recording, events = recorded(path)
    correlator = Correlator()
    for event in events:
        if not isinstance(event, VmGone):
            correlator.feed(event)
    snapshot = correlator.snapshot()
    by_pfn = {incident.pfn: incident for incident in snapshot.incidents}
    assert set(by_pfn) == {a["pfn"] for a in answers(recording, "poison")}
    for answer in answers(recording, "poison"):
        incident = by_pfn[answer["pfn"]]
        if incident.exits:
            assert incident.state == "looping"
            assert [owner.gfn for owner in incident.owners] == [answer["gfn"]]
