"""`record` and `replay`, and the files that they write."""

from __future__ import annotations

import json
import os
import stat
import threading
from collections.abc import Callable
from pathlib import Path

import pytest

from kvmtrace.errors import KvmtraceError
from kvmtrace.events import Event, Lost
from tests.unit.command_line import invoke, refuse
from tests.unit.fake import T0, FakeSource


def test_record_then_replay(source: FakeSource, tmp_path: Path) -> None:
    path = str(tmp_path / "r")
    result = invoke("record", path, "--duration", "0.2")
    assert result.exit_code == 0
    assert result.stderr.endswith(" events\n")
    assert source.closed
    assert Path(path).stat().st_mode & 0o777 == 0o600

    table = invoke("replay", path)
    assert table.exit_code == 0
    assert "web-1" in table.stdout
    top = json.loads(invoke("replay", path, "--json").stdout)
    assert top["host"]["source"] == "recording"
    assert top["incidents"][0]["pfn"] == 0x103275
    lines = invoke("replay", path, "--events", "--json").stdout.splitlines()
    assert [json.loads(line)["kind"] for line in lines] == ["vm", "vm", "poison", "exit", "exit"]
    assert len(invoke("replay", path, "--events").stdout.splitlines()) == 5


def test_record_takes_a_last_look(source: FakeSource, tmp_path: Path) -> None:
    """What the kernel only counted is reported by a poll that does not wait."""
    asked: list[float] = []
    given = source.poll

    def poll(timeout: float) -> list[Event]:
        asked.append(timeout)
        return given(timeout) + ([Lost(T0, "the_end", 1)] if timeout == 0 else [])

    source.poll = poll  # type: ignore[method-assign]  # a fake's own
    path = tmp_path / "r"
    assert invoke("record", str(path), "--duration", "0.1").exit_code == 0
    assert asked.count(0) == 1
    assert asked[-1] == 0
    *lines, end = path.read_text().splitlines()
    assert any("the_end" in line for line in lines)
    assert '"end":true' in end


def test_record_does_not_overwrite(source: FakeSource, tmp_path: Path) -> None:
    path = tmp_path / "r"
    path.write_text("precious")
    result = invoke("record", str(path), "--duration", "0.1")
    assert result.exit_code == 1
    assert "--force" in result.stderr
    assert path.read_text() == "precious"
    assert not source.closed  # nor opened
    assert invoke("record", str(path), "--force", "--duration", "0.1").exit_code == 0
    assert "kvmtrace_recording" in path.read_text()


def test_record_where_it_cannot(source: FakeSource) -> None:
    result = invoke("record", "/nonexistent/r")
    assert result.exit_code == 1
    assert "/nonexistent/r: No such file or directory\nhint: " in result.stderr
    assert not source.closed  # nor opened


@pytest.mark.parametrize("link", [os.link, os.symlink])
def test_force_replaces_whatever_is_there(
    source: FakeSource, tmp_path: Path, link: Callable[[Path, Path], None]
) -> None:
    """By a file of its own: not for everybody's eyes, nor written over somebody else's."""
    precious, path = tmp_path / "precious", tmp_path / "r"
    precious.write_text("precious")
    precious.chmod(0o644)
    link(precious, path)
    assert invoke("record", str(path), "--force", "--duration", "0.1").exit_code == 0
    assert "kvmtrace_recording" in path.read_text()
    assert path.lstat().st_mode == stat.S_IFREG | 0o600
    path.unlink()
    out = ("-o", str(path), "--force", "--source", "bpf", "--duration", "0.1")
    link(precious, path)
    assert invoke("bundle", *out).exit_code == 0
    assert path.lstat().st_mode == stat.S_IFREG | 0o600
    assert precious.read_text() == "precious"
    assert sorted(tmp_path.iterdir()) == [precious, path]


@pytest.mark.parametrize("command", [("record",), ("bundle", "-o")])
@pytest.mark.parametrize("force", [(), ("--force",)])
def test_a_source_that_is_refused_leaves_no_file(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, command: tuple[str, ...], force: tuple[str]
) -> None:
    refuse(monkeypatch, KvmtraceError("BPF is refused"))
    assert "BPF is refused" in invoke(*command, str(tmp_path / "r"), *force).stderr
    assert not list(tmp_path.iterdir())
    if force:
        (tmp_path / "r").write_text("precious")
        invoke(*command, str(tmp_path / "r"), *force)
        assert (tmp_path / "r").read_text() == "precious"


def test_bundle_looks_at_its_file_first(source: FakeSource, tmp_path: Path) -> None:
    (tmp_path / "r").touch()
    assert "already there" in invoke("bundle", "-o", str(tmp_path / "r")).stderr
    assert "No such file" in invoke("bundle", "-o", str(tmp_path / "none" / "r")).stderr
    assert not source.polls


def test_output_to_a_pipe_with_a_name(source: FakeSource, tmp_path: Path) -> None:
    path = tmp_path / "pipe"
    os.mkfifo(path)
    read: list[bytes] = []
    reader = threading.Thread(target=lambda: read.append(path.read_bytes()))
    reader.start()
    assert invoke("record", str(path), "--force", "--duration", "0.1").exit_code == 0
    reader.join()
    assert read[0].startswith(b'{"kvmtrace_recording":1')
    assert path.is_fifo()


def test_replay_of_what_is_none(tmp_path: Path) -> None:
    path = tmp_path / "r"
    path.write_text("no recording\n")
    result = invoke("replay", str(path))
    assert result.exit_code == 1
    assert result.stderr.startswith(f"kvmtrace: {path} is not a recording\nhint: ")


def test_replay_says_what_it_left_out(source: FakeSource, tmp_path: Path) -> None:
    path = tmp_path / "r"
    invoke("record", str(path), "--duration", "0.2")
    path.write_bytes(path.read_bytes()[:-10])
    result = invoke("replay", str(path), "--json")
    assert result.exit_code == 0
    assert "last line is cut off" in result.stderr
    json.loads(result.stdout)
