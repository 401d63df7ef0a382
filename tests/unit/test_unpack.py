"""A recording is read from what people hand on: compressed, in a bundle, by a pipe."""

from __future__ import annotations

import gzip
import io
import os
import subprocess
import sys
import tarfile
from collections.abc import Callable
from pathlib import Path

import pytest

from kvmtrace.errors import KvmtraceError
from kvmtrace.events import Event
from kvmtrace.sources import recording
from kvmtrace.sources.recording import RecordingSource
from tests import docs
from tests.unit.command_line import invoke

STORY = docs.STORY.read_bytes()


def tar(members: dict[str, bytes]) -> bytes:
    file = io.BytesIO()
    with tarfile.open(fileobj=file, mode="w") as archive:
        for name, content in members.items():
            entry = tarfile.TarInfo(name)
            entry.size = len(content)
            archive.addfile(entry, io.BytesIO(content))
    return file.getvalue()


BUNDLE = tar(
    {
        "kvmtrace-bundle/doctor.txt": b"x" * 20000,
        "kvmtrace-bundle/events.jsonl": STORY,
        "kvmtrace-bundle/top.json": b"{}",
    }
)
FORMS = {
    "plain": STORY,
    "gz": gzip.compress(STORY, mtime=0),
    "tar": BUNDLE,
    "tar.gz": gzip.compress(BUNDLE, mtime=0),
    "twice": gzip.compress(gzip.compress(STORY, mtime=0), mtime=0),
}


def read_all(source: RecordingSource) -> list[Event]:
    events: list[Event] = []
    while not source.done:
        events += source.poll(0)
    return events


def from_file(content: bytes, path: Path) -> str:
    path.write_bytes(content)
    return str(path)


def from_pipe(content: bytes, path: Path) -> str:
    """A path of a pipe that a process writes to in small pieces."""
    os.mkfifo(path)
    code = "import sys; f = open(sys.argv[1], 'wb', 0); d = sys.stdin.buffer.read()\n"
    code += "for n in range(0, len(d), 100): f.write(d[n : n + 100])"
    writer = subprocess.Popen([sys.executable, "-c", code, path], stdin=subprocess.PIPE)
    assert writer.stdin is not None
    writer.stdin.write(content)
    writer.stdin.close()
    return str(path)


@pytest.mark.parametrize("given", [from_file, from_pipe])
@pytest.mark.parametrize("form", FORMS)
def test_every_form_is_read_again(
    form: str,
    given: Callable[[bytes, Path], str],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(recording, "BATCH", 5)
    expected = read_all(RecordingSource(str(docs.STORY)))
    source = RecordingSource(given(FORMS[form], tmp_path / "sick"), twice=True)
    assert read_all(source) == expected
    assert source.whole
    for _ in range(2):
        source.rewind()
        assert len(source.poll(0)) > 0
        source.rewind()
        assert read_all(source) == expected
        assert source.whole
    assert (source.damage, source.doubt) == (None, None)
    source.close()


@pytest.mark.parametrize("form", ["gz", "tar", "tar.gz"])
def test_what_is_cut_off_is_read_up_to_there(form: str, tmp_path: Path) -> None:
    whole = read_all(RecordingSource(str(docs.STORY)))
    content = FORMS[form]
    end = content.index(b'"kind":"sigbus"') if form == "tar" else len(content) - 300
    source = RecordingSource(from_file(content[:end], tmp_path / "cut"))
    events = read_all(source)
    assert 0 < len(events) < len(whole)
    assert events == whole[: len(events)]
    assert source.damage is not None
    assert "cut off or damaged" in source.damage.message


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (tar({"other": b"x"}), "an archive without events.jsonl"),
        (tar({"events.jsonl": b"no recording"}), "is not a recording"),
        (gzip.compress(b"", mtime=0), "is not a recording"),
        (b"\x1f\x8b\x08\0\0\n", "cut off or damaged"),
        (BUNDLE[:700], "cut off or damaged"),
        (b"", "is not a recording"),
        (b"{", "is not a recording"),
    ],
)
def test_no_recordings(content: bytes, message: str, tmp_path: Path) -> None:
    path = from_file(content, tmp_path / "none")
    with pytest.raises(KvmtraceError) as raised:
        read_all(RecordingSource(path))
    assert message in raised.value.message
    result = invoke("replay", path)
    assert (result.exit_code, len(result.stderr.splitlines())) == (1, 2)


@pytest.mark.parametrize("form", ["plain", "tar.gz"])
@pytest.mark.parametrize(
    "command",
    [
        ("replay", "-"),
        ("explain", "web-1", "--from", "-"),
        ("bundle", "--redact", "--force", "-o", "/dev/null", "--from", "-"),
    ],
)
def test_standard_input(command: tuple[str, ...], form: str) -> None:
    done = subprocess.run(
        [sys.executable, "-m", "kvmtrace", *command],
        input=FORMS[form],
        capture_output=True,
        cwd=docs.ROOT,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    assert command[0] == "bundle" or b"web-1" in done.stdout


def test_closed_standard_input() -> None:
    line = [sys.executable, "-m", "kvmtrace", "replay", "-"]
    done = subprocess.run(
        ["sh", "-c", 'exec "$@" <&-', "sh", *line],
        capture_output=True,
        text=True,
        cwd=docs.ROOT,
        check=False,
    )
    assert done.returncode == 1
    assert done.stderr.startswith("kvmtrace: standard input: closed\nhint: ")
