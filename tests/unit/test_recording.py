"""Recordings: events are read as they were written, and damaged ones are rejected."""

from __future__ import annotations

import contextlib
import io
import json
import re
from dataclasses import replace
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from kvmtrace.cli.inputs import WatchedLog
from kvmtrace.errors import KvmtraceError
from kvmtrace.events import (
    JOIN_NS,
    KINDS,
    ClockStep,
    Event,
    Exit,
    Found,
    GmemPage,
    GmemRefusal,
    Host,
    HwError,
    KernelCounts,
    Lost,
    MachineCheck,
    Owned,
    Owner,
    PageReplaced,
    Poison,
    Reboot,
    Sigbus,
    SoftOffline,
    Tick,
    Unpoison,
    VcpuState,
    VmGone,
    VmSeen,
)
from kvmtrace.sources.recording import RecordingSource, Writer
from kvmtrace.views import lookup
from tests.unit.fake import PROBES, STORY, T0, machine_check

HOST = Host("sick-host", "6.18.15", "bpf", "bpf works here", 4096)
POISON = Poison(T0, 0x103275, "dirty LRU page", "Recovered", 9, 2, 5)
EVERY_KIND: tuple[Event, ...] = (
    *STORY,
    replace(POISON, gmem=GmemPage(383, 8, (Owner(1, 8, 0x7F0000000000), Owner(2, None)), False)),
    Owned(T0, 0x103275, Owner(2, 9), "pagemap"),
    Sigbus(T0, 1, 2, 4, 0x7F0000000000, 12, sender=3, vm=1, vcpu=0, gfn=8, pfn=9, comm="cat"),
    machine_check(T0, 0xFFFFFFFFFFFFFFFF, None, 1, 2, 0, 0xBD80000000100134),
    GmemRefusal(T0, 1, 8, 3),
    HwError(T0, "ras:mc_event", "corrected", 0x1000, 1, 4096, 2, "DIMM A1", "read error", 0, 1),
    SoftOffline(T0, 5, 16),
    Unpoison(T0, 5),
    Found(T0, 6),
    KernelCounts(T0, (("total", 3), ("recovered", 2)), 12288, True),
    VcpuState(T0, 1, 4003, "running", 0, 1_000_000),
    PageReplaced(T0, 1, 0x103275, 0x7F0000000000),
    Tick(T0),
    ClockStep(T0, -3_600_000_000_000, -3_600_000_000_000, 5),
    Reboot(T0),
    Lost(T0, "ringbuf", 7),
    VmGone(T0, 1),
)


def test_every_kind_is_here() -> None:
    assert {event.kind for event in EVERY_KIND} == set(KINDS)


def recorded(events: tuple[Event, ...] = EVERY_KIND) -> str:
    file = io.StringIO()
    Writer(file, HOST).write(events, PROBES)
    return file.getvalue()


def replayed(path: Path) -> tuple[list[Event], RecordingSource]:
    source = RecordingSource(str(path))
    events: list[Event] = []
    while not source.done:
        events += source.poll(0)
    source.close()
    if source.damage:
        raise source.damage
    return events, source


def test_events_are_read_as_they_were_written(tmp_path: Path) -> None:
    path = tmp_path / "r"
    path.write_text(recorded())
    events, source = replayed(path)
    assert tuple(events) == EVERY_KIND
    assert source.probes() == PROBES
    assert source.host.name == "sick-host"
    assert source.host.source == "recording"
    assert source.host.source_why == "replay of r, from bpf"
    assert not source.truncated


def test_probes_are_written_when_they_change() -> None:
    file = io.StringIO()
    writer = Writer(file, HOST)
    writer.write(STORY[:1], PROBES)
    writer.write(STORY[1:2], PROBES)
    writer.write((), PROBES[:1])
    kinds = [json.loads(line).get("kind") for line in file.getvalue().splitlines()]
    assert kinds == [None, "probes", "vm_seen", "vm_seen", "probes"]


@pytest.mark.parametrize("cut", range(1, 60, 7))
def test_cut_off_last_line_is_left_out(tmp_path: Path, cut: int) -> None:
    path = tmp_path / "r"
    path.write_text(recorded(STORY)[:-cut])
    events, source = replayed(path)
    if cut == 1:  # only the line end is missing: the event is whole
        assert tuple(events) == STORY
    else:
        assert tuple(events) == STORY[:-1]
        assert source.truncated


@pytest.mark.parametrize(
    "text", ["", "\n", "hello\n", "[]\n", "{}\n", "\x7fELF\0\0", '{"kind":"exit"}\n', "[" * 100000]
)
def test_not_a_recording(tmp_path: Path, text: str) -> None:
    path = tmp_path / "r"
    path.write_text(text)
    with pytest.raises(KvmtraceError, match="is not a recording"):
        RecordingSource(str(path))


def test_from_the_future(tmp_path: Path) -> None:
    path = tmp_path / "r"
    path.write_text('{"kvmtrace_recording": 2}\n')
    with pytest.raises(KvmtraceError, match="newer kvmtrace"):
        RecordingSource(str(path))


@pytest.mark.parametrize(
    "line",
    [
        "garbage",
        "[]",
        "{}",
        '{"kind": 5, "ts": 1}',
        '{"kind": "no such kind", "ts": "now"}',
        '{"kind": "lost"}',
        '{"kind": "lost", "ts": "now", "where": "x", "count": 1}',
        '{"kind": "lost", "ts": 1e30, "where": "x", "count": 1}',
        '{"kind": "lost", "ts": 1, "where": 5, "count": 1}',
        '{"kind": "lost", "ts": -1, "where": "x", "count": 1}',
        '{"kind": "lost", "ts": 1, "where": "x", "count": ' + "9" * 30 + "}",
        '{"kind": "lost", "ts": 1, "where": "x", "count": ' + "9" * 5000 + "}",
        '{"kind": "lost", "ts": 1, "where": "x", "count": 0}',
        '{"kind": "exit", "ts": 1, "vm": 1, "vcpu": 0, "errno": 14, "reason": 0,'
        ' "annotated": false, "count": 0}',
        '{"kind": "sigbus", "ts": 1, "pid": 1, "tid": 1, "code": 4, "hva": 1, "lsb": 64}',
        '{"kind": "sigbus", "ts": 1, "pid": 1, "tid": 1, "code": 4, "hva": 1, "lsb": 40000000000}',
        '{"kind": "owned", "ts": 1, "pfn": 1, "via": "x", "owner": 7}',
        '{"kind": "gmem_poison", "ts": 1, "tid": 1, "index": 1, "owners": 7}',
        '{"kind": "poison", "ts": 1, "pfn": 1, "page_type": "", "result": "", "gmem": [1]}',
        '{"kind": "kernel_counts", "ts": 1, "failures": [["total", "many"]]}',
        '{"kind": "kernel_counts", "ts": 1, "failures": [["total"]]}',
        '{"kind": "kernel_counts", "ts": 1, "failures": [["total", 1, 2]]}',
        "[" * 100_000,
        '{"kind": "lost", "ts": 1, "where": "x", "count": true}',
        '{"kind": "probes"}',
        '{"kind": "probes", "probes": [{"name": "run"}]}',
        '{"kind": ["unhashable"]}',
        '{"kind": "lost", "pad": "' + "x" * (2 << 20) + '"}',
    ],
)
def test_damaged_in_the_middle_is_one_error(tmp_path: Path, line: str) -> None:
    path = tmp_path / "r"
    good = recorded(STORY)
    path.write_text(good + line + "\n" + good.splitlines()[-1] + "\n")
    source = RecordingSource(str(path))
    assert tuple(source.poll(0)) == STORY  # what came before it is there
    assert source.done
    assert source.damage is not None
    _, _, what = source.damage.message.partition(f"line {len(good.splitlines()) + 1}: ")
    words = r"not JSON|not an (object|event)|not a whole '\w+'|\w+ is (out of range|of .*)"
    assert re.fullmatch(words, what)


def test_events_of_a_newer_kvmtrace_are_lost(tmp_path: Path) -> None:
    path = tmp_path / "r"
    lines = (
        '{"kind":"omen","ts":7,"vm":[1]}',
        '{"kind":"a\\u001b[31m"}',
        '{"kind":"quiet","ts":9}',
    )
    path.write_text(recorded(()) + "\n".join(lines) + "\n")
    lost = Lost(7, "unknown_events", 1)
    assert replayed(path)[0] == [lost, lost, Tick(9)]


def old_page(ts: int, tid: int, index: int = 8) -> str:
    """The line before a poison's that older versions wrote for its guest_memfd page."""
    line = {"kind": "gmem_poison", "ts": ts, "tid": tid, "inode": 383, "index": index}
    return json.dumps({**line, "owners": [{"vm": 1, "gfn": index}]})


def old_poison(ts: int, tid: int | None) -> str:
    line = {"kind": "poison", "ts": ts, "tid": tid, "pfn": 5, "page_type": "a", "result": "b"}
    return json.dumps({name: value for name, value in line.items() if value is not None})


@pytest.mark.parametrize(
    ("pages", "tid", "index"),
    [
        ([(T0, 5, 8)], 5, 8),
        ([(T0 - JOIN_NS, 5, 8)], 5, 8),
        ([(T0 - 1, 5, 8), (T0, 5, 9)], 5, 9),
        ([(T0, 5, 8), (T0, 6, 9)], 5, 8),
        ([(T0, 6, 8)], 5, None),  # another thread's
        ([(T0, 5, 8)], None, None),
        ([(T0 - JOIN_NS - 1, 5, 8)], 5, None),  # its own poison was lost
        ([(T0 + 1, 5, 8)], 5, None),  # of the next poison
    ],
)
def test_a_guest_memfd_page_in_a_line_of_its_own(
    tmp_path: Path, pages: list[tuple[int, int, int]], tid: int | None, index: int | None
) -> None:
    path = tmp_path / "r"
    lines = [old_page(*page) for page in pages] + [old_poison(T0, tid)]
    path.write_text(recorded(()) + "\n".join(lines) + "\n")
    page = None if index is None else GmemPage(383, index, (Owner(1, index),))
    assert replayed(path)[0] == [Poison(T0, 5, "a", "b", tid=tid, gmem=page)]


def test_a_guest_memfd_page_is_of_one_poison(tmp_path: Path) -> None:
    path = tmp_path / "r"
    lines = (old_page(T0, 5), old_poison(T0, 5), old_poison(T0, 5))
    path.write_text(recorded(()) + "\n".join(lines) + "\n")
    first, second = replayed(path)[0]
    assert first == Poison(T0, 5, "a", "b", tid=5, gmem=GmemPage(383, 8, (Owner(1, 8),)))
    assert second == Poison(T0, 5, "a", "b", tid=5)


def test_pages_that_never_find_their_poison_are_counted(tmp_path: Path) -> None:
    path = tmp_path / "r"
    path.write_text(recorded(()) + "\n".join(old_page(T0 + n, n) for n in range(1029)) + "\n")
    assert replayed(path)[0] == [Lost(T0 + n, "halves", 1) for n in range(1024, 1029)]
    late = (old_page(T0 + n * 2 * JOIN_NS, n) for n in range(1029))
    path.write_text(recorded(()) + "\n".join(late) + "\n")
    assert replayed(path)[0] == []


def test_a_machine_check_as_older_versions_recorded_it(tmp_path: Path) -> None:
    path = tmp_path / "r"
    line = {"kind": "mce", "ts": T0, "addr": 0x1040, "pfn": 1, "bank": 7, "cpu": 3, "socket": 1}
    line |= {"status": 0xBD80000000100090, "misc": 0x8C, "count": 2, "vendor": "GenuineIntel"}
    path.write_text(recorded(()) + json.dumps(line) + "\n")
    check = MachineCheck(7, 3, 1, 0xBD80000000100090, 0x8C, "GenuineIntel")
    assert replayed(path)[0] == [
        HwError(T0, "mce:mce_record", "recoverable", 0x1040, 1, 4096, 2, socket=1, check=check)
    ]


def test_values_of_registers_are_not_out_of_range(tmp_path: Path) -> None:
    path = tmp_path / "r"
    events = (HwError(T0, "ras:mc_event", count=0), Sigbus(T0, 1, 2, 4, 0x7F0000000000, 63))
    path.write_text(recorded(events))
    assert tuple(replayed(path)[0]) == events


def test_missing_file_and_directory(tmp_path: Path) -> None:
    with pytest.raises(KvmtraceError, match="No such file"):
        RecordingSource(str(tmp_path / "none"))
    with pytest.raises(KvmtraceError, match="directory"):
        RecordingSource(str(tmp_path))


def test_strings_are_cleaned(tmp_path: Path) -> None:
    path = tmp_path / "r"
    path.write_text(recorded((VmSeen(T0, 1, 2, "a\x1b[2J"), Poison(T0, 1, "p\x07", "r\u202e"))))
    (seen, poison), _ = replayed(path)
    assert isinstance(seen, VmSeen)
    assert isinstance(poison, Poison)
    assert (seen.name, poison.page_type, poison.result) == ("a?[2J", "p?", "r")


def test_a_host_with_other_pages_is_replayed_with_its_own(tmp_path: Path) -> None:
    """An arm64 host with pages of 16 KiB, replayed on any other."""
    story: tuple[Event, ...] = (
        VmSeen(T0, 1, 4001, "web"),
        Poison(T0, 0x1000, "dirty LRU page", "Recovered"),
        Owned(T0, 0x1000, Owner(1, 5, 0x7F0000014000), "pagemap"),
        machine_check(T0, 0x4000123, 0x1000, 1, 2, 0, 0xBD80000000100134),
    )
    host = Host("arm", "7.3.4", "bpf", page_shift=14)
    path = tmp_path / "arm.jsonl"
    with path.open("w") as file:
        Writer(file, host).write(story, PROBES)
    events, source = replayed(path)
    snapshot = WatchedLog(events, source.host, ()).model()
    (incident,) = snapshot.incidents
    assert incident.size == 1 << 14
    assert lookup.find(snapshot, "0x14000@web").incidents == (incident,)
    assert lookup.find(snapshot, "0x5000@web").incidents == ()
    path.write_text(path.read_text().replace('"page_shift":14', '"page_shift":400'))
    with pytest.raises(KvmtraceError, match=r"2\*\*400 bytes"):
        RecordingSource(str(path))


@pytest.mark.parametrize("empty", ["", " ", "\u200b"])
def test_an_empty_string_is_none(tmp_path: Path, empty: str) -> None:
    path = tmp_path / "r"
    path.write_text(recorded((VmSeen(T0, 1, 2, empty, empty, empty), Poison(T0, 1, empty, "r"))))
    assert replayed(path)[0] == [VmSeen(T0, 1, 2), Poison(T0, 1, "", "r")]


def test_newer_fields_are_ignored(tmp_path: Path) -> None:
    path = tmp_path / "r"
    line = '{"kind":"vm_gone","ts":5,"vm":1,"since":[1]}\n'
    path.write_text(recorded(()) + line + "\n")
    assert replayed(path)[0] == [VmGone(5, 1)]


@given(
    st.lists(st.one_of(st.binary(max_size=80), st.sampled_from(recorded().encode().split(b"\n"))))
)
def test_any_bytes_are_events_or_one_error(
    tmp_path_factory: pytest.TempPathFactory, lines: list[bytes]
) -> None:
    path = tmp_path_factory.getbasetemp() / "fuzzed"
    path.write_bytes(recorded(()).encode() + b"\n".join(lines))
    with contextlib.suppress(KvmtraceError):
        assert all(isinstance(event, Event) for event in replayed(path)[0])


def test_exits_keep_their_zeroes(tmp_path: Path) -> None:
    path = tmp_path / "r"
    event = Exit(T0, 1, 0, 14, 39, True, flags=0, gpa=0, size=0, gfn=0, private=False, gmem=0)
    path.write_text(recorded((event,)))
    assert replayed(path)[0] == [event]


def test_exits_without_a_counter_of_their_own_keep_unknown_fields(tmp_path: Path) -> None:
    path = tmp_path / "r"
    counted = Exit(T0, 1, None, 14, 39, True, flags=0, gmem=2, count=5000)
    nothing = Exit(T0, 1, None, 133, None, None, count=7)
    text = recorded((counted, nothing))
    assert '"vcpu":' not in text
    path.write_text(text)
    assert replayed(path)[0] == [counted, nothing]


@pytest.mark.parametrize(
    "lines",
    [
        ('{"kind": "vm_gone", "ts": 1, "vm": [1', "2]}"),
        ('{"kind": "quiet", "ts": 1}, {"kind": "quiet", "ts": 2}',),
        ('{"kind": "quiet", "ts": [1', '{"a": 2}]}', '{"kind": "quiet", "ts": 5}, {"b": 6}'),
        ('{"kind": "quiet", "ts": 1, "x": "', '", "y": "', '"}'),
    ],
)
def test_lines_that_are_parsed_together_stand_alone(tmp_path: Path, lines: tuple[str, ...]) -> None:
    """What is no object by itself is damage, whatever it is with the lines beside it."""
    path = tmp_path / "recording"
    header = recorded(()).splitlines()[0]
    text = "\n".join(
        [header, '{"kind": "quiet", "ts": 7}', *lines, '{"kind": "quiet", "ts": 9}', ""]
    )
    path.write_text(text)
    source = RecordingSource(str(path))
    events = source.poll(0)
    source.close()
    assert events == [Tick(7), Tick(9)]
    assert "line 3: not JSON" in str(source.damage)


def test_reading_again_ends_where_it_ended(tmp_path: Path) -> None:
    """Lines that were read ahead and not taken are left out, as those that follow."""
    path = tmp_path / "recording"
    path.write_text(recorded(tuple(Tick(T0 + number) for number in range(1000))))
    source = RecordingSource(str(path), twice=True)
    first = source.poll(0)
    source.rewind()
    again: list[Event] = []
    while not source.done:
        again += source.poll(0)
    source.close()
    assert first == again
    assert 0 < len(first) < 1000
