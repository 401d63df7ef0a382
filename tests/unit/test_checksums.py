"""Recordings that were changed: what is reported, and what is still read."""

from __future__ import annotations

import io
import json
import zlib
from collections.abc import Callable
from decimal import Decimal
from pathlib import Path
from typing import Any

import pytest

from kvmtrace import sources
from kvmtrace.events import Event, Host, Lost, Poison, VmSeen
from kvmtrace.sources.checksums import Places
from kvmtrace.sources.codec import Decoder
from kvmtrace.sources.recording import RecordingSource, Writer
from kvmtrace.sources.remote import RemoteSource
from kvmtrace.vmm import identity
from tests.unit.command_line import invoke
from tests.unit.fake import PROBES, STORY, T0, FakeSource, machine_check
from tests.unit.serving import Answering

HOST = Host("sick-host", "6.18.15", "bpf", "bpf works here", 4096)
NAMED = VmSeen(T0, 1, 4001, "wéb-1")


def recorded(*events: Event, ends: bool = True) -> list[str]:
    file = io.StringIO()
    writer = Writer(file, HOST, ends=ends)
    writer.write(events or STORY, PROBES)
    if ends:
        writer.end()
    return file.getvalue().splitlines(keepends=True)


@pytest.fixture
def path(tmp_path: Path) -> Path:
    path = tmp_path / "r"
    path.write_text("".join(recorded()))
    return path


def read(path: Path) -> tuple[list[Event], RecordingSource]:
    source = RecordingSource(str(path))
    events: list[Event] = []
    while not source.done:
        events += source.poll(0)
    source.close()
    return events, source


def test_every_line_has_its_number_and_the_crc_of_what_stands_before() -> None:
    for number, line in enumerate(recorded(), 1):
        body, crc, end = line.partition(',"crc":')
        assert json.loads(line)["line"] == number
        assert crc
        assert end == f"{zlib.crc32(body.encode())}}}\n"


def test_a_reader_without_checksums_reads_the_same() -> None:
    decoder = Decoder()
    read = [decoder.event(json.loads(line)) for line in recorded()[1:]]
    assert [event for event in read if event is not None] == list(STORY)
    assert decoder.probes == PROBES


def without_checksums(line: str) -> str:
    record = json.loads(line)
    del record["line"], record["crc"]
    return json.dumps(record) + "\n"


def in_other_bytes(line: str) -> str:
    return json.dumps(json.loads(line), ensure_ascii=False) + "\n"


@pytest.mark.parametrize("rewritten", [without_checksums, in_other_bytes])
def test_another_encoding_is_no_damage(tmp_path: Path, rewritten: Callable[[str], str]) -> None:
    path = tmp_path / "r"
    path.write_text("".join(map(rewritten, recorded(NAMED, *STORY))), encoding="utf-8")
    events, source = read(path)
    assert events == [NAMED, *STORY]
    assert (source.damage, source.doubt) == (None, None)


def test_lines_that_were_filtered_out_are_counted_and_the_rest_is_read(path: Path) -> None:
    lines = recorded()
    path.write_text("".join([lines[0], *(line for line in lines if '"exit"' in line)]))
    events, _ = read(path)
    exits = [event for event in STORY if event.kind == "exit"]
    assert events == [Lost(exits[0].ts, "missing_lines", 4), *exits]
    result = invoke("replay", "--events", str(path))
    assert result.exit_code == 1
    assert len(result.stdout.splitlines()) == 3
    assert result.stderr == (
        f"kvmtrace: {path}: 4 lines missing before line 2\n"
        "hint: the end is missing: it was cut off, or is still being written; 2 events read\n"
    )
    assert json.loads(invoke("replay", "--json", str(path)).stdout)["lost"]["missing_lines"] == 4
    path.write_text("".join(map(without_checksums, path.read_text().splitlines())))
    assert invoke("replay", str(path)).stderr == ""


def rounded(value: Any) -> Any:
    """As jq before 1.7 writes it."""
    if isinstance(value, dict):
        return {name: rounded(one) for name, one in value.items()}
    if type(value) is int and value > 1 << 53:
        return int(Decimal(f"{value:.17g}"))
    return value


def test_rounded_numbers_are_read_and_reported(tmp_path: Path) -> None:
    path = tmp_path / "r"
    late = 123_456_789
    written = (
        Poison(T0 + late, 5, "a", "b"),
        machine_check(T0 + late, None, None, 1, 2, 0, 0xBD << 56),
    )
    lines = [json.dumps(rounded(json.loads(line))) + "\n" for line in recorded(*written)]
    path.write_text("".join(lines))
    events, source = read(path)
    assert source.damage is None
    assert source.doubt is not None
    what = "changed or added after it was recorded"
    assert source.doubt.message == f"{path}: {what}: lines 1, 3-4"
    assert "jq before 1.7" in source.doubt.hint
    assert [event.kind for event in events] == ["poison", "hw_error"]
    assert all(abs(event.ts - T0 - late) < 1000 for event in events)
    path.write_text("".join([lines[0], *lines[3:]]))  # and filtered
    assert [getattr(event, "count", None) for event in read(path)[0]] == [2, 1]
    result = invoke("replay", str(path))
    assert result.exit_code == 1
    assert "2 lines missing before line 2" in result.stderr
    assert f"{what}: lines 1-2" in result.stderr


def test_a_line_that_was_changed_is_left_out_and_named(path: Path) -> None:
    changed = path.read_text().replace('"pfn":1061493', '"pfn":1061494')
    path.write_text(changed)
    events, _ = read(path)
    assert events == [*STORY[:2], Lost(STORY[3].ts, "missing_lines", 1), *STORY[3:]]
    result = invoke("replay", str(path))
    assert result.exit_code == 1
    assert "0x103276" not in result.stdout
    assert result.stderr == (
        f"kvmtrace: {path}, line 5: does not match its checksum\n"
        "hint: left out: line 5; 4 events read\n"
    )


def test_a_header_that_was_changed_costs_no_event(path: Path) -> None:
    path.write_text(path.read_text().replace("sick-host", "sick-hosu", 1))
    events, source = read(path)
    assert events == list(STORY)
    assert source.damage is not None
    assert source.damage.message == f"{path}, line 1: does not match its checksum"
    assert source.damage.hint == "5 events read"


def test_a_line_without_a_checksum_among_others_is_read_and_reported(path: Path) -> None:
    lines = recorded()
    lines[-1:-1] = ['{"kind":"quiet","ts":9}\n', '{"kind":"omen"}\n']
    path.write_text("".join(lines))
    events, _ = read(path)
    assert [event.kind for event in events[-2:]] == ["quiet", "lost"]
    result = invoke("replay", str(path))
    assert result.exit_code == 1
    assert result.stderr == (
        f"kvmtrace: {path}: changed or added after it was recorded: lines 8-9\n"
        "hint: without checksums, and read like the others\n"
    )


def test_garbage_between_lines_costs_only_itself(path: Path) -> None:
    lines = recorded()
    lines[4:4] = ["\x00\x7f{\n", "[]\n"]
    path.write_text("".join(lines))
    events, source = read(path)
    assert events == list(STORY)
    assert source.damage is not None
    assert source.damage.message == f"{path}, line 5: not JSON"
    assert source.damage.hint == "left out: lines 5-6; 5 events read"


def test_two_recordings_in_one_file(path: Path) -> None:
    """A VM's key means another VM in the second one."""
    for lines in (recorded(), list(map(without_checksums, recorded()))):
        other = [lines[0].replace("sick-host", "other-host"), *lines[1:]]
        path.write_text("".join(lines + other))
        events, source = read(path)
        assert events == list(STORY)
        assert source.damage is not None
        assert source.damage.message == f"{path}, line 9: another recording begins here"
        assert source.damage.hint == "left out: line 9 and what follows; 5 events read"


def test_a_recording_without_its_end(path: Path) -> None:
    lines = recorded()
    path.write_text("".join(lines[:-2]))
    result = invoke("replay", "--events", str(path))
    assert (result.exit_code, len(result.stdout.splitlines())) == (1, 4)
    assert result.stderr == (
        f"kvmtrace: {path}: the end is missing: it was cut off, or is still being written\n"
        "hint: 4 events read\n"
    )
    # What is cut off is no event: all of them are there.
    path.write_text("".join(lines)[:-30])
    result = invoke("replay", str(path))
    assert result.exit_code == 0
    assert result.stderr == f"kvmtrace: {path}: the last line is cut off; left out\n"


def test_a_compressed_recording_is_recognized(tmp_path: Path) -> None:
    path = tmp_path / "r.xz"
    path.write_bytes(b"\xfd7zXZ\0\0\n")
    assert "hint: it is compressed: unpack it first\n" in invoke("replay", str(path)).stderr


@pytest.mark.parametrize("source", [FakeSource(STORY), FakeSource(STORY, failure=OSError(5, "x"))])
def test_record_ends_what_it_writes(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, source: FakeSource
) -> None:
    """Also if its source fails: the recording until then is whole."""
    monkeypatch.setattr(sources, "open_source", lambda kind: source)
    monkeypatch.setattr(identity, "vm_processes", lambda: {})
    path = tmp_path / "r"
    invoke("record", str(path), "--duration", "0.2")
    events, read_back = read(path)
    assert [event for event in events if event in STORY] == list(STORY)
    assert (read_back.damage, read_back.whole) == (None, True)


def test_many_lines_are_counted() -> None:
    places = Places()
    for number in [3, 4, 5, *range(10, 40, 2)]:
        places.add(number)
    assert str(places) == "lines 3-5, 10, 12, 14, 16, 18, 20, 22 and 8 more"
    places = Places()
    places.add(7)
    assert str(places) == "line 7"


@pytest.mark.parametrize("broken", [3, 4])
def test_a_serve_that_sends_damaged_lines_is_not_read(broken: int) -> None:
    file = io.StringIO()
    writer = Writer(file, HOST)
    writer.write(STORY, PROBES)
    writer.mark()
    lines = file.getvalue().splitlines(keepends=True)

    def joined(said: str) -> RemoteSource | None:
        answering = Answering(lambda client: client.file.write(said))
        try:
            return RemoteSource.connect()
        finally:
            answering.close()

    source = joined("".join(lines))
    assert source is not None
    assert source.poll(0) == list(STORY)
    source.close()
    assert joined("".join(lines[:broken] + lines[broken + 1 :])) is None
    lines[broken] = lines[broken].replace('"ts":179', '"ts":178')
    assert joined("".join(lines)) is None


HUGE = "9" * 400


@pytest.mark.parametrize(
    "body",
    [
        '{"kind":"quiet","ts":"now","line":9',
        '{"kind":"quiet","ts":1,"line":true',
        '{"kind":"quiet","ts":1,"line":"9"',
        f'{{"kind":"quiet","ts":1,"line":{HUGE}',
        f'{{"kind":"quiet","ts":{HUGE},"line":9',
        '{"kind":"quiet","ts":1e400,"line":9',
        '{"kind":"quiet","ts":NaN,"line":9',
        '{"kind":"quiet","ts":1,"line":9,"a":' + "[" * 900 + "]" * 900,
    ],
)
@pytest.mark.parametrize("matches", [True, False])
@pytest.mark.parametrize("exact", [str((1 << 53) + 1), str(1 << 53), '"x"', "null"])
def test_lines_with_any_checksum_are_checked(
    tmp_path: Path, body: str, matches: bool, exact: str
) -> None:
    """A recording comes from outside: a matching checksum proves nothing."""
    path = tmp_path / "r"
    first, *rest = recorded(ends=False)
    lines = [first.replace(str((1 << 53) + 1), exact), *rest]
    path.write_text(
        "".join(lines) + f'{body},"crc":{zlib.crc32(body.encode()) + (not matches)}}}\n'
    )
    result = invoke("replay", "--events", "--json", str(path))
    assert "internal error" not in result.stderr
    assert [json.loads(line)["kind"] for line in result.stdout.splitlines()][:5] == [
        *("vm", "vm", "poison", "exit", "exit")
    ]
