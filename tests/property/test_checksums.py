"""A single fault in a recording is detected, or changes no event."""

from __future__ import annotations

import io
import tempfile
from collections.abc import Callable
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from kvmtrace.errors import KvmtraceError
from kvmtrace.events import Event, Host, Lost
from kvmtrace.probes import Probe
from kvmtrace.sources.recording import MISSING, RecordingSource, Writer
from tests.unit.fake import PROBES
from tests.unit.test_explain import STORY
from tests.unit.test_recording import EVERY_KIND

HOST = Host("sick-host", "6.18.15", "bpf", "bpf works here", 4096)


def _written() -> bytes:
    file = io.StringIO()
    writer = Writer(file, HOST, ends=True)
    writer.write(EVERY_KIND, PROBES)
    writer.write(STORY, PROBES[:1])
    writer.end()
    return file.getvalue().encode()


GOOD = _written()
LINES = GOOD.splitlines(keepends=True)

Read = tuple[Host, tuple[Probe, ...], list[Event]]


def read(data: bytes) -> tuple[Read | None, bool]:
    """The events read (None: the recording is refused), and whether a fault was reported."""
    with tempfile.NamedTemporaryFile() as file:
        Path(file.name).write_bytes(data)
        try:
            source = RecordingSource(file.name)
        except KvmtraceError:
            return None, True
        events: list[Event] = []
        while not source.done:
            events += source.poll(0)
        source.close()
    said = bool(source.damage or source.doubt or source.truncated)
    return (source.recorded, source.probes(), events), said


INTACT, _ = read(GOOD)


def test_nothing_is_said_of_what_is_intact() -> None:
    assert INTACT is not None
    assert read(GOOD) == (INTACT, False)
    assert INTACT[0] == HOST
    assert INTACT[2] == [*EVERY_KIND, *STORY]


def check(data: bytes) -> None:
    """The fault is detected or harmless, and all other events are still read."""
    assert INTACT is not None
    found, said = read(data)
    assert said or found == INTACT
    if found is not None:
        told = [one for one in found[2] if not (isinstance(one, Lost) and one.where == MISSING)]
        assert all(event in INTACT[2] for event in told)
        assert len(told) >= len(INTACT[2]) - 2  # a line's end may be what is damaged


@given(st.integers(0, len(GOOD) - 1), st.integers(0, 7))
def test_a_flipped_bit(at: int, bit: int) -> None:
    data = bytearray(GOOD)
    data[at] ^= 1 << bit
    check(bytes(data))


@pytest.mark.parametrize("bit", range(8))
def test_a_flipped_bit_where_lines_end(bit: int) -> None:
    for end in (at for at, byte in enumerate(GOOD) if byte == ord("\n")):
        for at in (end - 1, end, min(end + 1, len(GOOD) - 1)):
            data = bytearray(GOOD)
            data[at] ^= 1 << bit
            check(bytes(data))


def removed(at: int) -> list[bytes]:
    return LINES[:at] + LINES[at + 1 :]


def doubled(at: int) -> list[bytes]:
    return LINES[: at + 1] + LINES[at:]


def swapped(at: int) -> list[bytes]:
    return LINES[:at] + LINES[at : at + 2][::-1] + LINES[at + 2 :]


def moved_to_the_end(at: int) -> list[bytes]:
    return LINES[:at] + LINES[at + 1 :] + [LINES[at]]


@pytest.mark.parametrize("change", [removed, doubled, swapped, moved_to_the_end])
def test_a_line(change: Callable[[int], list[bytes]]) -> None:
    for at in range(len(LINES)):
        lines = change(at)
        if lines != LINES:
            assert read(b"".join(lines))[1], (change.__name__, at)
            check(b"".join(lines))


@given(st.integers(1, len(GOOD) - 1))
def test_a_missing_end(size: int) -> None:
    found, said = read(GOOD[:size])
    assert said or found == INTACT
    if found is not None:
        assert INTACT is not None
        assert found[2] == INTACT[2][: len(found[2])]
