"""Damaged recordings and damaged output of a serve, through every command that reads them."""

from __future__ import annotations

import gzip
import json
import os
import socket
import tarfile
import threading
import unicodedata
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from click.testing import Result
from hypothesis import example, given
from hypothesis import strategies as st

from kvmtrace import local_socket, sources
from kvmtrace.errors import KvmtraceError
from kvmtrace.linux import host
from kvmtrace.sources.recording import BACKLOG_END
from tests.property import examples
from tests.property.damage import damaged, directory, placed
from tests.property.stories import (
    HEADER,
    PROBE_LINE,
    RECORDINGS,
    SEEDS,
    lines,
    records,
)
from tests.unit.command_line import invoke
from tests.unit.test_unpack import tar

FILE = "FILE"
BUNDLE = "bundle.tar.gz"
COMMANDS = (
    ("replay", FILE),
    ("replay", FILE, "--json"),
    ("replay", FILE, "--events"),
    ("replay", FILE, "--events", "--json"),
    ("explain", "0x103275", "--from", FILE),
    ("explain", "web-1", "--from", FILE),
    ("explain", "103275-1", "--from", FILE, "--json"),
    ("bundle", "-o", BUNDLE, "--force", "--from", FILE),
    ("bundle", "-o", BUNDLE, "--force", "--redact", "--from", FILE),
)

JOINING = (
    ("top", "--once", "--interval", "0.001"),
    ("top", "--once", "--interval", "0.001", "--json"),
    ("events", "--duration", "0.001"),
    ("events", "--duration", "0.001", "--json"),
    ("explain", "0x103275", "--json"),
)

# Of the JSON contract, what is no number although Python takes it for one.
FLAGS = {"annotated", "before", "private", "attached", "gone", "before_start", "released"}


@pytest.fixture(autouse=True, scope="module")
def _no_kernel() -> Iterator[None]:
    def none(kind: str = "auto") -> sources.Source:
        raise KvmtraceError("no kernel here")

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(host, "bcc", lambda: host.Bcc(None))
        patch.setattr(sources, "open_source", none)
        yield


def run(*arguments: str) -> Result:
    """Run a command; it has to end in a defined way, whatever its input."""
    result = invoke(*arguments)
    said = result.stdout + result.stderr
    assert result.exception is None or isinstance(result.exception, SystemExit)
    assert result.exit_code in (0, 1, 2)
    assert "Traceback" not in said
    assert "internal error" not in said
    assert not unfit(said)
    assert result.exit_code == 0 or any(
        line.startswith("kvmtrace: ") for line in result.stderr.splitlines()
    )
    return result


def unfit(text: str) -> set[str]:
    """Characters that must not reach a terminal."""
    bad = {"Cc", "Cf", "Cs", "Zl", "Zp"}
    return {c for c in text if c != "\n" and unicodedata.category(c) in bad}


def _no_number(word: str) -> Any:
    raise AssertionError(f"{word} is not JSON")


def check_json(text: str) -> Any:
    """Parse a line as strict JSON, with finite numbers."""
    found = json.loads(text, parse_constant=_no_number)
    _check_flags(found)
    return found


def _check_flags(value: Any, name: str = "") -> None:
    if isinstance(value, dict):
        for key, item in value.items():
            _check_flags(item, key)
    elif isinstance(value, list):
        for item in value:
            _check_flags(item, name)
    else:
        assert not isinstance(value, bool) or name in FLAGS, name
        assert not isinstance(value, float)


@given(command=st.sampled_from(COMMANDS), recording=RECORDINGS)
@examples(150)
def test_a_recording_is_read_or_refused(command: tuple[str, ...], recording: bytes) -> None:
    paths = {FILE: placed(recording, "recording"), BUNDLE: f"{directory()}/{BUNDLE}"}
    result = run(*(paths.get(word, word) for word in command))
    if "--json" in command:
        for line in result.stdout.splitlines():
            check_json(line)
    if command[0] == "bundle" and result.exit_code == 0:
        with tarfile.open(paths[BUNDLE]) as archive:
            texts = {one.name: archive.extractfile(one) for one in archive.getmembers()}
            for name, file in texts.items():
                assert file is not None
                text = file.read().decode()
                assert not unfit(text)
                if name.endswith("events.jsonl"):
                    for line in text.splitlines():
                        json.loads(line)
                elif name.endswith(".json"):
                    check_json(text)
    left = {name for name in os.listdir(directory()) if name.startswith(".kvmtrace-")}
    assert not left


_PACKED = [gzip.compress(SEEDS[0], mtime=0), tar({"kvmtrace-bundle/events.jsonl": SEEDS[0]})]


@given(packed=damaged([*_PACKED, gzip.compress(_PACKED[1], mtime=0)]))
@examples(60)
def test_what_is_packed_is_read_or_refused(packed: bytes) -> None:
    path = placed(packed, "packed")
    run("replay", path, "--events")


@given(recording=RECORDINGS)
@example(recording=lines([HEADER]) + b'{"kind":"probes","probes":')
@examples(60)
def test_what_was_bundled_is_a_recording_of_the_same(recording: bytes) -> None:
    """Replaying a bundle's events gives the incidents that it shows."""
    path, bundle = placed(recording, "recording"), f"{directory()}/{BUNDLE}"
    if run("bundle", "-o", bundle, "--force", "--from", path).exit_code:
        return
    with tarfile.open(bundle) as archive:
        events = archive.extractfile("kvmtrace-bundle/events.jsonl")
        assert events is not None
        again = placed(events.read(), "bundled")
    first, second = run("replay", path, "--json"), run("replay", again, "--json")
    # What was cut off stays so; a bundle says that its end is missing.
    assert second.exit_code == 0 or "is cut off" in first.stderr
    told, retold = json.loads(first.stdout), json.loads(second.stdout)
    for part in ("vms", "incidents", "lost", "dimms"):
        assert told[part] == retold[part]


@st.composite
def _said(draw: st.DrawFn) -> bytes:
    """The output of a serve: a recording with a mark after the backlog."""
    found: list[Any] = draw(records(6))
    found.insert(draw(st.integers(0, len(found))), {"kind": BACKLOG_END})
    text = lines(found)
    if draw(st.booleans()):
        return draw(damaged([text]))
    before = lines([HEADER, PROBE_LINE, {"kind": BACKLOG_END}])
    return draw(st.sampled_from([text, before + draw(RECORDINGS), draw(RECORDINGS)]))


@given(command=st.sampled_from(JOINING), said=_said() | damaged(SEEDS))
@examples(150)
def test_a_serve_is_understood_or_refused(command: tuple[str, ...], said: bytes) -> None:
    ours, theirs = socket.socketpair()
    speaker = threading.Thread(target=_say, args=(theirs, said))
    speaker.start()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(local_socket, "connect", lambda: (ours, 77))
        result = run(*command)
    ours.close()
    speaker.join()
    if "--json" in command:
        for line in result.stdout.splitlines():
            check_json(line)


def _say(client: socket.socket, said: bytes) -> None:
    with client:
        try:
            client.sendall(said)
        except OSError:
            return  # it has heard enough


def test_every_command_is_there(tmp_path: Path) -> None:
    """Otherwise these tests would hold for a command that does nothing."""
    path = tmp_path / "recording"
    path.write_bytes(SEEDS[0])
    for command in COMMANDS:
        words = {FILE: str(path), BUNDLE: str(tmp_path / BUNDLE)}
        assert run(*(words.get(word, word) for word in command)).exit_code == 0
