"""Damaged contents of tracefs: formats, ring pages, counts, messages."""

from __future__ import annotations

import base64
import json
from contextlib import suppress
from pathlib import Path
from typing import Any

from hypothesis import given
from hypothesis import strategies as st

from kvmtrace.correlate import Correlator
from kvmtrace.events import Lost
from kvmtrace.linux.tracefs import dynamic_events, instance, mount, ring_page
from kvmtrace.linux.tracefs.histogram import HistogramReader
from kvmtrace.linux.tracefs.missed import Missed
from kvmtrace.linux.tracefs.ring_page import EventFormat, PageLayout
from kvmtrace.sources.codec import DECODE_ERRORS, checked
from kvmtrace.sources.ftrace.records import Record
from kvmtrace.sources.ftrace.totals import KernelTotals
from kvmtrace.sources.ftrace.translator import FtraceTranslator
from kvmtrace.sources.ftrace.vms import VmResolver
from kvmtrace.sources.vm_table import VmTable
from kvmtrace.views import json_output
from tests.property import examples
from tests.property.damage import LONG, damaged, directory, placed
from tests.property.parsers import Parser, laws, text

_RECORDED = [
    json.loads(path.read_text())
    for path in sorted((Path(__file__).parent.parent / "recordings" / "ftrace").glob("*.json"))
]
FORMATS = [one.encode() for recorded in _RECORDED for one in recorded["formats"].values()]
HEADERS = [recorded["header_page"].encode() for recorded in _RECORDED]
PAGES = [base64.b64decode(page) for recorded in _RECORDED for _, page in recorded["pages"]]
COUNTS = [recorded["hist"].encode() for recorded in _RECORDED]

GROUP = "kvmtrace_77_1_f"
PROBES = f"""p:{GROUP}/sigbus force_sig_mceerr code=$arg1:s32
r4096:{GROUP}/run kvm_arch_vcpu_ioctl_run%return ret=$retval:s32
p:other/poison memory_failure pfn=$arg1
""".encode()
PROFILE = b"""  sigbus                                                          3               0
  run                                                            11               7
  poison                                                          0               0
"""
COMMAND = f"f:{GROUP}/run kvm_arch_vcpu_ioctl_run%return vcpu=vcpu:x64"
ERRORS = (
    "[   17.061206] trace_fprobe: error: Invalid fetch argument\n"
    f"  Command: {COMMAND}\n"
    "                        ^\n"
    "[   18.000001] trace_kprobe: error: No BTF entry for this BTF argument\n"
    "  Command: p:x/y z a=b\n           ^\n"
).encode()
STATS = (
    b"entries: 0\noverrun: 0\ncommit overrun: 0\nbytes: 48\ndropped events: 12\nread events: 3\n"
)
_HIST = b"# trigger info: hist:keys=vcpu.hex,ret,reason:vals=hitcount:size=4096 [active]\n"
README = (
    b"tracing mini-HOWTO:\n\n  dynamic_events\n\t\t  f[:[<group>/][<event>]] <func-name>[%return]\n"
)


def _counts(said: str) -> None:
    for event in ("run", "vncr", "gmem", "sigbus"):
        totals = KernelTotals()
        totals.add(event, HistogramReader().read(event, lambda: said))
        for counts in (totals.exits, totals.refusals, totals.signals, totals.unkeyed):
            assert all(count >= 0 for count in counts.values())
        for key in totals.vcpu_owners:
            totals.owner(key)


def _missed(profile: bytes) -> None:
    events = placed(PROBES, "tracefs/kprobe_events")
    placed(profile, "tracefs/kprobe_profile")
    found = Missed(events.rpartition("/")[0], GROUP)
    assert found.newly_missed() >= 0
    assert found.newly_missed() == 0


def _probes(listed: bytes) -> None:
    root = placed(listed, "tracefs/dynamic_events").rpartition("/")[0]
    placed(listed, "tracefs/kprobe_events")
    placed(PROFILE, "tracefs/kprobe_profile")
    Missed(root, GROUP).newly_missed()
    dynamic_events.DynamicEvents(root, GROUP).names()
    for group in dynamic_events.groups(root):
        instance.is_dead(group)


def _refusal(log: bytes) -> None:
    root = placed(log, "tracefs/error_log").rpartition("/")[0]
    dynamic_events.DynamicEvents(root, GROUP)._refusal(COMMAND)


def _dropped(stats: bytes) -> None:
    ring = instance.Instance.__new__(instance.Instance)
    ring.path, ring._fds, ring._last = f"{directory()}/tracefs", {0: -1}, {}
    placed(stats, "tracefs/per_cpu/cpu0/stats")
    assert ring.dropped() >= 0


def _tracing(readme: bytes) -> None:
    mount.tracing((placed(readme, "tracefs/README").rpartition("/")[0],))


test_any_input, test_long_input, test_what_is_known = laws(
    {
        "format": Parser(text(EventFormat), FORMATS, (ValueError,)),
        "print_fmt": Parser(
            text(mount.symbolic_tables),
            FORMATS,
            found=[b'print fmt: "%s", __print_symbolic(REC->type, { 07, "x" }, { 1, "y" })'],
        ),
        "event_id": Parser(text(mount.event_id), FORMATS),
        "field_places": Parser(
            text(mount.field_places), FORMATS, found=[b"\tfield:" + b"u" * 100_000]
        ),
        "header_page": Parser(text(PageLayout.parse), HEADERS, (ValueError,)),
        "hist": Parser(
            text(_counts),
            COUNTS,
            found=[
                _HIST + b"{ vcpu: 1, ret: -14, reason: 39 } hitcount: " + b"9" * 5000,
                _HIST + b"{ vcpu: 1 } hitcount: 1 size: " + b"9" * 5000,
                _HIST + b"{ \n" * (LONG // 3),
                _HIST + b"{ vcpu: 1 } hitcount: 1 " + b"9" * LONG,
            ],
        ),
        "kprobe_profile": Parser(_missed, [PROFILE]),
        "dynamic_events": Parser(_probes, [PROBES]),
        "error_log": Parser(_refusal, [ERRORS]),
        "stats": Parser(_dropped, [STATS]),
        "README": Parser(_tracing, [README]),
        "cpus": Parser(
            lambda data: instance.online_cpus(placed(data, "online")),
            [b"0-3,8\n", b"0\n"],
            found=[b"", b"\xb0-3,8", b"0" * LONG, b"0-99999999999"],
        ),
    }
)


@given(page=damaged(PAGES), header=damaged(HEADERS) | st.sampled_from(HEADERS))
@examples(200)
def test_entries_lie_within_their_page(page: bytes, header: bytes) -> None:
    try:
        layout = PageLayout.parse(header.decode("utf-8", "replace"))
    except ValueError:
        return
    size = sum(len(entry) for _, entry in ring_page.entries(page, layout))
    assert size <= len(page)
    assert ring_page.missed(page, layout) >= -1


@given(entry=st.binary(max_size=300), said=damaged(FORMATS))
@examples(200)
def test_an_entry_is_decoded_or_refused(entry: bytes, said: bytes) -> None:
    try:
        record = EventFormat(said.decode("utf-8", "replace")).decode(memoryview(entry))
    except ValueError:
        return
    assert all(isinstance(value, int | str | bytes) for value in record.values())


def _same_kinds(one: EventFormat, other: EventFormat) -> bool:
    """Whether no field is text in one format and a number in the other; no kernel has that."""
    nothing = memoryview(bytes(1 << 17))
    known, before = one.decode(nothing), other.decode(nothing)
    return all(type(known[name]) is type(before[name]) for name in known.keys() & before.keys())


# Of all probes of one kernel, so that things meet.
@given(
    kernel=st.sampled_from(range(len(_RECORDED))),
    cuts=st.lists(damaged(PAGES), max_size=3),
    probe=st.sampled_from(sorted(set.intersection(*(set(one["formats"]) for one in _RECORDED)))),
    said=st.none() | damaged(FORMATS),
    counts=damaged(COUNTS),
)
@examples(100)
def test_damaged_rings_are_reported_or_lost(
    kernel: int, cuts: list[bytes], probe: str, said: bytes | None, counts: bytes
) -> None:
    """``probe``: whose format is ``said``."""
    recorded: dict[str, Any] = _RECORDED[kernel]
    layout = PageLayout.parse(recorded["header_page"])
    formats: dict[int, tuple[str, EventFormat]] = {}
    for name, given_format in recorded["formats"].items():
        known = EventFormat(given_format)
        formats[known.id] = (name, known)
    if said is not None:
        try:
            known = EventFormat(said.decode("utf-8", "replace"))
        except ValueError:
            return
        if not _same_kinds(known, EventFormat(recorded["formats"][probe])):
            return
        formats[known.id] = (probe, known)
    found = []
    for page in [*(base64.b64decode(page) for _, page in recorded["pages"]), *cuts]:
        for ts, entry in ring_page.entries(page, layout):
            if (number := ring_page.event_id(entry)) in formats:
                name, known = formats[number]
                with suppress(ValueError):
                    found.append(Record(ts, name, known.decode(entry)))
    translator = FtraceTranslator(VmResolver(VmTable("/nonexistent"), lambda tid: None))
    translator.exits.watches_gmem = True
    totals = KernelTotals()
    said_now = counts.decode("utf-8", "replace")
    totals.add("run", HistogramReader().read("run", lambda: said_now))
    correlator = Correlator()
    for batch in (found[::2], found[1::2]):
        for event in translator.batch(batch, 1 << 40, totals=totals, last=batch is not found):
            try:
                event = checked(event)  # noqa: PLW2901
            except DECODE_ERRORS:
                event = Lost(0, "unwritable_events", 1)  # noqa: PLW2901
            json_output.event_line(correlator.feed(event))
        translator.filter_exclusions()
    json_output.top(correlator.snapshot())
